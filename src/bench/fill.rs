//! Known content: every sector says which it is and which write wrote it last.

use block::DiskFile;

use crate::util::{
    failure::{Failure, Outcome},
    interrupt,
};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// Bytes at the start of a sector that say which it is.
pub(super) const STAMP: usize = 16;
/// Bytes moved at a time when the whole region is written or checked.
const CHUNK: u64 = 1 << 20;

/// What the first bytes of a sector hold: its number, mixed so that no sector looks like zeroes,
/// and the number of the write.
pub(super) fn stamp(sector: u64, write: u32) -> [u8; STAMP] {
    let mut bytes = [0; STAMP];
    bytes[..8].copy_from_slice(&(sector ^ 0x5afe_da7a_c0de_cafe).to_le_bytes());
    bytes[8..].copy_from_slice(&(u64::from(write) | 0xb10c << 48).to_le_bytes());
    bytes
}

/// The rest of a sector, the same for all.
pub(super) fn body() -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (at as u8).wrapping_mul(31) ^ 0x6d;
    }
    bytes
}

/// What the region must hold: the last write of every sector.
pub(super) struct Model {
    pub(super) writes: Vec<u32>,
}

impl Model {
    /// Writes known content to the first `size` bytes.
    pub(super) fn fill(disk: &dyn DiskFile, size: u64) -> Outcome<Self> {
        let model = Self {
            writes: vec![0; (size / SECTOR) as usize],
        };
        let mut buf = vec![0; CHUNK as usize];
        for start in (0..size).step_by(CHUNK as usize) {
            interrupt::check()?;
            let buf = &mut buf[..CHUNK.min(size - start) as usize];
            model.expected(start, buf);
            disk.write_at(buf, start)
                .map_err(|error| Failure::new(format!("filling the disk: {error}")))?;
        }
        disk.flush()
            .map_err(|error| Failure::new(format!("filling the disk: {error}")))?;
        Ok(model)
    }

    fn expected(&self, start: u64, buf: &mut [u8]) {
        let body = body();
        let first = start / SECTOR;
        for (sector, bytes) in (first..).zip(buf.chunks_mut(SECTOR as usize)) {
            bytes.copy_from_slice(&body[..bytes.len()]);
            let write = self.writes[sector as usize];
            bytes[..STAMP].copy_from_slice(&stamp(sector, write));
        }
    }

    /// Reads the whole region and compares every byte.
    pub(super) fn check(&self, disk: &dyn DiskFile) -> Outcome<()> {
        let size = self.writes.len() as u64 * SECTOR;
        let (mut found, mut wanted) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
        for start in (0..size).step_by(CHUNK as usize) {
            let len = CHUNK.min(size - start) as usize;
            let (found, wanted) = (&mut found[..len], &mut wanted[..len]);
            disk.read_at(found, start)
                .map_err(|error| Failure::new(format!("verifying: {error}")))?;
            self.expected(start, wanted);
            if found != wanted {
                let byte = found.iter().zip(wanted.iter()).position(|(a, b)| a != b);
                let byte = start + byte.unwrap_or(0) as u64;
                let sector = byte / SECTOR;
                return Err(Failure::new(format!(
                    "VERIFICATION FAILED: byte {byte} of {} (sector {sector}, last written by write {}) is not what was written",
                    disk.path().display(),
                    self.writes[sector as usize]
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_tell_sectors_and_writes_apart() {
        assert_ne!(stamp(1, 0), stamp(2, 0));
        assert_ne!(stamp(1, 0), stamp(1, 1));
        assert!(stamp(0, 0).iter().any(|byte| *byte != 0));
    }
}
