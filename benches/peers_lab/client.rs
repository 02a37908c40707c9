//! The crate virtio-driver as the client of a vhost-user server: one access at a time, each timed.

use std::{
    fs::File,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use platter_benches::{
    Direction, Result, Work,
    load::Random,
    server::{Server, cpu_of},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

/// How long an access may take: then the server is taken for dead.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

const QUEUE_SIZE: u16 = 128;

/// What a slice of accesses, one by one, took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    /// Half of them took at most so many microseconds.
    pub(super) p50: f64,
    /// 99 of 100 did.
    pub(super) p99: f64,
    /// Microseconds of the server's processor time, an access.
    pub(super) cpu: f64,
}

/// A server and the driver of its disk.
pub(super) struct Client {
    // Dropped in this order: the server goes before the memory that it uses, and the queue before
    // the transport that its rings belong to.
    server: Server,
    queue: VirtioBlkQueue<'static, ()>,
    notifier: Box<dyn QueueNotifier>,
    interrupt: Arc<EventFd>,
    _transport: Box<VirtioBlkTransport>,
    /// What is read and written.
    data: MmapRegion<()>,
    work: Work,
}

impl Client {
    /// Connects. Of the work, the depth does not matter: it is one.
    pub(super) fn new(server: Server, work: Work) -> Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits();
        let path = server.socket.display().to_string();
        let connected: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
            VhostUser::new(&path, features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(connected);
        let len = work.block as usize;
        let file = File::from(memfd_create("data", MemfdFlags::CLOEXEC)?);
        file.set_len(work.block)?;
        let descriptor = file.as_raw_fd();
        let data = MmapRegion::from_file(FileOffset::new(file, 0), len)?;
        transport.map_mem_region(data.as_ptr() as usize, len, descriptor, 0)?;
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, QUEUE_SIZE)?;
        let mut queue = queues.into_iter().next().ok_or("no queue was set up")?;
        queue.set_used_notif_enabled(true);
        Ok(Self {
            queue,
            notifier: transport.get_submission_notifier(0),
            interrupt: transport.get_completion_fd(0),
            _transport: transport,
            data,
            server,
            work,
        })
    }

    /// The number of the server.
    pub(super) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Random accesses, one by one.
    pub(super) fn slice(&mut self, length: Duration, seed: u64) -> Result<Latency> {
        let mut random = Random::seeded(seed);
        let blocks = self.work.size / self.work.block;
        let mut times = Vec::new();
        let cpu = cpu_of(self.server.pid())?;
        let end = Instant::now() + length;
        loop {
            let offset = random.below(blocks) * self.work.block;
            let start = Instant::now();
            self.access(offset)?;
            let now = Instant::now();
            times.push((now - start).as_nanos() as f64 / 1e3);
            if now >= end {
                break;
            }
        }
        let cpu = cpu_of(self.server.pid())?.saturating_sub(cpu);
        let cpu = cpu.as_nanos() as f64 / 1e3 / times.len() as f64;
        Ok(Latency {
            p50: percentile(&mut times, 0.5),
            p99: percentile(&mut times, 0.99),
            cpu,
        })
    }

    /// One access, from its start to the interrupt that says it ended.
    fn access(&mut self, offset: u64) -> Result<()> {
        let (data, len) = (self.data.as_ptr(), self.work.block as usize);
        match self.work.direction {
            // SAFETY: the memory stays mapped until after the queue is gone, and nobody uses it meanwhile.
            Direction::Read => unsafe { self.queue.read_raw(offset, data, len, ()) }?,
            // SAFETY: as above.
            Direction::Write => unsafe { self.queue.write_raw(offset, data, len, ()) }?,
        }
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        loop {
            // A server may make the event non-blocking for both.
            let events = PollFd::new(&self.interrupt, PollFlags::IN);
            if poll(&mut [events], Some(&PATIENCE))? == 0 {
                let pid = self.server.pid();
                return Err(format!("server {pid} does not answer").into());
            }
            self.interrupt.read()?;
            if let Some(done) = self.queue.completions().next() {
                return match done.ret {
                    0 => Ok(()),
                    errno => Err(format!("an access at {offset} failed: {errno}").into()),
                };
            }
        }
    }
}

/// The value that a part of all do not exceed.
fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (part * values.len() as f64).ceil().max(1.0) as usize;
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Plain `pread` of random blocks of a file, one by one: the median, in microseconds.
pub(super) fn pread(path: &Path, block: u64, length: Duration, seed: u64) -> Result<f64> {
    let file = File::open(path)?;
    let blocks = file.metadata()?.len() / block;
    let mut random = Random::seeded(seed);
    let mut buffer = vec![0; block as usize];
    let mut times = Vec::new();
    let end = Instant::now() + length;
    loop {
        let offset = random.below(blocks) * block;
        let start = Instant::now();
        file.read_exact_at(&mut buffer, offset)?;
        let now = Instant::now();
        times.push((now - start).as_nanos() as f64 / 1e3);
        if now >= end {
            return Ok(percentile(&mut times, 0.5));
        }
    }
}
