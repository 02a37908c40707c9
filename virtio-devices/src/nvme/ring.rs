//! The two rings of a queue pair in guest memory, from the controller's side.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory};

use super::command::{CQE, Command, SQE};
use crate::memory::Window;

/// A ring left guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutsideMemory;

/// The controller's side of a submission queue.
#[derive(Clone, Debug)]
pub(super) struct SubmissionRing {
    base: u64,
    size: u32,
    head: u32,
}

impl SubmissionRing {
    pub(super) fn new(base: u64, size: u32, head: u32) -> Self {
        Self { base, size, head }
    }

    pub(super) fn head(&self) -> u32 {
        self.head
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// The command `cid` among the entries up to `tail` that were not taken, and its place. Entries at
    /// the places in `gone` do not count.
    pub(super) fn find<M: GuestMemory>(
        &self,
        cid: u16,
        tail: u32,
        gone: &[u32],
        window: &mut Window<'_, M>,
    ) -> Option<(u32, Command)> {
        let mut place = self.head;
        while place != tail {
            if !gone.contains(&place) {
                let command = self.read(place, window).ok()?;
                if command.cid == cid {
                    return Some((place, command));
                }
            }
            place = (place + 1) % self.size;
        }
        None
    }

    /// Copies the entry at the head and steps over it.
    #[inline]
    pub(super) fn fetch<M: GuestMemory>(
        &mut self,
        window: &mut Window<'_, M>,
    ) -> Result<Command, OutsideMemory> {
        let command = self.read(self.head, window)?;
        self.skip();
        Ok(command)
    }

    /// Steps over the entry at the head.
    pub(super) fn skip(&mut self) {
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
        }
    }

    fn read<M: GuestMemory>(
        &self,
        place: u32,
        window: &mut Window<'_, M>,
    ) -> Result<Command, OutsideMemory> {
        let at = self
            .base
            .checked_add(u64::from(place) * SQE)
            .map(GuestAddress)
            .ok_or(OutsideMemory)?;
        let mut entry = [0_u64; SQE as usize / 8];
        match window.get(at, SQE as usize, Permissions::Read) {
            Some(slice) => {
                slice.copy_to(&mut entry[..]);
            }
            None => {
                entry = window.memory().read_obj(at).map_err(|_| OutsideMemory)?;
            }
        }
        Ok(Command::parse(entry))
    }
}

/// The controller's side of a completion queue.
#[derive(Clone, Debug)]
pub(super) struct CompletionRing {
    base: u64,
    size: u32,
    tail: u32,
    phase: bool,
}

impl CompletionRing {
    pub(super) fn new(base: u64, size: u32, tail: u32, phase: bool) -> Self {
        Self {
            base,
            size,
            tail,
            phase,
        }
    }

    pub(super) fn tail(&self) -> u32 {
        self.tail
    }

    pub(super) fn phase(&self) -> bool {
        self.phase
    }

    /// Entries that can be posted while the host has taken everything up to `head`.
    pub(super) fn free(&self, head: u32) -> u32 {
        let used = if self.tail >= head {
            self.tail - head
        } else {
            self.tail + self.size - head
        };
        (self.size - 1).saturating_sub(used)
    }

    /// Writes an entry: the half with the phase bit last, in one store, so that the host sees it
    /// whole or not at all.
    #[inline]
    pub(super) fn post<M: GuestMemory>(
        &mut self,
        window: &mut Window<'_, M>,
        dw0: u32,
        sq_head: u32,
        sq_id: u16,
        cid: u16,
        status: u16,
    ) -> Result<(), OutsideMemory> {
        let at = self
            .base
            .checked_add(u64::from(self.tail) * CQE)
            .map(GuestAddress)
            .ok_or(OutsideMemory)?;
        let field = status << 1 | u16::from(self.phase);
        let low = u64::from(dw0);
        let high = u64::from(sq_head as u16)
            | u64::from(sq_id) << 16
            | u64::from(cid) << 32
            | u64::from(field) << 48;
        let direct = window
            .get(at, CQE as usize, Permissions::Write)
            .and_then(|slice| {
                let low_at = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
                let high_at = slice.get_atomic_ref::<AtomicU64>(8).ok()?;
                low_at.store(low.to_le(), Ordering::Relaxed);
                high_at.store(high.to_le(), Ordering::Release);
                vm_memory::bitmap::Bitmap::mark_dirty(slice.bitmap(), 0, CQE as usize);
                Some(())
            });
        if direct.is_none() {
            let memory = window.memory();
            memory
                .write_slice(&low.to_le_bytes(), at)
                .and_then(|()| memory.write_slice(&high.to_le_bytes(), GuestAddress(at.0 + 8)))
                .map_err(|_| OutsideMemory)?;
        }
        self.tail += 1;
        if self.tail == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_full_one_entry_before_its_size() {
        let ring = CompletionRing::new(0, 4, 0, true);
        assert_eq!(ring.free(0), 3);
        assert_eq!(ring.free(3), 2);
        let ring = CompletionRing::new(0, 4, 3, true);
        assert_eq!(ring.free(0), 0);
        assert_eq!(ring.free(3), 3);
        assert_eq!(ring.free(2), 2);
    }
}
