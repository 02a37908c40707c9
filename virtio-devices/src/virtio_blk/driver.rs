//! The other side of the rings: a virtio-blk driver in this process, for tests and benchmarks.
//!
//! It lays out a split queue, request headers and status bytes in guest memory and drives the device
//! as a guest would. Descriptors of a slot are linked once, so a request costs a header, a data
//! descriptor, an entry of the available ring, and nothing is allocated.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use virtio_bindings::bindings::{
    virtio_blk as spec,
    virtio_ring::{
        VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
        VRING_USED_F_NO_NOTIFY,
    },
};
use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{GuestAddress, GuestMemory};

use crate::{Error, Result, memory::GuestArea};

/// How a [`Driver`] sets up its queue.
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    /// Entries of the rings: a power of two.
    pub queue_size: u16,
    /// Whether `EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Put each chain into an indirect table: one descriptor of the queue a request.
    pub indirect: bool,
    /// The most data segments of a request.
    pub max_segments: u16,
    /// The most ranges of a discard or write zeroes request.
    pub max_ranges: u16,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            queue_size: 256,
            event_idx: true,
            indirect: false,
            max_segments: 1,
            max_ranges: 1,
        }
    }
}

impl DriverConfig {
    /// Descriptors of the longest chain.
    fn chain(&self) -> usize {
        usize::from(self.max_segments.max(1)) + 2
    }

    /// Requests that can be in flight.
    #[must_use]
    pub fn slots(&self) -> usize {
        let size = usize::from(self.queue_size);
        if self.indirect {
            size
        } else {
            size / self.chain()
        }
    }

    fn layout(&self) -> Layout {
        let size = usize::from(self.queue_size);
        let avail = 16 * size;
        let used = (avail + 6 + 2 * size).next_multiple_of(64);
        let slots = (used + 6 + 8 * size).next_multiple_of(64);
        let ranges = 32;
        let table = ranges + 16 * usize::from(self.max_ranges.max(1));
        let stride = if self.indirect {
            table + 16 * self.chain()
        } else {
            table
        }
        .next_multiple_of(64);
        Layout {
            avail,
            used,
            slots,
            stride,
            table,
            bytes: slots + stride * self.slots(),
        }
    }

    /// Bytes of guest memory that a driver takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layout().bytes
    }
}

/// Offsets from the start of the driver's memory. In a slot: 16 bytes of header, the status byte,
/// ranges from byte 32, the indirect table behind them.
#[derive(Clone, Copy, Debug)]
struct Layout {
    avail: usize,
    used: usize,
    slots: usize,
    stride: usize,
    table: usize,
    bytes: usize,
}

const STATUS: usize = 16;
const RANGES: usize = 32;
/// What a status byte holds until the device writes it.
const NO_STATUS: u8 = 0xff;

/// A range of a discard, secure erase or write zeroes request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    /// The first sector.
    pub sector: u64,
    /// The number of sectors.
    pub sectors: u32,
    /// Flag bits; bit 0 is unmap.
    pub flags: u32,
}

/// A request that the device has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Driver::request`] returned.
    pub slot: u16,
    /// The status byte; 0xff when the device did not write it.
    pub status: u8,
    /// The length in the used ring.
    pub len: u32,
}

/// A driver of one queue.
pub struct Driver {
    config: DriverConfig,
    layout: Layout,
    base: u64,
    area: GuestArea,
    free: Vec<u16>,
    /// The available index: entries added, and the part of them the device was told.
    avail: u16,
    published: u16,
    /// The next entry of the used ring to look at.
    used: u16,
}

impl Driver {
    /// A driver whose rings and headers start at `base`, in [`DriverConfig::bytes`] bytes.
    ///
    /// # Errors
    /// [`Error::Config`] when the memory is not there or in two pieces, or a value is out of range.
    pub fn new<M>(memory: &Arc<M>, base: GuestAddress, config: DriverConfig) -> Result<Self>
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        if !config.queue_size.is_power_of_two() || config.slots() == 0 || !base.0.is_multiple_of(64)
        {
            return Err(Error::Config(
                "a driver needs a queue of a power of two that holds a chain, at a multiple of 64"
                    .to_owned(),
            ));
        }
        let layout = config.layout();
        let area = GuestArea::new(memory, base, layout.bytes).ok_or_else(|| {
            Error::Config(format!(
                "the driver's {} bytes at {:#x} are not in one piece of guest memory",
                layout.bytes, base.0
            ))
        })?;
        for offset in 0..layout.bytes {
            area.put(offset, 0u8);
        }
        let driver = Self {
            config,
            layout,
            base: base.0,
            area,
            free: (0..config.slots() as u16).rev().collect(),
            avail: 0,
            published: 0,
            used: 0,
        };
        for slot in 0..config.slots() as u16 {
            driver.link(slot);
        }
        Ok(driver)
    }

    /// Starts both indices at `index`, as if the queue had been used before. To be called before
    /// the first request and before [`queue`](Self::queue).
    pub fn start_at(&mut self, index: u16) {
        self.avail = index;
        self.published = index;
        self.used = index;
        self.area
            .store(self.layout.avail + 2, index, Ordering::Relaxed);
        self.area
            .store(self.layout.used + 2, index, Ordering::Relaxed);
    }

    /// The queue as a transport would hand it to the device.
    #[must_use]
    pub fn queue(&self) -> Queue {
        let at = |offset: usize| self.base + offset as u64;
        let mut queue = Queue::default();
        if let Ok(mut made) = Queue::new(self.config.queue_size) {
            let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
            let (low, high) = halves(at(0));
            made.set_desc_table_address(low, high);
            let (low, high) = halves(at(self.layout.avail));
            made.set_avail_ring_address(low, high);
            let (low, high) = halves(at(self.layout.used));
            made.set_used_ring_address(low, high);
            made.set_size(self.config.queue_size);
            made.set_event_idx(self.config.event_idx);
            made.set_next_avail(self.used);
            made.set_next_used(self.used);
            made.set_ready(true);
            queue = made;
        }
        queue
    }

    /// Requests that can still be added.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Guest address of the descriptor table.
    #[must_use]
    pub fn desc_table(&self) -> GuestAddress {
        GuestAddress(self.base)
    }

    /// Guest address of the available ring.
    #[must_use]
    pub fn avail_ring(&self) -> GuestAddress {
        GuestAddress(self.base + self.layout.avail as u64)
    }

    /// Guest address of the used ring.
    #[must_use]
    pub fn used_ring(&self) -> GuestAddress {
        GuestAddress(self.base + self.layout.used as u64)
    }

    /// Adds a read of `data` from `sector`; `None` when every slot is in flight.
    pub fn read(&mut self, sector: u64, data: &[(GuestAddress, u32)]) -> Option<u16> {
        self.request(spec::VIRTIO_BLK_T_IN, sector, data, true)
    }

    /// Adds a write of `data` to `sector`; `None` when every slot is in flight.
    pub fn write(&mut self, sector: u64, data: &[(GuestAddress, u32)]) -> Option<u16> {
        self.request(spec::VIRTIO_BLK_T_OUT, sector, data, false)
    }

    /// Adds a flush; `None` when every slot is in flight.
    pub fn flush(&mut self) -> Option<u16> {
        self.request(spec::VIRTIO_BLK_T_FLUSH, 0, &[], false)
    }

    /// Adds a request for the disk's ID; `None` when every slot is in flight.
    pub fn get_id(&mut self, data: &[(GuestAddress, u32)]) -> Option<u16> {
        self.request(spec::VIRTIO_BLK_T_GET_ID, 0, data, true)
    }

    /// Adds a discard; `None` when every slot is in flight.
    pub fn discard(&mut self, ranges: &[Range]) -> Option<u16> {
        self.ranges(spec::VIRTIO_BLK_T_DISCARD, ranges)
    }

    /// Adds a write zeroes; `None` when every slot is in flight.
    pub fn write_zeroes(&mut self, ranges: &[Range]) -> Option<u16> {
        self.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, ranges)
    }

    /// Adds a request of ranges of any type; `None` when every slot is in flight or there are more
    /// ranges than configured.
    pub fn ranges(&mut self, kind: u32, ranges: &[Range]) -> Option<u16> {
        if ranges.len() > usize::from(self.config.max_ranges.max(1)) {
            return None;
        }
        let slot = *self.free.last()?;
        let at = self.slot(slot) + RANGES;
        for (index, range) in ranges.iter().enumerate() {
            self.area.put(at + 16 * index, range.sector.to_le());
            self.area.put(at + 16 * index + 8, range.sectors.to_le());
            self.area.put(at + 16 * index + 12, range.flags.to_le());
        }
        let data = (
            GuestAddress(self.base + at as u64),
            16 * ranges.len() as u32,
        );
        self.request(kind, 0, &[data], false)
    }

    /// Adds a request of any type; `writable` says whether the device writes `data`. `None` when
    /// every slot is in flight or there are more segments than configured.
    pub fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[(GuestAddress, u32)],
        writable: bool,
    ) -> Option<u16> {
        if data.len() + 2 > self.config.chain() {
            return None;
        }
        let slot = self.free.pop()?;
        let at = self.slot(slot);
        self.area.put(at, kind.to_le());
        self.area.put(at + 8, sector.to_le());
        self.area.put(at + STATUS, NO_STATUS);
        let flags = VRING_DESC_F_NEXT | if writable { VRING_DESC_F_WRITE } else { 0 };
        let (table, first) = self.chain(slot);
        let last = first as usize + self.config.chain() - 1;
        for (index, (address, len)) in data.iter().enumerate() {
            // The last segment leads to the status, which is the last descriptor of the slot.
            let this = first as usize + 1 + index;
            let next = if index + 1 == data.len() {
                last
            } else {
                this + 1
            };
            self.area.put(
                table + 16 * this,
                Descriptor::new(address.0, *len, flags as u16, next as u16),
            );
        }
        let next = if data.is_empty() {
            last
        } else {
            first as usize + 1
        };
        self.area
            .put(table + 16 * first as usize + 14, (next as u16).to_le());
        self.post(self.head(slot));
        Some(slot)
    }

    /// Adds a head to the available ring, whatever it is.
    pub fn post(&mut self, head: u16) {
        let entry = usize::from(self.avail & (self.config.queue_size - 1));
        self.area
            .put(self.layout.avail + 4 + 2 * entry, head.to_le());
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device everything added; returns whether it wants a doorbell.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.avail);
        if old == new {
            return false;
        }
        self.area
            .store(self.layout.avail + 2, new, Ordering::Release);
        self.published = new;
        fence(Ordering::SeqCst);
        if self.config.event_idx {
            let at = self.layout.used + 4 + 8 * usize::from(self.config.queue_size);
            let event = self.area.load(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self.area.load(self.layout.used, Ordering::Relaxed);
            u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Calls `each` for every request that ended since the last time; returns their number.
    ///
    /// # Panics
    /// When the device returns a head that is no slot's.
    pub fn poll(&mut self, mut each: impl FnMut(Used)) -> usize {
        let index = self.area.load(self.layout.used + 2, Ordering::Acquire);
        let mut count = 0;
        while self.used != index {
            let entry = usize::from(self.used & (self.config.queue_size - 1));
            let element = u64::from_le(self.area.get(self.layout.used + 4 + 8 * entry));
            let head = element as u32;
            let slot = if self.config.indirect {
                head
            } else {
                head / self.config.chain() as u32
            };
            assert!(
                head <= u32::from(u16::MAX) && self.head(slot as u16) == head as u16,
                "the device returned head {head}, which was never posted"
            );
            let slot = slot as u16;
            each(Used {
                slot,
                status: self.area.get(self.slot(slot) + STATUS),
                len: (element >> 32) as u32,
            });
            self.free.push(slot);
            self.used = self.used.wrapping_add(1);
            count += 1;
        }
        count
    }

    /// Requests posted and not yet seen by [`poll`](Self::poll).
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.config.slots() - self.free.len()
    }

    /// Asks for an interrupt with the next used element, then looks again: whether there is one
    /// already.
    pub fn arm_interrupt(&mut self) -> bool {
        self.arm_interrupt_after(0)
    }

    /// Asks for an interrupt when `more` elements beyond the next one have been used (with event
    /// indices; without, with the next one).
    pub fn arm_interrupt_after(&mut self, more: u16) -> bool {
        if self.config.event_idx {
            let at = self.layout.avail + 4 + 2 * usize::from(self.config.queue_size);
            self.area
                .store(at, self.used.wrapping_add(more), Ordering::Relaxed);
        } else {
            self.area.store(self.layout.avail, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.area.load(self.layout.used + 2, Ordering::Acquire) != self.used
    }

    /// Asks for no interrupts. With event indices this is a hint for one round of the ring.
    pub fn disarm_interrupt(&mut self) {
        if self.config.event_idx {
            let at = self.layout.avail + 4 + 2 * usize::from(self.config.queue_size);
            self.area
                .store(at, self.used.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.area.store(
                self.layout.avail,
                VRING_AVAIL_F_NO_INTERRUPT as u16,
                Ordering::Relaxed,
            );
        }
    }

    /// The offset of a slot's header.
    fn slot(&self, slot: u16) -> usize {
        self.layout.slots + self.layout.stride * usize::from(slot)
    }

    /// The head of a slot's chain in the descriptor table.
    fn head(&self, slot: u16) -> u16 {
        if self.config.indirect {
            slot
        } else {
            (usize::from(slot) * self.config.chain()) as u16
        }
    }

    /// Where a slot's chain is: the offset of its table and the index of its first descriptor.
    fn chain(&self, slot: u16) -> (usize, u16) {
        if self.config.indirect {
            (self.slot(slot) + self.layout.table, 0)
        } else {
            (0, self.head(slot))
        }
    }

    /// Writes what never changes of a slot's chain.
    fn link(&self, slot: u16) {
        let address = |offset: usize| self.base + offset as u64;
        let (table, first) = self.chain(slot);
        let header = self.slot(slot);
        let length = self.config.chain();
        let last = usize::from(first) + length - 1;
        self.area.put(
            table + 16 * usize::from(first),
            Descriptor::new(address(header), 16, VRING_DESC_F_NEXT as u16, first + 1),
        );
        self.area.put(
            table + 16 * last,
            Descriptor::new(address(header + STATUS), 1, VRING_DESC_F_WRITE as u16, 0),
        );
        if self.config.indirect {
            self.area.put(
                16 * usize::from(slot),
                Descriptor::new(
                    address(table),
                    16 * length as u32,
                    VRING_DESC_F_INDIRECT as u16,
                    0,
                ),
            );
        }
    }
}
