//! The device side of a split ring.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory, VolatileSlice,
    bitmap::{BS, BitmapSlice},
};

use super::{QueueFault, QueueSnapshot};
use crate::memory::Window;

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR: usize = 16;
/// Flags and index before the entries of either ring.
const RING_HEADER: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// The event index behind the entries of either ring.
const EVENT: usize = 2;
/// The offset of the index in either ring.
const INDEX: usize = 2;

/// What the driver was last told about doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doorbell {
    /// Whatever an earlier owner of the ring left there.
    Unknown,
    /// Not wanted (flag mode).
    Off,
    /// Wanted always (flag mode).
    On,
    /// Wanted for this entry of the available ring (event index mode).
    At(u16),
}

/// Where the rings are and how far the device has got.
#[derive(Clone, Debug)]
pub(crate) struct SplitRing {
    snapshot: QueueSnapshot,
    mask: u16,
    doorbell: Doorbell,
}

impl SplitRing {
    /// The rings as `queue` has them; `event_idx` when the driver accepted that feature, whether or
    /// not the transport told the queue.
    pub(crate) fn new(queue: &Queue, event_idx: bool) -> Result<Self, QueueFault> {
        let size = queue.size();
        if !queue.ready() || size == 0 || !size.is_power_of_two() || size > 1 << 15 {
            return Err(QueueFault::NotReady);
        }
        let mut snapshot = QueueSnapshot::of(queue);
        snapshot.event_idx |= event_idx;
        Ok(Self {
            snapshot,
            mask: size - 1,
            doorbell: Doorbell::Unknown,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.snapshot.size
    }

    pub(crate) fn snapshot(&self) -> &QueueSnapshot {
        &self.snapshot
    }

    /// Where a window on all rings best starts.
    pub(crate) fn lowest_address(&self) -> u64 {
        let rings = &self.snapshot;
        rings.desc_table.min(rings.avail_ring).min(rings.used_ring)
    }

    /// Takes the entry that was just read.
    pub(crate) fn advance(&mut self) {
        self.snapshot.next_avail = self.snapshot.next_avail.wrapping_add(1);
    }

    /// The rings as host memory.
    pub(crate) fn view<'m, M: GuestMemory>(
        &self,
        window: &mut Window<'m, M>,
    ) -> Result<RingView<'m, BS<'m, M::Bitmap>>, QueueFault> {
        let size = usize::from(self.snapshot.size);
        let mut ring = |address: u64, len: usize, access| {
            window
                .get(GuestAddress(address), len, access)
                .ok_or(QueueFault::RingOutsideMemory { address })
        };
        Ok(RingView {
            desc: ring(
                self.snapshot.desc_table,
                DESCRIPTOR * size,
                Permissions::Read,
            )?,
            avail: ring(
                self.snapshot.avail_ring,
                RING_HEADER + AVAIL_ENTRY * size + EVENT,
                Permissions::Read,
            )?,
            used: ring(
                self.snapshot.used_ring,
                RING_HEADER + USED_ENTRY * size + EVENT,
                Permissions::ReadWrite,
            )?,
            mask: self.mask,
        })
    }

    /// How many entries of the available ring have not been taken.
    pub(crate) fn available<B: BitmapSlice>(
        &self,
        view: &RingView<'_, B>,
    ) -> Result<u16, QueueFault> {
        let index = self.load(&view.avail, INDEX, Ordering::Acquire)?;
        let count = index.wrapping_sub(self.snapshot.next_avail);
        if count > self.snapshot.size {
            return Err(QueueFault::AvailableIndex {
                index,
                next: self.snapshot.next_avail,
            });
        }
        Ok(count)
    }

    /// The head in the next entry of the available ring.
    pub(crate) fn head<B: BitmapSlice>(&self, view: &RingView<'_, B>) -> Result<u16, QueueFault> {
        let entry = usize::from(self.snapshot.next_avail & self.mask);
        let head = self.load(
            &view.avail,
            RING_HEADER + AVAIL_ENTRY * entry,
            Ordering::Relaxed,
        )?;
        if head >= self.snapshot.size {
            return Err(QueueFault::HeadOutOfRange { head });
        }
        Ok(head)
    }

    /// Tells the driver that doorbells are not needed for now.
    pub(crate) fn quiet<B: BitmapSlice>(
        &mut self,
        view: &RingView<'_, B>,
    ) -> Result<(), QueueFault> {
        // With event indices the driver rings once for the entry it was told, so it is quiet as is.
        if !self.snapshot.event_idx && self.doorbell != Doorbell::Off {
            self.store(
                &view.used,
                0,
                VRING_USED_F_NO_NOTIFY as u16,
                Ordering::Relaxed,
            )?;
            self.doorbell = Doorbell::Off;
        }
        Ok(())
    }

    /// Asks for a doorbell, then looks again: whether there is something to take already.
    pub(crate) fn rearm<B: BitmapSlice>(
        &mut self,
        view: &RingView<'_, B>,
    ) -> Result<bool, QueueFault> {
        let wanted = if self.snapshot.event_idx {
            Doorbell::At(self.snapshot.next_avail)
        } else {
            Doorbell::On
        };
        // What was told before, and fenced then, needs no second telling: a driver that posts
        // after our last look sees it.
        if self.doorbell != wanted {
            if self.snapshot.event_idx {
                let at = RING_HEADER + USED_ENTRY * usize::from(self.snapshot.size);
                self.store(&view.used, at, self.snapshot.next_avail, Ordering::Relaxed)?;
            } else {
                self.store(&view.used, 0, 0, Ordering::Relaxed)?;
            }
            self.doorbell = wanted;
            fence(Ordering::SeqCst);
        }
        Ok(self.available(view)? > 0)
    }

    /// Writes the used element `ahead` entries behind the last published one.
    pub(crate) fn write_used<B: BitmapSlice>(
        &self,
        view: &RingView<'_, B>,
        ahead: u16,
        head: u16,
        len: u32,
    ) -> Result<(), QueueFault> {
        let entry = usize::from(self.snapshot.next_used.wrapping_add(ahead) & self.mask);
        let element = u64::from(head) | u64::from(len) << 32;
        view.used
            .get_ref::<u64>(RING_HEADER + USED_ENTRY * entry)
            .map(|slot| slot.store(element.to_le()))
            .map_err(|_| self.used_fault())
    }

    /// Shows the driver `count` used elements with one store of the index.
    pub(crate) fn publish<B: BitmapSlice>(
        &mut self,
        view: &RingView<'_, B>,
        count: u16,
    ) -> Result<(), QueueFault> {
        self.snapshot.next_used = self.snapshot.next_used.wrapping_add(count);
        self.store(
            &view.used,
            INDEX,
            self.snapshot.next_used,
            Ordering::Release,
        )
    }

    /// Whether the driver wants an interrupt for the `count` elements published last.
    pub(crate) fn wants_interrupt<B: BitmapSlice>(
        &self,
        view: &RingView<'_, B>,
        count: u16,
    ) -> Result<bool, QueueFault> {
        // The index must be visible before we read what the driver wants: it writes that, then
        // looks at the index.
        fence(Ordering::SeqCst);
        if self.snapshot.event_idx {
            let at = RING_HEADER + AVAIL_ENTRY * usize::from(self.snapshot.size);
            let event = self.load(&view.avail, at, Ordering::Relaxed)?;
            let new = self.snapshot.next_used;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < count)
        } else {
            let flags = self.load(&view.avail, 0, Ordering::Relaxed)?;
            Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    fn load<B: BitmapSlice>(
        &self,
        ring: &VolatileSlice<'_, B>,
        offset: usize,
        order: Ordering,
    ) -> Result<u16, QueueFault> {
        ring.load::<u16>(offset, order)
            .map(u16::from_le)
            .map_err(|_| QueueFault::RingOutsideMemory {
                address: self.snapshot.avail_ring,
            })
    }

    fn store<B: BitmapSlice>(
        &self,
        ring: &VolatileSlice<'_, B>,
        offset: usize,
        value: u16,
        order: Ordering,
    ) -> Result<(), QueueFault> {
        ring.store(value.to_le(), offset, order)
            .map_err(|_| self.used_fault())
    }

    fn used_fault(&self) -> QueueFault {
        QueueFault::RingOutsideMemory {
            address: self.snapshot.used_ring,
        }
    }
}

/// The rings as host memory, for one batch.
pub(crate) struct RingView<'m, B> {
    desc: VolatileSlice<'m, B>,
    avail: VolatileSlice<'m, B>,
    used: VolatileSlice<'m, B>,
    mask: u16,
}

impl<B: BitmapSlice> RingView<'_, B> {
    /// A copy of a descriptor; `None` for an index outside the table.
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index > self.mask {
            return None;
        }
        self.desc
            .get_ref::<Descriptor>(DESCRIPTOR * usize::from(index))
            .ok()
            .map(|slot| slot.load())
    }
}
