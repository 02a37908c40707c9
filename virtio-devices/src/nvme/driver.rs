//! The guest's side of a controller, for tests and benchmarks: entries and rings in guest memory.

use std::sync::{Arc, atomic::Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::{
    NvmeController, Status,
    command::{CQE, SQE},
    registers::DOORBELLS,
};
use crate::memory::GuestArea;

/// A submission queue entry, as quadwords.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(pub [u64; 8]);

impl Entry {
    /// An entry of that opcode.
    #[must_use]
    pub fn new(opcode: u8) -> Self {
        Self([u64::from(opcode), 0, 0, 0, 0, 0, 0, 0])
    }

    /// Sets the command identifier.
    #[must_use]
    pub fn cid(mut self, cid: u16) -> Self {
        self.0[0] = self.0[0] & !0xffff_0000 | u64::from(cid) << 16;
        self
    }

    /// Sets FUSE and PSDT.
    #[must_use]
    pub fn flags(mut self, flags: u8) -> Self {
        self.0[0] = self.0[0] & !0xff00 | u64::from(flags) << 8;
        self
    }

    /// Sets the namespace.
    #[must_use]
    pub fn nsid(mut self, nsid: u32) -> Self {
        self.0[0] = self.0[0] & 0xffff_ffff | u64::from(nsid) << 32;
        self
    }

    /// Sets the data pointer: two PRPs, or one SGL descriptor.
    #[must_use]
    pub fn data(mut self, first: u64, second: u64) -> Self {
        self.0[3] = first;
        self.0[4] = second;
        self
    }

    /// Sets a command dword, 10 to 15.
    ///
    /// # Panics
    /// For another one.
    #[must_use]
    pub fn cdw(mut self, dword: usize, value: u32) -> Self {
        assert!((10..16).contains(&dword), "dword {dword}");
        let place = &mut self.0[dword / 2];
        let shift = 32 * (dword % 2);
        *place = *place & !(0xffff_ffff << shift) | u64::from(value) << shift;
        self
    }

    /// Sets the blocks of a read, write and their like; `count` is not 0.
    #[must_use]
    pub fn blocks(self, slba: u64, count: u32) -> Self {
        self.cdw(10, slba as u32)
            .cdw(11, (slba >> 32) as u32)
            .cdw(12, count.wrapping_sub(1))
    }
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The command.
    pub cid: u16,
    /// How it went.
    pub status: Status,
    /// Dword 0.
    pub dw0: u32,
    /// How far the controller has taken entries.
    pub sq_head: u16,
    /// The submission queue.
    pub sq: u16,
}

/// A queue pair in guest memory. Where there is none, nothing is written and nothing found.
pub struct QueuePair {
    entries: Option<GuestArea>,
    completions: Option<GuestArea>,
    /// Number of both queues.
    pub id: u16,
    /// Guest address of the submission queue.
    pub sq: u64,
    /// Guest address of the completion queue.
    pub cq: u64,
    /// Entries of both.
    pub size: u16,
    tail: u16,
    head: u16,
    phase: bool,
}

impl QueuePair {
    /// A pair of `size` entries at two addresses.
    #[must_use]
    pub fn new<M>(memory: &Arc<M>, id: u16, sq: u64, cq: u64, size: u16) -> Self
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        let zeroes = vec![0; usize::from(size) * CQE as usize];
        // Outside memory nothing is written; the controller says what it thinks of that.
        let _ = memory.write_slice(&zeroes, GuestAddress(cq));
        Self {
            entries: area(memory, sq, size, SQE),
            completions: area(memory, cq, size, CQE),
            id,
            sq,
            cq,
            size,
            tail: 0,
            head: 0,
            phase: true,
        }
    }

    /// The same pair, as far as it has got, in other memory with the same content.
    #[must_use]
    pub fn moved<M>(&self, memory: &Arc<M>) -> Self
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        Self {
            entries: area(memory, self.sq, self.size, SQE),
            completions: area(memory, self.cq, self.size, CQE),
            ..*self
        }
    }

    /// Where the next entry goes.
    #[must_use]
    pub fn tail(&self) -> u16 {
        self.tail
    }

    /// Where the next completion is expected.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Writes an entry; [`ring`](Self::ring) shows it.
    pub fn push(&mut self, entry: &Entry) {
        if let Some(entries) = &self.entries {
            let at = SQE as usize * usize::from(self.tail);
            match entries.slice().subslice(at, SQE as usize) {
                Ok(place) => place.copy_from(&entry.0),
                Err(error) => debug_assert!(false, "{error}"),
            }
        }
        self.tail = (self.tail + 1) % self.size;
    }

    /// Writes the tail doorbell.
    pub fn ring(&self, controller: &NvmeController) {
        let offset = DOORBELLS + 8 * u64::from(self.id);
        controller.write(offset, &u32::from(self.tail).to_le_bytes());
    }

    /// Takes completions without telling the controller; returns how many.
    pub fn poll(&mut self, mut take: impl FnMut(Completed)) -> usize {
        let mut count = 0;
        while let Some(completed) = self.next() {
            take(completed);
            count += 1;
        }
        count
    }

    /// Takes one completion.
    #[expect(
        clippy::should_implement_trait,
        reason = "it is no iterator: more may come"
    )]
    pub fn next(&mut self) -> Option<Completed> {
        let completed = self.look()?;
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(completed)
    }

    /// The entry at the head, if it is new.
    fn look(&self) -> Option<Completed> {
        let completions = self.completions.as_ref()?.slice();
        let at = CQE as usize * usize::from(self.head);
        let last: u32 = completions.load(at + 12, Ordering::Acquire).ok()?;
        let last = u32::from_le(last);
        if (last >> 16 & 1 == 1) != self.phase {
            return None;
        }
        let dword = |dword: usize| {
            let value: Option<u32> = completions.load(at + 4 * dword, Ordering::Relaxed).ok();
            value.map(u32::from_le)
        };
        let (dw0, dw2) = (dword(0)?, dword(2)?);
        Some(Completed {
            cid: last as u16,
            // Without the bit that says that the error log has more.
            status: Status((last >> 17) as u16 & !(1 << 13)),
            dw0,
            sq_head: dw2 as u16,
            sq: (dw2 >> 16) as u16,
        })
    }

    /// Writes the head doorbell.
    pub fn release(&self, controller: &NvmeController) {
        let offset = DOORBELLS + 8 * u64::from(self.id) + 4;
        controller.write(offset, &u32::from(self.head).to_le_bytes());
    }
}

/// The memory of `size` entries of so many bytes.
fn area<M>(memory: &Arc<M>, base: u64, size: u16, entry: u64) -> Option<GuestArea>
where
    M: GuestMemory + Send + Sync + 'static,
{
    let bytes = usize::from(size) * entry as usize;
    GuestArea::new(memory, GuestAddress(base), bytes)
}
