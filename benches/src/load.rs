//! Loads inside this process: straight through [`AsyncIo`], and through the virtio-blk device.

use std::{
    any::Any,
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use block::{
    AsyncDiskFile,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
};
use virtio_devices::{
    Interrupt,
    virtio_blk::{
        BlkWorker, VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig},
        feature,
    },
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::{
    Direction, Result, Work,
    side::{Load, Stop},
};

/// A small generator of offsets (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of a seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(number) * u128::from(limit)) >> 64) as u64
    }
}

/// Random accesses through [`AsyncIo`]: what was reaped is submitted again, together.
pub struct Straight {
    io: Box<dyn AsyncIo>,
    work: Work,
    start: u64,
    spare: Vec<Buffers>,
    batch: Vec<Request>,
    completions: Vec<Completion>,
}

impl Straight {
    /// A load on a disk, on the calling thread. Every mapping table is read first.
    ///
    /// # Errors
    /// The disk's.
    pub fn new(disk: &dyn AsyncDiskFile, work: Work) -> Result<Self> {
        Self::from(0, disk, work)
    }

    /// The same on the part of a disk that starts at a byte.
    ///
    /// # Errors
    /// The disk's.
    pub fn from(start: u64, disk: &dyn AsyncDiskFile, work: Work) -> Result<Self> {
        let mut straight = Self {
            io: disk.create_async_io(work.depth)?,
            work,
            start,
            spare: (0..work.depth)
                .map(|byte| {
                    let mut buffer = AlignedBuf::zeroed(work.block as usize);
                    buffer.fill(byte as u8);
                    Buffers::owned(buffer)
                })
                .collect(),
            batch: Vec::with_capacity(work.depth as usize),
            completions: Vec::with_capacity(work.depth as usize),
        };
        for offset in (0..work.size).step_by(64 << 10) {
            if let Some(buffers) = straight.spare.pop() {
                let offset = start + offset;
                let op = RequestOp::Read { offset, buffers };
                straight.batch.push(Request { id: 0, op });
            }
            straight.io.submit(&mut straight.batch);
            straight.reap()?;
        }
        Ok(straight)
    }

    fn reap(&mut self) -> Result<u64> {
        self.io.wait(None)?;
        self.io.reap(&mut self.completions);
        let reaped = self.completions.len() as u64;
        for completion in &mut self.completions {
            completion.result.map_err(|kind| kind.to_string())?;
            if let Some(buffers) = &mut completion.buffers {
                self.spare.push(std::mem::take(buffers));
            }
        }
        self.completions.clear();
        Ok(reaped)
    }
}

impl Load for Straight {
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64> {
        let mut random = Random::seeded(seed);
        let blocks = self.work.size / self.work.block;
        let (mut started, mut ended) = (0, 0);
        loop {
            if !stop.reached(started) {
                started += self.spare.len() as u64;
                let (direction, block, start) = (self.work.direction, self.work.block, self.start);
                self.batch.extend(self.spare.drain(..).map(|buffers| {
                    let offset = start + random.below(blocks) * block;
                    let op = match direction {
                        Direction::Read => RequestOp::Read { offset, buffers },
                        Direction::Write => RequestOp::Write {
                            offset,
                            buffers,
                            fua: false,
                        },
                    };
                    Request { id: 0, op }
                }));
                self.io.submit(&mut self.batch);
            } else if self.io.in_flight() == 0 {
                return Ok(ended);
            }
            ended += self.reap()?;
        }
    }
}

type Memory = GuestMemoryMmap<()>;

/// Where the data of the guest starts; its rings are below.
const DATA: u64 = 1 << 20;

/// The driver of the guest, and what it is doing. It runs where the interrupt arrives: on the
/// thread of the device, which so pays for both.
struct Guest {
    driver: Driver,
    work: Work,
    /// Buffers that no request uses, and those of the slots that are in flight.
    free: Vec<u64>,
    places: Vec<u64>,
    random: Random,
    stop: Stop,
    started: u64,
    ended: u64,
    failed: bool,
}

impl Guest {
    /// Takes what has ended, and posts as many new requests unless it is time to stop. Returns
    /// whether everything has ended.
    fn turn(&mut self) -> bool {
        loop {
            let (failed, free, places) = (&mut self.failed, &mut self.free, &self.places);
            self.ended += self.driver.poll(|used| {
                *failed |= used.status != 0;
                free.push(places[usize::from(used.slot)]);
            }) as u64;
            if !self.failed && !self.stop.reached(self.started) {
                self.post();
            }
            if !self.driver.arm_interrupt() {
                return self.started == self.ended;
            }
        }
    }

    fn post(&mut self) {
        let work = self.work;
        let blocks = work.size / work.block;
        while let Some(place) = self.free.pop() {
            let sector = self.random.below(blocks) * (work.block / 512);
            let data = [(GuestAddress(place), work.block as u32)];
            let posted = match work.direction {
                Direction::Read => self.driver.read(sector, &data),
                Direction::Write => self.driver.write(sector, &data),
            };
            let Some(slot) = posted else {
                self.free.push(place);
                break;
            };
            self.places[usize::from(slot)] = place;
            self.started += 1;
        }
        // The device looks at the ring again before it sleeps: it is this very thread.
        let _ = self.driver.publish();
    }
}

/// The interrupt of a device whose guest lives on the device's own thread.
struct SameThread {
    guest: Mutex<Guest>,
    finished: AtomicBool,
    finish: PipeWriter,
}

impl Interrupt for SameThread {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        if guest.turn() && !self.finished.swap(true, Ordering::Relaxed) {
            (&self.finish).write_all(&[1])?;
        }
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The same random accesses by a driver of real split rings in guest memory, through the
/// virtio-blk device. One thread does the driver's work and the device's.
pub struct Virtio {
    worker: BlkWorker<Arc<Memory>>,
    interrupt: Arc<SameThread>,
    stop: PipeReader,
    /// A doorbell that nobody rings.
    kick: (PipeReader, PipeWriter),
    _device: Arc<dyn Any>,
}

impl Virtio {
    /// A device over a disk, on the calling thread.
    ///
    /// # Errors
    /// The disk's and the device's.
    pub fn new(disk: Box<dyn AsyncDiskFile>, work: Work, pin_memory: bool) -> Result<Self> {
        // Reads every mapping table.
        drop(Straight::new(&*disk, work)?);
        let len = DATA + work.block * u64::from(work.depth);
        let memory: Arc<Memory> = Arc::new(GuestMemoryMmap::from_ranges(&[(
            GuestAddress(0),
            len as usize,
        )])?);
        let queue_size = ((work.depth * 3).next_power_of_two() as u16).max(256);
        let driver = Driver::new(
            &memory,
            GuestAddress(0),
            DriverConfig {
                queue_size,
                ..DriverConfig::default()
            },
        )?;
        let device = VirtioBlk::new(
            disk,
            VirtioBlkConfig {
                queue_size,
                pin_memory,
                ..VirtioBlkConfig::default()
            },
        )?;
        device.ack_features(
            device.features() & (feature::VERSION_1 | feature::EVENT_IDX | feature::FLUSH),
        )?;
        let (stop, finish) = io::pipe()?;
        let queue = driver.queue();
        let interrupt = Arc::new(SameThread {
            guest: Mutex::new(Guest {
                driver,
                work,
                free: (0..u64::from(work.depth))
                    .map(|n| DATA + n * work.block)
                    .collect(),
                places: vec![0; usize::from(queue_size)],
                random: Random::seeded(0),
                stop: Stop::After(0),
                started: 0,
                ended: 0,
                failed: false,
            }),
            finished: AtomicBool::new(true),
            finish,
        });
        let signal: Arc<dyn Interrupt> = Arc::<SameThread>::clone(&interrupt);
        let worker = device.queue_worker(0, &queue, Arc::clone(&memory), signal)?;
        Ok(Self {
            worker,
            interrupt,
            stop,
            kick: io::pipe()?,
            _device: device,
        })
    }
}

impl Load for Virtio {
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64> {
        let guest = |interrupt: &SameThread, act: &mut dyn FnMut(&mut Guest)| {
            act(&mut interrupt
                .guest
                .lock()
                .unwrap_or_else(PoisonError::into_inner));
        };
        self.interrupt.finished.store(false, Ordering::Relaxed);
        guest(&self.interrupt, &mut |guest| {
            guest.random = Random::seeded(seed);
            guest.stop = stop;
            (guest.started, guest.ended) = (0, 0);
            guest.post();
            guest.driver.arm_interrupt();
        });
        self.worker.run(self.kick.0.as_fd(), self.stop.as_fd())?;
        self.stop.read_exact(&mut [0])?;
        let (mut ended, mut failed) = (0, false);
        guest(&self.interrupt, &mut |guest| {
            ended = guest.ended;
            failed = guest.failed;
        });
        if failed {
            return Err("a request of the guest failed".into());
        }
        Ok(ended)
    }
}
