//! A guest's seat: an HBA over a mock disk, driven through a command list in guest memory.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use virtio_devices::{
    VectorInterrupt,
    ahci::{
        Hba, HbaConfig, PortWorker,
        driver::{Driver, Issue, Layout},
        regs::{cmd, px},
    },
    ata::{DiskConfig, TaskFile, Trim},
    testing::{MockDisk, MockDiskConfig},
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

/// Data for tests starts here; command list and tables are below.
pub const DATA: u64 = 0x20_0000;
pub const MEMORY: usize = 0x80_0000;

pub const BASE: u64 = 0x1_0000;

/// Counts what an HBA says.
#[derive(Default)]
pub struct Sink {
    pub line: AtomicBool,
    pub messages: AtomicUsize,
}

impl VectorInterrupt for Sink {
    fn set_level(&self, asserted: bool) {
        self.line.store(asserted, Ordering::Release);
    }

    fn signal(&self, vector: u16) -> std::io::Result<()> {
        assert_eq!(vector, 0);
        self.messages.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

pub struct Setup {
    pub disk: MockDiskConfig,
    pub device: DiskConfig,
    pub hba: HbaConfig,
    pub descriptors: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            disk: MockDiskConfig {
                size: 8 << 20,
                ..MockDiskConfig::default()
            },
            device: DiskConfig {
                serial: "testdisk".to_owned(),
                firmware: "version".to_owned(),
                wwn: 0x5000_c500_1234_5678,
                trim: Trim::Zero,
                ..DiskConfig::default()
            },
            hba: HbaConfig::default(),
            descriptors: 64,
        }
    }
}

/// A machine with one port in use.
pub struct Machine {
    pub hba: Arc<Hba>,
    pub disk: MockDisk,
    pub driver: Driver<Memory>,
    pub worker: PortWorker<Arc<Memory>>,
    pub sink: Arc<Sink>,
    pub memory: Arc<Memory>,
}

impl Machine {
    /// Plugged in, nothing started.
    pub fn cold(setup: Setup) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let memory = Arc::new(memory);
        let hba = Arc::new(Hba::new(setup.hba).unwrap());
        let sink = Arc::new(Sink::default());
        hba.set_interrupt(Arc::<Sink>::clone(&sink));
        let disk = MockDisk::new(setup.disk);
        hba.plug_disk(0, Box::new(disk.clone()), setup.device)
            .unwrap();
        let layout = Layout {
            base: BASE,
            descriptors: setup.descriptors,
        };
        Self {
            driver: Driver::new(Arc::clone(&hba), 0, Arc::clone(&memory), layout),
            worker: hba.port_worker(0, Arc::clone(&memory)).unwrap(),
            hba,
            disk,
            sink,
            memory,
        }
    }

    /// Ready for commands.
    pub fn new(setup: Setup) -> Self {
        let mut machine = Self::cold(setup);
        machine.start();
        machine
    }

    /// Receives, waits for the signature, starts.
    pub fn start(&mut self) {
        self.driver.receive();
        self.worker.process();
        assert_eq!(self.driver.get(px::TFD) & 0x89, 0, "the device is ready");
        self.driver.start();
        assert_ne!(self.driver.get(px::CMD) & cmd::CR, 0);
        self.driver.set(px::IS, u32::MAX);
        self.driver.set_global(0x08, u32::MAX);
    }

    /// Error recovery: stop, clear, start.
    pub fn recover(&mut self) {
        self.driver.stop();
        self.worker.process();
        assert_eq!(
            self.driver.get(px::CMD) & cmd::CR,
            0,
            "the list has stopped"
        );
        self.driver.set(px::SERR, u32::MAX);
        self.driver.set(px::IS, u32::MAX);
        self.driver.start();
    }

    /// Issues one command in slot 0 and lets the device work.
    pub fn run(&mut self, issue: &Issue<'_>) -> Outcome {
        self.run_in(0, issue)
    }

    pub fn run_in(&mut self, slot: u32, issue: &Issue<'_>) -> Outcome {
        self.driver.set(px::IS, u32::MAX);
        self.driver.prepare(slot, issue);
        self.driver.issue();
        self.work();
        self.outcome(slot)
    }

    /// Lets the device work until it has nothing to do.
    pub fn work(&mut self) {
        while self.worker.process() == virtio_devices::worker::Progress::More {}
    }

    pub fn outcome(&self, slot: u32) -> Outcome {
        let layout = self.driver.layout();
        let tfd = self.driver.get(px::TFD);
        let count = self
            .driver
            .take(layout.list() + u64::from(slot) * 32 + 4, 4);
        Outcome {
            is: self.driver.get(px::IS),
            status: tfd as u8,
            error: (tfd >> 8) as u8,
            ci: self.driver.get(px::CI),
            sact: self.driver.get(px::SACT),
            count: u32::from_le_bytes(count.try_into().unwrap()),
        }
    }

    /// A command without data.
    pub fn plain(&mut self, task: TaskFile) -> Outcome {
        self.run(&Issue {
            task,
            ..Issue::default()
        })
    }

    /// A command with data from the device at `DATA`.
    pub fn read(&mut self, task: TaskFile, len: u32) -> Outcome {
        self.run(&Issue {
            task,
            data: &[(DATA, len)],
            ..Issue::default()
        })
    }

    /// A command with data to the device from `DATA`.
    pub fn write(&mut self, task: TaskFile, len: u32) -> Outcome {
        self.run(&Issue {
            task,
            write: true,
            data: &[(DATA, len)],
            ..Issue::default()
        })
    }

    /// Guest memory at `DATA`.
    pub fn data(&self, len: usize) -> Vec<u8> {
        self.driver.take(DATA, len)
    }

    /// The Register FIS that was received last.
    pub fn register_fis(&self) -> Vec<u8> {
        self.driver.take(self.driver.layout().received() + 0x40, 20)
    }
}

/// What a driver sees of the end of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub is: u32,
    pub status: u8,
    pub error: u8,
    pub ci: u32,
    pub sact: u32,
    pub count: u32,
}

impl Outcome {
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 0x50, "{self:?}");
        assert_eq!(self.is >> 23, 0, "{self:?}");
        assert_eq!((self.ci, self.sact), (0, 0), "{self:?}");
        self
    }

    #[track_caller]
    pub fn failed(self, error: u8) -> Self {
        assert_eq!((self.status, self.error), (0x51, error), "{self:?}");
        assert_ne!(self.is & 1 << 30, 0, "{self:?}");
        self
    }
}

/// Different in every sector and byte.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed)
        .collect()
}
