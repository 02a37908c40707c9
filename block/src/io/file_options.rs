//! How a host file is opened, and what it demands of I/O then.

use super::Segment;

/// How to open a host file.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    /// Open for writing too.
    pub write: bool,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Create the file if it does not exist.
    pub create: bool,
    /// Make an existing file empty; needs `create`.
    pub truncate: bool,
}

/// What direct I/O on a file demands, in bytes; 1 means no demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAlignment {
    /// Alignment of buffer addresses.
    pub memory: u32,
    /// Alignment of file offsets and lengths.
    pub offset: u32,
}

impl IoAlignment {
    /// No demand: buffered I/O.
    pub const NONE: Self = Self {
        memory: 1,
        offset: 1,
    };

    /// Whether nothing is demanded.
    #[must_use]
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// Whether an operation can be given to the file as it is.
    pub(crate) fn fits(self, offset: u64, segments: &[Segment]) -> bool {
        if self.is_none() {
            return true;
        }
        let unit = self.offset as usize;
        offset.is_multiple_of(u64::from(self.offset))
            && segments.iter().all(|segment| {
                segment.len().is_multiple_of(unit)
                    && (segment.as_ptr() as usize).is_multiple_of(self.memory as usize)
            })
    }
}
