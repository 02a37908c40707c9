//! The MSI-X table and its pending bits, for a bus that emulates them itself.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A message to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsixMessage {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: MsixMessage,
    control: u32,
    pending: bool,
}

const MASKED: u32 = 1;
/// Bytes of an entry.
const ENTRY: u64 = 16;

/// The table of a function.
#[derive(Debug)]
pub struct MsixTable {
    entries: Mutex<Vec<Entry>>,
}

impl MsixTable {
    /// A table of that many vectors, all masked.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let masked = Entry {
            message: MsixMessage::default(),
            control: MASKED,
            pending: false,
        };
        Self {
            entries: Mutex::new(vec![masked; usize::from(vectors)]),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dword(entry: &Entry, at: u64) -> u32 {
        match at {
            0 => entry.message.address as u32,
            4 => (entry.message.address >> 32) as u32,
            8 => entry.message.data,
            _ => entry.control,
        }
    }

    /// Reads from the table; beyond its end there are zeroes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let entries = self.entries();
        for (ahead, byte) in (0..).zip(data) {
            let at = offset.saturating_add(ahead);
            let entry = usize::try_from(at / ENTRY)
                .ok()
                .and_then(|index| entries.get(index));
            *byte = entry.map_or(0, |entry| {
                Self::dword(entry, (at % ENTRY) & !3).to_le_bytes()[(at % 4) as usize]
            });
        }
    }

    /// Writes aligned dwords of the table; returns the messages of vectors that became free to send
    /// what was pending. `masked` is the mask of the whole function.
    pub fn write_table(&self, offset: u64, data: &[u8], masked: bool) -> Vec<MsixMessage> {
        let mut entries = self.entries();
        if !offset.is_multiple_of(4) {
            return Vec::new();
        }
        for (ahead, bytes) in (0..).step_by(4).zip(data.chunks_exact(4)) {
            let at = offset.saturating_add(ahead);
            let Some(entry) = usize::try_from(at / ENTRY)
                .ok()
                .and_then(|index| entries.get_mut(index))
            else {
                break;
            };
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let address = &mut entry.message.address;
            match at % ENTRY {
                0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
                4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.message.data = value,
                _ => entry.control = value & MASKED,
            }
        }
        Self::due(&mut entries, masked)
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let entries = self.entries();
        for (ahead, byte) in (0..).zip(data) {
            let at = offset.saturating_add(ahead);
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let pending = |bit: usize| {
                let entry = first.checked_add(bit).and_then(|index| entries.get(index));
                entry.is_some_and(|entry| entry.pending)
            };
            *byte = (0..8).map(|bit| u8::from(pending(bit)) << bit).sum();
        }
    }

    /// A vector wants to be sent: the message, or nothing while it is masked and stays pending.
    pub fn signal(&self, vector: u16, masked: bool) -> Option<MsixMessage> {
        let mut entries = self.entries();
        let entry = entries.get_mut(usize::from(vector))?;
        if masked || entry.control & MASKED != 0 {
            entry.pending = true;
            return None;
        }
        Some(entry.message)
    }

    /// The mask of the whole function has changed: the messages that are due.
    pub fn set_masked(&self, masked: bool) -> Vec<MsixMessage> {
        Self::due(&mut self.entries(), masked)
    }

    fn due(entries: &mut [Entry], masked: bool) -> Vec<MsixMessage> {
        let mut messages = Vec::new();
        for entry in entries {
            if !masked && entry.control & MASKED == 0 && entry.pending {
                entry.pending = false;
                messages.push(entry.message);
            }
        }
        messages
    }

    /// After a reset: all masked, nothing pending.
    pub fn reset(&self) {
        for entry in self.entries().iter_mut() {
            entry.message = MsixMessage::default();
            entry.control = MASKED;
            entry.pending = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let table = MsixTable::new(9);
        let message = MsixMessage {
            address: 0xfee0_1000,
            data: 42,
        };
        table.write_table(16 * 8, &message.address.to_le_bytes(), false);
        table.write_table(16 * 8 + 8, &message.data.to_le_bytes(), false);
        assert_eq!(table.signal(8, false), None);
        let mut bits = [0; 8];
        table.read_pending(0, &mut bits);
        assert_eq!(bits, [0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(table.write_table(16 * 8 + 12, &[0; 4], false), [message]);
        assert_eq!(table.signal(8, false), Some(message));
        assert_eq!(table.signal(8, true), None);
        assert_eq!(table.set_masked(false), [message]);
        assert_eq!(table.signal(9, false), None);
    }

    #[test]
    fn accesses_beyond_the_end_do_nothing() {
        let table = MsixTable::new(1);
        assert!(table.write_table(16, &[0; 16], false).is_empty());
        assert!(table.write_table(u64::MAX - 3, &[0; 16], false).is_empty());
        let mut data = [1; 16];
        table.read_table(u64::MAX - 15, &mut data);
        assert_eq!(data, [0; 16]);
        table.read_pending(u64::MAX - 15, &mut data);
        assert_eq!(data, [0; 16]);
    }
}
