//! A guest's seat: a device over a mock disk, driven through rings in guest memory.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;

use virtio_devices::{
    Interrupt,
    testing::{CountingInterrupt, MockDisk, MockDiskConfig},
    virtio_blk::{
        BlkWorker, VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig, Used},
    },
    worker::Progress,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

/// Data for tests starts here; rings are below.
pub const DATA: u64 = 0x10_0000;
pub const MEMORY: usize = 0x40_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub struct Setup {
    pub disk: MockDiskConfig,
    pub device: VirtioBlkConfig,
    pub driver: DriverConfig,
    /// Features the driver does not accept.
    pub refuse: u64,
    pub start: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            disk: MockDiskConfig::default(),
            device: VirtioBlkConfig {
                queue_size: 64,
                serial: "platter-0".to_owned(),
                ..VirtioBlkConfig::default()
            },
            driver: DriverConfig {
                queue_size: 64,
                max_segments: 4,
                max_ranges: 8,
                ..DriverConfig::default()
            },
            refuse: 0,
            start: 0,
        }
    }
}

pub struct Guest {
    pub disk: MockDisk,
    pub device: Arc<VirtioBlk>,
    pub memory: Arc<Memory>,
    pub driver: Driver,
    pub worker: BlkWorker<Arc<Memory>>,
    pub interrupt: Arc<CountingInterrupt>,
}

pub fn memory() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
}

impl Guest {
    pub fn new() -> Self {
        Self::with(Setup::default())
    }

    pub fn with(setup: Setup) -> Self {
        let disk = MockDisk::new(setup.disk);
        let device = VirtioBlk::new(Box::new(disk.clone()), setup.device).unwrap();
        let mut refuse = setup.refuse;
        if !setup.driver.event_idx {
            refuse |= virtio_devices::virtio_blk::feature::EVENT_IDX;
        }
        device.ack_features(device.features() & !refuse).unwrap();
        let memory = memory();
        let mut driver = Driver::new(&memory, GuestAddress(0), setup.driver).unwrap();
        driver.start_at(setup.start);
        let queues = device.config().num_queues;
        let interrupt = Arc::new(CountingInterrupt::new(queues).unwrap());
        let line: Arc<dyn Interrupt> = interrupt.clone();
        let worker = device
            .queue_worker(0, &driver.queue(), Arc::clone(&memory), line)
            .unwrap();
        Self {
            disk,
            device,
            memory,
            driver,
            worker,
            interrupt,
        }
    }

    /// Shows the device what was added, lets it work, and returns what ended.
    pub fn turn(&mut self) -> Vec<Used> {
        let _ = self.driver.publish();
        self.process();
        self.poll()
    }

    pub fn process(&mut self) {
        while self.worker.process() == Progress::More {}
    }

    pub fn poll(&mut self) -> Vec<Used> {
        let mut out = Vec::new();
        self.driver.poll(|used| out.push(used));
        out
    }

    /// The only request that ends in this turn.
    pub fn one(&mut self) -> Used {
        let out = self.turn();
        assert_eq!(out.len(), 1, "{out:?}");
        out[0]
    }

    pub fn fill(&self, address: u64, len: usize, byte: u8) {
        self.memory
            .write_slice(&vec![byte; len], GuestAddress(address))
            .unwrap();
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory
            .read_slice(&mut out, GuestAddress(address))
            .unwrap();
        out
    }

    /// Writes a descriptor of the queue's table.
    pub fn desc(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.driver.desc_table().0 + 16 * u64::from(index);
        self.desc_at(at, address, len, flags, next);
    }

    pub fn desc_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.memory
            .write_obj(Descriptor::new(address, len, flags, next), GuestAddress(at))
            .unwrap();
    }

    /// Writes a request header.
    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    }

    /// Posts a chain made of these descriptors, linked in order from descriptor 0.
    pub fn post_chain(&mut self, parts: &[(u64, u32, u16)]) {
        for (index, (address, len, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.desc(index as u16, *address, *len, flags, index as u16 + 1);
        }
        self.driver.post(0);
        let _ = self.driver.publish();
    }

    /// The used ring: its index, and the element that was written last.
    pub fn used(&self) -> (u16, u32, u32) {
        let ring = self.driver.used_ring().0;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let size = u64::from(self.worker.queue_state().size);
        let entry = ring + 4 + 8 * (u64::from(index.wrapping_sub(1)) % size);
        let id: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        (index, id, len)
    }

    /// Posts a chain and returns the status byte at `status` and the used length.
    pub fn chain(&mut self, parts: &[(u64, u32, u16)], status: u64) -> (u8, u32) {
        self.fill(status, 1, 0xff);
        let before = self.used().0;
        self.post_chain(parts);
        self.process();
        let (index, _, len) = self.used();
        assert_eq!(index, before.wrapping_add(1), "the chain was not returned");
        (self.bytes(status, 1)[0], len)
    }
}

/// A small generator of random numbers, the same from the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}
