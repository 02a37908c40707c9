//! A load by a driver of NVMe queue pairs in guest memory, through the controller.

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use block::AsyncDiskFile;
use virtio_devices::{
    VectorInterrupt,
    nvme::{
        NamespaceConfig, NvmeConfig, NvmeController, NvmeWorker, Subsystem, SubsystemConfig,
        driver::{Entry, QueuePair},
    },
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::{
    Direction, Result, Work,
    load::{Random, Straight},
    side::{Load, Stop},
};

type Memory = GuestMemoryMmap<()>;

/// Where the queues of the guest are, and where its data starts.
const ADMIN_SQ: u64 = 0;
const ADMIN_CQ: u64 = 0x1000;
const SQ: u64 = 0x10_0000;
const CQ: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Entries of the admin queues.
const ADMIN_ENTRIES: u16 = 16;
/// Bytes of a page, the most that one PRP entry names.
const PAGE: u64 = 4096;

/// The driver of the guest, and what it is doing. It runs where the interrupt arrives: on the
/// thread of the device, which so pays for both.
struct Guest {
    controller: Weak<NvmeController>,
    queue: QueuePair,
    work: Work,
    /// Blocks of an access, and bytes of a block as a shift.
    blocks: u32,
    shift: u32,
    /// Commands that are not in flight; each has a buffer of its own.
    free: Vec<u16>,
    random: Random,
    stop: Stop,
    started: u64,
    ended: u64,
    failed: bool,
}

impl Guest {
    /// Takes what has ended, and posts as many new commands unless it is time to stop. Returns
    /// whether everything has ended.
    fn turn(&mut self) -> bool {
        let Some(controller) = self.controller.upgrade() else {
            return true;
        };
        loop {
            let (failed, free) = (&mut self.failed, &mut self.free);
            let taken = self.queue.poll(|done| {
                *failed |= !done.status.is_success();
                free.push(done.cid);
            });
            if taken == 0 {
                return self.started == self.ended;
            }
            self.ended += taken as u64;
            self.queue.release(&controller);
            if !self.failed && !self.stop.reached(self.started) {
                self.post(&controller);
            }
        }
    }

    fn post(&mut self, controller: &NvmeController) {
        let work = self.work;
        let accesses = work.size / work.block;
        let opcode = match work.direction {
            Direction::Read => 2,
            Direction::Write => 1,
        };
        while let Some(cid) = self.free.pop() {
            let offset = self.random.below(accesses) * work.block;
            let entry = Entry::new(opcode)
                .cid(cid)
                .nsid(1)
                .blocks(offset >> self.shift, self.blocks)
                .data(DATA + u64::from(cid) * work.block, 0);
            self.queue.push(&entry);
            self.started += 1;
        }
        self.queue.ring(controller);
    }
}

/// The interrupts of a controller whose guest lives on the controller's own thread.
struct SameThread {
    guest: Mutex<Option<Guest>>,
    finished: AtomicBool,
    finish: PipeWriter,
}

impl SameThread {
    fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VectorInterrupt for SameThread {
    fn signal(&self, vector: u16) -> io::Result<()> {
        // The other one is the admin queue's.
        if vector == 1
            && let Some(guest) = &mut *self.guest()
            && guest.turn()
            && !self.finished.swap(true, Ordering::Relaxed)
        {
            (&self.finish).write_all(&[1])?;
        }
        Ok(())
    }

    fn set_level(&self, _asserted: bool) {}
}

/// Random accesses by a driver of real queue pairs in guest memory, through the NVMe controller.
/// One thread does the driver's work and the controller's.
pub struct Nvme {
    // Dropped first: it waits for what is in flight.
    worker: NvmeWorker<Arc<Memory>>,
    controller: Arc<NvmeController>,
    interrupt: Arc<SameThread>,
    stop: PipeReader,
    /// A doorbell that nobody rings.
    kick: (PipeReader, PipeWriter),
}

impl Nvme {
    /// A controller of one namespace, on the calling thread. An access fits a page and is not
    /// smaller than a block.
    ///
    /// # Errors
    /// The disk's and the controller's.
    pub fn new(disk: Box<dyn AsyncDiskFile>, work: Work) -> Result<Self> {
        if work.block > PAGE || !PAGE.is_multiple_of(work.block) {
            return Err(format!(
                "accesses of {} bytes: expected a part of a page",
                work.block
            )
            .into());
        }
        // Reads every mapping table.
        drop(Straight::new(&*disk, work)?);
        let subsystem = Subsystem::new(SubsystemConfig::default())?;
        let namespace = NamespaceConfig {
            lba_size: 512,
            ..NamespaceConfig::default()
        };
        subsystem.add_namespace(disk, &namespace)?;
        let config = NvmeConfig {
            io_queues: 1,
            workers: 1,
            vectors: 2,
            ring_depth: work.depth,
            inline: true,
            ..NvmeConfig::default()
        };
        let (stop, finish) = io::pipe()?;
        let interrupt = Arc::new(SameThread {
            guest: Mutex::default(),
            finished: AtomicBool::new(true),
            finish,
        });
        let signal: Arc<dyn VectorInterrupt> = Arc::<SameThread>::clone(&interrupt);
        let controller = Arc::new(NvmeController::new(&subsystem, config, signal)?);
        let len = DATA + work.block * u64::from(work.depth);
        let memory: Arc<Memory> = Arc::new(GuestMemoryMmap::from_ranges(&[(
            GuestAddress(0),
            len as usize,
        )])?);
        // Never full: the power of two above the depth.
        let entries = (work.depth + 1).next_power_of_two().clamp(2, 4096) as u16;
        set_up(&controller, &memory, entries)?;
        let shift = namespace.lba_size.trailing_zeros();
        *interrupt.guest() = Some(Guest {
            controller: Arc::downgrade(&controller),
            queue: QueuePair::new(&memory, 1, SQ, CQ, entries),
            work,
            blocks: (work.block >> shift) as u32,
            shift,
            free: (0..work.depth as u16).collect(),
            random: Random::seeded(0),
            stop: Stop::After(0),
            started: 0,
            ended: 0,
            failed: false,
        });
        Ok(Self {
            worker: controller.worker(1, memory)?,
            controller,
            interrupt,
            stop,
            kick: io::pipe()?,
        })
    }
}

/// Enables the controller and creates queue pair 1.
fn set_up(controller: &NvmeController, memory: &Arc<Memory>, entries: u16) -> Result<()> {
    let mut worker = controller.worker(0, Arc::clone(memory))?;
    let mut admin = QueuePair::new(memory, 0, ADMIN_SQ, ADMIN_CQ, ADMIN_ENTRIES);
    let sizes = u32::from(ADMIN_ENTRIES - 1);
    controller.write(0x24, &(sizes << 16 | sizes).to_le_bytes());
    controller.write(0x28, &ADMIN_SQ.to_le_bytes());
    controller.write(0x30, &ADMIN_CQ.to_le_bytes());
    controller.write(0x14, &0x0046_0001_u32.to_le_bytes());
    worker.process();
    let size = u32::from(entries) - 1;
    // Create I/O Completion Queue with vector 1, Create I/O Submission Queue for it.
    for (opcode, at, flags) in [(5, CQ, 3 | 1 << 16), (1, SQ, 1 | 1 << 16)] {
        let entry = Entry::new(opcode).data(at, 0);
        admin.push(&entry.cdw(10, 1 | size << 16).cdw(11, flags));
        admin.ring(controller);
        worker.process();
        let done = admin.next();
        if !done.is_some_and(|it| it.status.is_success()) {
            return Err(format!("no queue was created: {done:?}").into());
        }
        admin.release(controller);
    }
    Ok(())
}

impl Load for Nvme {
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64> {
        self.interrupt.finished.store(false, Ordering::Relaxed);
        if let Some(guest) = &mut *self.interrupt.guest() {
            guest.random = Random::seeded(seed);
            guest.stop = stop;
            (guest.started, guest.ended) = (0, 0);
            guest.post(&self.controller);
        }
        self.worker.run(self.kick.0.as_fd(), self.stop.as_fd())?;
        self.stop.read_exact(&mut [0])?;
        match &*self.interrupt.guest() {
            Some(guest) if !guest.failed => Ok(guest.ended),
            _ => Err("a command of the guest failed".into()),
        }
    }
}
