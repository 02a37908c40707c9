//! One read or write of a copying thread, with what is said when it fails.

use block::{DiskFile, Error, ErrorKind};

use crate::{
    convert::{job::Job, scan::SECTOR},
    util::failure::{Failure, Outcome},
};

impl Job {
    /// Reads a part of a source. Where that fails and what can be had is to be had, every sector is read alone:
    /// those that cannot be had are zeroes, and are returned by their offsets.
    pub(super) fn read(
        &self,
        source: &dyn DiskFile,
        buf: &mut [u8],
        offset: u64,
    ) -> Outcome<Vec<(u64, ErrorKind)>> {
        let mut lost = Vec::new();
        let Err(error) = source.read_at(buf, offset) else {
            return Ok(lost);
        };
        if !self.salvage {
            return Err(self.failure("reading", offset, &error));
        }
        for (sector, buf) in buf.chunks_mut(SECTOR as usize).enumerate() {
            let at = offset + sector as u64 * SECTOR;
            if let Err(error) = source.read_at(buf, at) {
                lost.push((at, error.kind()));
                buf.fill(0);
            }
        }
        Ok(lost)
    }

    /// Tells of sectors that were lost.
    pub(super) fn tell_lost(&self, lost: &[(u64, ErrorKind)]) {
        for (offset, kind) in lost {
            self.warn("offset", *offset, *kind);
        }
    }

    /// Makes a part of the target read as zeroes, where it does not yet.
    pub(super) fn zero(&self, offset: u64, len: u64) -> Outcome<()> {
        if self.target_is_zero {
            return Ok(());
        }
        self.target
            .write_zeroes(offset, len, true)
            .map_err(|error| self.failure("writing", offset, &error))
    }

    /// What is said when a call failed: QEMU names the errno alone, Platter the file and what was wrong in it.
    pub(super) fn failure(&self, what: &str, offset: u64, error: &Error) -> Failure {
        if self.persona.is_qemu() {
            return failed(what, offset, error.kind());
        }
        Failure::new(format!("error while {what} at byte {offset}: {error}"))
    }
}

/// What is said when a request failed.
pub(super) fn failed(what: &str, offset: u64, kind: ErrorKind) -> Failure {
    let text = crate::util::errno::request_text(kind);
    Failure::new(format!("error while {what} at byte {offset}: {text}"))
}
