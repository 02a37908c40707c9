//! What a disk keeps for its logs: the newest errors, and the host's own pages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Registers, TaskFile};

/// Pages of a log that the host keeps things in.
pub(super) const HOST_PAGES: u16 = 16;

/// What the NCQ command error log tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NcqError {
    /// The tag of the command that failed; `None` if it was no queued command.
    pub tag: Option<u8>,
    /// Its end.
    pub registers: Registers,
}

/// Errors that the error log keeps.
pub(super) const ERRORS: usize = 5;

/// A command that failed, for the error log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ErrorEntry {
    pub(super) task: TaskFile,
    pub(super) registers: Registers,
    pub(super) hours: u16,
}

/// Logs 80h to 9Fh: the host's own. Pages that were never written are zeroes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostLogs(BTreeMap<u16, Vec<u8>>);

impl HostLogs {
    fn key(address: u8, page: u16) -> u16 {
        u16::from(address) << 8 | page
    }

    /// Whether these pages can be written.
    pub(super) fn has(address: u8, page: u16, count: u16) -> bool {
        (0x80..=0x9f).contains(&address)
            && count > 0
            && page.checked_add(count).is_some_and(|end| end <= HOST_PAGES)
    }

    pub(super) fn read(&self, address: u8, page: u16, count: u16) -> Option<Vec<u8>> {
        if !Self::has(address, page, count) {
            return None;
        }
        let mut data = vec![0; usize::from(count) * 512];
        for (at, out) in data.chunks_exact_mut(512).enumerate() {
            if let Some(kept) = self.0.get(&Self::key(address, page + at as u16)) {
                out.copy_from_slice(kept);
            }
        }
        Some(data)
    }

    pub(super) fn write(&mut self, address: u8, page: u16, data: &[u8]) {
        for (at, bytes) in data.chunks_exact(512).enumerate() {
            self.0
                .insert(Self::key(address, page + at as u16), bytes.to_vec());
        }
    }

    /// Whether a driver could have made it.
    pub(super) fn is_sane(&self) -> bool {
        self.0
            .iter()
            .all(|(key, page)| Self::has((key >> 8) as u8, key & 0xff, 1) && page.len() == 512)
    }
}

/// Sets the last byte so that all of them add up to 0.
pub(super) fn sum(mut data: [u8; 512]) -> [u8; 512] {
    let sum = data[..511].iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
    data[511] = sum.wrapping_neg();
    data
}
