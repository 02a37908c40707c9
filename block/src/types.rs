//! Newtypes for offsets, so that a guest offset never passes for a host offset.

use std::fmt;

macro_rules! offset_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset `bytes` further on, or `None` on overflow.
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset_newtype!(
    /// A byte offset in the disk that the guest sees.
    GuestOffset
);
offset_newtype!(
    /// A byte offset in a host file.
    HostOffset
);

/// A file of an opened disk: an index into the disk's table of host files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// A run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// The first byte.
    pub start: GuestOffset,
    /// The number of bytes.
    pub len: u64,
}

impl GuestRange {
    /// The range of `len` bytes from `start`.
    #[must_use]
    pub fn new(start: u64, len: u64) -> Self {
        Self {
            start: GuestOffset(start),
            len,
        }
    }

    /// The first byte after the range. Ranges that reach an [`Image`](crate::image::Image) were
    /// checked against its size, so this does not overflow there; elsewhere it saturates.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.0.saturating_add(self.len)
    }

    /// What is left after the first `bytes` of the range.
    #[must_use]
    pub fn skip(&self, bytes: u64) -> Self {
        let bytes = bytes.min(self.len);
        Self::new(self.start.0 + bytes, self.len - bytes)
    }

    /// The first `bytes` of the range, or all of it if it is shorter.
    #[must_use]
    pub fn take(&self, bytes: u64) -> Self {
        Self::new(self.start.0, self.len.min(bytes))
    }
}

/// A disk image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk as they are: a file or a block device.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// LUKS version 1: an encrypted disk behind a header.
    Luks,
}

impl Format {
    /// Every format, in the order in which detection looks for them.
    pub const ALL: [Format; 3] = [Format::Qcow2, Format::Luks, Format::Raw];

    /// The name used on the command line and in image headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Luks => "luks",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
