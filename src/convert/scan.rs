//! Finds out, ahead of the copy, which parts of the source have to be read.

use block::{AsyncDiskFile, DiskFile, ErrorKind};

use crate::util::failure::{Failure, Outcome};

/// A sector: what is tried alone where a larger range fails.
pub(super) const SECTOR: u64 = 512;

/// What to do with a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Copy.
    Data,
    /// It reads as zeroes.
    Zero,
    /// The target's backing file has it.
    Skip,
}

/// A run of one source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Which source.
    pub(super) source: usize,
    /// The offset in the source.
    pub(super) offset: u64,
    /// The offset in the target.
    pub(super) target: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
    /// What the run is could not be found out, so it is data.
    pub(super) unknown: Option<ErrorKind>,
}

/// How to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// What the source itself does not hold is left to the target's backing file.
    pub(super) target_has_backing: bool,
    /// Go on where the source cannot say what it has.
    pub(super) salvage: bool,
    /// No run ends inside a unit of the target, except at the end of a source: a unit with some data is
    /// data.
    pub(super) unit: u64,
    /// The most bytes of a run of data.
    pub(super) chunk: u64,
}

/// A source, as the scanner sees it.
pub(super) struct Scanned {
    pub(super) disk: Box<dyn DiskFile>,
    /// Its offset in the target.
    pub(super) start: u64,
}

/// The sources of a copy.
pub(super) fn sources(list: &[(u64, Box<dyn AsyncDiskFile>)]) -> Outcome<Vec<Scanned>> {
    let one = |(start, disk): &(u64, Box<dyn AsyncDiskFile>)| {
        Ok(Scanned {
            disk: disk
                .try_clone()
                .map_err(|error| Failure::new(error.to_string()))?,
            start: *start,
        })
    };
    list.iter().map(one).collect()
}

/// Gives every run of the sources, in order, to `found`, until that says that nobody wants more.
pub(super) fn run(sources: &[Scanned], look: Look, found: &mut dyn FnMut(Outcome<Run>) -> bool) {
    for (source, scanned) in sources.iter().enumerate() {
        match scan_one(source, scanned, look, found) {
            Ok(true) => {}
            Ok(false) => return,
            Err(failure) => {
                found(Err(failure));
                return;
            }
        }
    }
}

/// Whether more is wanted.
fn scan_one(
    source: usize,
    scanned: &Scanned,
    look: Look,
    found: &mut dyn FnMut(Outcome<Run>) -> bool,
) -> Outcome<bool> {
    let size = scanned.disk.size();
    let mut at = 0;
    while at < size {
        let (kind, len, unknown) = state(&*scanned.disk, at, size - at, look)?;
        let target = scanned.start + at;
        let (kind, len) = shape(kind, target, len, size - at, look.unit, look.chunk);
        let run = Run {
            source,
            offset: at,
            target,
            len,
            kind,
            unknown,
        };
        if !found(Ok(run)) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

/// What is at an offset, and how far. Where the source cannot say, smaller and smaller ranges are asked
/// for, down to a sector.
fn state(
    disk: &dyn DiskFile,
    at: u64,
    left: u64,
    look: Look,
) -> Outcome<(Kind, u64, Option<ErrorKind>)> {
    let mut wanted = left;
    loop {
        match disk.block_status(at, wanted) {
            Ok(status) => {
                let kind = if look.target_has_backing && !(status.present && status.depth == 0) {
                    Kind::Skip
                } else if status.zero || !status.present {
                    Kind::Zero
                } else {
                    Kind::Data
                };
                return Ok((kind, status.len.clamp(1, wanted), None));
            }
            Err(_) if look.salvage && wanted > SECTOR => {
                wanted = (wanted / 4).next_multiple_of(SECTOR);
            }
            Err(error) if look.salvage => return Ok((Kind::Data, wanted, Some(error.kind()))),
            Err(error) => {
                return Err(Failure::new(format!(
                    "error while reading block status at offset {at}: {error}"
                )));
            }
        }
    }
}

/// What to do with the start of a run of `len` bytes, `left` bytes before the end of the source.
fn shape(kind: Kind, target: u64, len: u64, left: u64, unit: u64, chunk: u64) -> (Kind, u64) {
    let to_boundary = (unit - target % unit).min(left);
    if kind != Kind::Data && target.is_multiple_of(unit) {
        // Whole units, or all there is.
        let whole = if len == left { len } else { len / unit * unit };
        if whole > 0 {
            return (kind, whole);
        }
    }
    // A unit that is not all alike is data; so that most chunks are aligned, none crosses a multiple
    // of the chunk size.
    let end = if kind == Kind::Data {
        len.max(to_boundary)
    } else {
        to_boundary
    };
    let end = if end < left {
        (target + end).next_multiple_of(unit) - target
    } else {
        end
    };
    (Kind::Data, end.min(left).min(chunk - target % chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_at_units() {
        // Data stretches to the end of its unit and to the next chunk.
        assert_eq!(
            shape(Kind::Data, 0, 100, 1 << 20, 4096, 65536),
            (Kind::Data, 4096)
        );
        assert_eq!(
            shape(Kind::Data, 0, 1 << 20, 1 << 20, 4096, 65536),
            (Kind::Data, 65536)
        );
        assert_eq!(
            shape(Kind::Data, 4096, 5000, 1 << 20, 4096, 65536),
            (Kind::Data, 8192)
        );
        assert_eq!(
            shape(Kind::Data, 61440, 1 << 20, 1 << 20, 4096, 65536),
            (Kind::Data, 4096)
        );
        // Zeroes shrink to whole units; a part of one is data.
        assert_eq!(
            shape(Kind::Zero, 0, 10000, 1 << 20, 4096, 65536),
            (Kind::Zero, 8192)
        );
        assert_eq!(
            shape(Kind::Zero, 0, 100, 1 << 20, 4096, 65536),
            (Kind::Data, 4096)
        );
        assert_eq!(
            shape(Kind::Skip, 512, 1 << 16, 1 << 20, 4096, 65536),
            (Kind::Data, 3584)
        );
        // The end of the source ends everything.
        assert_eq!(
            shape(Kind::Zero, 0, 100, 100, 4096, 65536),
            (Kind::Zero, 100)
        );
        assert_eq!(
            shape(Kind::Data, 4096, 100, 100, 4096, 65536),
            (Kind::Data, 100)
        );
    }
}
