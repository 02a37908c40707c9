//! A guest's seat: a controller over mock disks, driven through registers and queues in memory.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use block::Capabilities;
use virtio_devices::{
    VectorInterrupt,
    nvme::{
        NamespaceConfig, NvmeConfig, NvmeController, NvmeState, NvmeWorker, Status, Subsystem,
        SubsystemConfig,
        driver::{Completed, Entry, QueuePair},
    },
    testing::{MockDisk, MockDiskConfig},
    worker::Progress,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

pub const MEMORY: usize = 16 << 20;
/// Queues are below, data for tests above.
pub const DATA: u64 = 8 << 20;
/// A page for admin data.
pub const PAGE: u64 = 7 << 20;

pub const CAP: u64 = 0;
pub const INTMS: u64 = 0x0c;
pub const INTMC: u64 = 0x10;
pub const CC: u64 = 0x14;
pub const CSTS: u64 = 0x1c;
pub const NSSR: u64 = 0x20;
pub const AQA: u64 = 0x24;
pub const ASQ: u64 = 0x28;
pub const ACQ: u64 = 0x30;

pub const CC_ENABLE: u32 = 0x0046_0001;

/// Counts messages, and shows the line.
pub struct Lines {
    pub messages: Vec<AtomicUsize>,
    pub level: AtomicBool,
    pub changes: AtomicUsize,
}

impl Lines {
    pub fn new(vectors: usize) -> Arc<Self> {
        Arc::new(Self {
            messages: (0..vectors).map(|_| AtomicUsize::new(0)).collect(),
            level: AtomicBool::new(false),
            changes: AtomicUsize::new(0),
        })
    }

    pub fn count(&self, vector: usize) -> usize {
        self.messages[vector].load(Ordering::SeqCst)
    }
}

impl VectorInterrupt for Lines {
    fn signal(&self, vector: u16) -> io::Result<()> {
        self.messages[usize::from(vector)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn set_level(&self, asserted: bool) {
        self.level.store(asserted, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
}

pub struct Setup {
    pub config: NvmeConfig,
    pub subsystem: SubsystemConfig,
    pub disks: Vec<(MockDiskConfig, NamespaceConfig)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            config: NvmeConfig {
                io_queues: 4,
                workers: 2,
                vectors: 5,
                ..NvmeConfig::default()
            },
            subsystem: SubsystemConfig::default(),
            disks: vec![(MockDiskConfig::default(), NamespaceConfig::default())],
        }
    }
}

/// One disk with a sidecar in that folder.
pub fn with_sidecar(folder: &tempfile::TempDir, overwrite: bool) -> Setup {
    let disk = MockDiskConfig {
        capabilities: Capabilities {
            overwrite,
            ..MockDiskConfig::default().capabilities
        },
        ..MockDiskConfig::default()
    };
    let config = NamespaceConfig {
        sidecar: Some(folder.path().join("a.nvme")),
        ..NamespaceConfig::default()
    };
    Setup {
        disks: vec![(disk, config)],
        ..Setup::default()
    }
}

pub struct Guest {
    pub disks: Vec<MockDisk>,
    pub subsystem: Arc<Subsystem>,
    pub controller: NvmeController,
    pub lines: Arc<Lines>,
    pub memory: Arc<Memory>,
    pub workers: Vec<NvmeWorker<Arc<Memory>>>,
    pub admin: QueuePair,
    pub queues: Vec<QueuePair>,
    pub next_cid: u16,
    /// Completions of the admin queue that nobody has asked for yet.
    pub strays: VecDeque<Completed>,
}

pub fn memory() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
}

/// Where the queues of a pair are.
pub fn queue_addresses(id: u16) -> (u64, u64) {
    let base = 0x10_0000 + u64::from(id) * 0x6_0000;
    (base, base + 0x4_0000)
}

impl Guest {
    pub fn new() -> Self {
        let mut guest = Self::with(Setup::default());
        guest.enable();
        guest
    }

    /// With I/O queue pairs 1 to `count` of 64 entries.
    pub fn with_queues(setup: Setup, count: u16) -> Self {
        let mut guest = Self::with(setup);
        guest.enable();
        for id in 1..=count {
            guest.create_pair(id, 64);
        }
        guest
    }

    pub fn with(setup: Setup) -> Self {
        let subsystem = Subsystem::new(setup.subsystem).unwrap();
        let disks: Vec<MockDisk> = setup.disks.iter().map(|it| MockDisk::new(it.0)).collect();
        for (disk, (_, config)) in disks.iter().zip(&setup.disks) {
            subsystem
                .add_namespace(Box::new(disk.clone()), config)
                .unwrap();
        }
        Self::of(&subsystem, disks, setup.config)
    }

    /// Another controller of a subsystem, for a guest of its own.
    pub fn of(subsystem: &Arc<Subsystem>, disks: Vec<MockDisk>, config: NvmeConfig) -> Self {
        let lines = Lines::new(usize::from(config.vectors));
        let controller = NvmeController::new(subsystem, config, lines.clone()).unwrap();
        let memory = memory();
        let workers = (0..controller.workers())
            .map(|index| controller.worker(index, Arc::clone(&memory)).unwrap())
            .collect();
        let (sq, cq) = queue_addresses(0);
        Self {
            disks,
            subsystem: Arc::clone(subsystem),
            admin: QueuePair::new(&memory, 0, sq, cq, 32),
            queues: Vec::new(),
            controller,
            lines,
            memory,
            workers,
            next_cid: 0,
            strays: VecDeque::new(),
        }
    }

    pub fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.controller.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.controller.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.controller.write(offset, &value.to_le_bytes());
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.controller.write(offset, &value.to_le_bytes());
    }

    pub fn process(&mut self) {
        for _ in 0..3 {
            for worker in &mut self.workers {
                while worker.process() == Progress::More {}
            }
        }
    }

    /// Lets the workers run until `done`, which takes host work on other threads.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        loop {
            self.process();
            if done(self) {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn ready(&self) -> bool {
        self.read32(CSTS) & 1 != 0
    }

    /// Sets the admin queue up and enables the controller.
    pub fn enable(&mut self) {
        let (sq, cq) = queue_addresses(0);
        self.admin = QueuePair::new(&self.memory, 0, sq, cq, 32);
        self.queues.clear();
        self.strays.clear();
        self.write32(AQA, 0x001f_001f);
        self.write64(ASQ, sq);
        self.write64(ACQ, cq);
        self.write32(CC, CC_ENABLE);
        self.until("enable", |guest| guest.ready());
    }

    pub fn disable(&mut self) {
        self.write32(CC, 0);
        self.until("disable", |guest| !guest.ready());
    }

    pub fn cid(&mut self) -> u16 {
        self.next_cid = self.next_cid.wrapping_add(1);
        self.next_cid
    }

    /// Posts an admin command; returns its identifier.
    pub fn post_admin(&mut self, entry: Entry) -> u16 {
        let cid = self.cid();
        self.admin.push(&entry.cid(cid));
        self.admin.ring(&self.controller);
        cid
    }

    /// What came back for an admin command, if it did.
    pub fn take_admin(&mut self, cid: u16) -> Option<Completed> {
        while let Some(completed) = self.admin.next() {
            self.strays.push_back(completed);
            self.admin.release(&self.controller);
        }
        let at = self.strays.iter().position(|it| it.cid == cid)?;
        self.strays.remove(at)
    }

    /// Executes an admin command.
    pub fn admin(&mut self, entry: Entry) -> Completed {
        let cid = self.post_admin(entry);
        let mut completed = None;
        self.until("an admin command", |guest| {
            completed = guest.take_admin(cid);
            completed.is_some()
        });
        completed.unwrap()
    }

    pub fn admin_ok(&mut self, entry: Entry) -> u32 {
        let completed = self.admin(entry);
        assert!(completed.status.is_success(), "{entry:x?}: {completed:x?}");
        completed.dw0
    }

    pub fn create_cq(&mut self, id: u16, size: u32, flags: u32) -> Completed {
        let (_, cq) = queue_addresses(id);
        self.admin(
            Entry::new(5)
                .data(cq, 0)
                .cdw(10, u32::from(id) | size.wrapping_sub(1) << 16)
                .cdw(11, flags),
        )
    }

    pub fn create_sq(&mut self, id: u16, size: u32, flags: u32) -> Completed {
        let (sq, _) = queue_addresses(id);
        self.admin(
            Entry::new(1)
                .data(sq, 0)
                .cdw(10, u32::from(id) | size.wrapping_sub(1) << 16)
                .cdw(11, flags),
        )
    }

    /// Makes an I/O queue pair with its own vector.
    pub fn create_pair(&mut self, id: u16, size: u16) {
        let (sq, cq) = queue_addresses(id);
        let pair = QueuePair::new(&self.memory, id, sq, cq, size);
        let completed = self.create_cq(id, size.into(), 3 | u32::from(id) << 16);
        assert!(completed.status.is_success(), "{completed:x?}");
        let completed = self.create_sq(id, size.into(), 1 | u32::from(id) << 16);
        assert!(completed.status.is_success(), "{completed:x?}");
        self.queues.push(pair);
    }

    /// Posts I/O commands of one pair with the next identifiers, without letting anybody work.
    pub fn post(&mut self, pair: usize, entries: &[Entry]) -> Vec<u16> {
        let mut cids = Vec::new();
        for entry in entries {
            let cid = self.cid();
            self.queues[pair].push(&entry.cid(cid));
            cids.push(cid);
        }
        self.queues[pair].ring(&self.controller);
        cids
    }

    /// [`post`](Self::post) of commands that the first disk takes and does not end.
    pub fn post_held(&mut self, pair: usize, entries: &[Entry]) -> Vec<u16> {
        self.disks[0].hold(true);
        let cids = self.post(pair, entries);
        self.process();
        cids
    }

    /// The first disk ends what it has, and holds nothing more.
    pub fn let_disk_go(&self) {
        self.disks[0].hold(false);
        self.disks[0].release_all();
    }

    pub fn poll(&mut self, pair: usize) -> Vec<Completed> {
        let mut out = Vec::new();
        self.queues[pair].poll(|it| out.push(it));
        self.queues[pair].release(&self.controller);
        out
    }

    /// Executes I/O commands of one pair; what came back, in the order of the commands.
    pub fn io_all(&mut self, pair: usize, entries: &[Entry]) -> Vec<Completed> {
        let cids = self.post(pair, entries);
        let mut out = Vec::new();
        self.until("I/O commands", |guest| {
            out.extend(guest.poll(pair));
            out.len() >= cids.len()
        });
        cids.iter()
            .map(|cid| *out.iter().find(|it| it.cid == *cid).expect("every command"))
            .collect()
    }

    pub fn io(&mut self, entry: Entry) -> Completed {
        self.io_all(0, &[entry])[0]
    }

    pub fn status(&mut self, entry: Entry) -> Status {
        self.io(entry).status
    }

    pub fn io_ok(&mut self, entry: Entry) {
        let completed = self.io(entry);
        assert!(completed.status.is_success(), "{entry:x?}: {completed:x?}");
    }

    pub fn fill(&self, address: u64, len: usize, byte: u8) {
        self.memory
            .write_slice(&vec![byte; len], GuestAddress(address))
            .unwrap();
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory
            .read_slice(&mut out, GuestAddress(address))
            .unwrap();
        out
    }

    /// What is saved once everything that was taken has ended; it has been text in between.
    pub fn save(&mut self) -> NvmeState {
        for worker in &mut self.workers {
            worker.drain().unwrap();
        }
        self.workers[0].drain().unwrap();
        let workers = self.workers.iter().map(|it| it.save().unwrap()).collect();
        let state = self.controller.save(workers).unwrap();
        let text = serde_json::to_string(&state).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// The guest behind another controller, which is put into the state; its memory moves with it.
    pub fn moved_to(&self, mut other: Guest, state: &NvmeState) -> Guest {
        other.controller.restore(state).unwrap();
        other.put(0, &self.bytes(0, MEMORY));
        for (worker, saved) in other.workers.iter_mut().zip(&state.workers) {
            worker.restore(saved);
        }
        let memory = Arc::clone(&other.memory);
        other.next_cid = self.next_cid;
        other.admin = self.admin.moved(&memory);
        other.queues = self.queues.iter().map(|it| it.moved(&memory)).collect();
        other
    }

    /// A page that Identify gives.
    pub fn identify(&mut self, cns: u32, nsid: u32) -> Vec<u8> {
        self.fill(PAGE, 4096, 0xaa);
        self.admin_ok(Entry::new(6).nsid(nsid).data(PAGE, 0).cdw(10, cns));
        self.bytes(PAGE, 4096)
    }

    pub fn log(&mut self, log: u32, len: u32) -> Vec<u8> {
        self.fill(PAGE, 4096, 0xaa);
        let cdw10 = log | (len / 4 - 1) << 16;
        self.admin_ok(Entry::new(2).nsid(u32::MAX).data(PAGE, 0).cdw(10, cdw10));
        self.bytes(PAGE, len as usize)
    }
}

pub fn write(slba: u64, blocks: u32) -> Entry {
    Entry::new(1).nsid(1).blocks(slba, blocks).data(DATA, 0)
}

pub fn read(slba: u64, blocks: u32) -> Entry {
    Entry::new(2).nsid(1).blocks(slba, blocks).data(DATA, 0)
}

pub fn flush() -> Entry {
    Entry::new(0).nsid(1)
}

pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What log page 05h says of a command that is supported: its bits 31:20, which are what it has an effect on.
pub fn scope(effects: &[u8], io: bool, opcode: u8) -> Option<u32> {
    let at = usize::from(io) * 1024 + usize::from(opcode) * 4;
    let effects = le32(effects, at);
    (effects & 1 != 0).then_some(effects >> 20)
}
