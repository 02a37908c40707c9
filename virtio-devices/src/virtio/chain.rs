//! Descriptor chains: each descriptor is copied once, and the copy is what is checked and used.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory, bitmap::BitmapSlice,
};

use super::{
    QueueFault,
    ring::{DESCRIPTOR, RingView},
};
use crate::memory::{Segment, Window};

/// One descriptor chain, copied. Reused from request to request.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u64,
    writable_len: u64,
    ordered: bool,
}

impl Chain {
    /// What the device may read, in order.
    pub(crate) fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// What the device may write, in order.
    pub(crate) fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    pub(crate) fn readable_len(&self) -> u64 {
        self.readable_len
    }

    pub(crate) fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Whether everything readable came before everything writable, as it must. If not,
    /// [`writable`](Self::writable) holds only what came last.
    pub(crate) fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// Copies the chain at `head`. An indirect table may hold `indirect_limit` descriptors.
    pub(crate) fn read<M: GuestMemory, B: BitmapSlice>(
        &mut self,
        view: &RingView<'_, B>,
        window: &mut Window<'_, M>,
        head: u16,
        size: u16,
        indirect_limit: usize,
    ) -> Result<(), QueueFault> {
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        self.ordered = true;
        let broken = QueueFault::BrokenChain { head };
        let mut index = head;
        for _ in 0..size {
            let descriptor = view.descriptor(index).ok_or(broken)?;
            if descriptor.refers_to_indirect_table() {
                // The specification forbids a continued indirect descriptor; its write flag means
                // nothing.
                if descriptor.has_next() {
                    return Err(QueueFault::BrokenIndirect { head });
                }
                return self.read_indirect(window, head, descriptor, indirect_limit);
            }
            self.push(&descriptor);
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(broken)
    }

    fn read_indirect<M: GuestMemory>(
        &mut self,
        window: &mut Window<'_, M>,
        head: u16,
        table: Descriptor,
        limit: usize,
    ) -> Result<(), QueueFault> {
        let broken = QueueFault::BrokenIndirect { head };
        let bytes = table.len() as usize;
        let entries = bytes / DESCRIPTOR;
        if entries == 0 || !bytes.is_multiple_of(DESCRIPTOR) || entries > limit {
            return Err(broken);
        }
        // Almost always one piece of host memory; a table across two regions is read in pieces.
        let slice = window.get(table.addr(), bytes, Permissions::Read);
        let read = |index: usize| -> Option<Descriptor> {
            let offset = DESCRIPTOR * index;
            match &slice {
                Some(slice) => slice.get_ref(offset).ok().map(|slot| slot.load()),
                None => {
                    let address = table.addr().0.checked_add(offset as u64)?;
                    window.memory().read_obj(GuestAddress(address)).ok()
                }
            }
        };
        let mut index = 0;
        for _ in 0..entries {
            let descriptor = read(index).ok_or(broken)?;
            if descriptor.refers_to_indirect_table() {
                return Err(broken);
            }
            self.push(&descriptor);
            if !descriptor.has_next() {
                return Ok(());
            }
            index = usize::from(descriptor.next());
            if index >= entries {
                return Err(broken);
            }
        }
        Err(broken)
    }

    fn push(&mut self, descriptor: &Descriptor) {
        let len = descriptor.len();
        if len == 0 {
            return;
        }
        if descriptor.is_write_only() {
            self.writable_len += u64::from(len);
        } else {
            if self.writable_len > 0 {
                // Only what follows can still hold the status byte.
                self.ordered = false;
                self.writable_len = 0;
            }
            self.readable_len += u64::from(len);
            self.readable = self.segments.len() + 1;
        }
        self.segments.push(Segment {
            address: descriptor.addr(),
            len,
        });
    }
}
