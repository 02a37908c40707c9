//! A load: jobs that keep their queues full for a while, and what that gave.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use block::{AsyncDiskFile, ErrorKind};
use rustix::time::{ClockId, clock_gettime};
use virtio_devices::histogram::Histogram;

use crate::{
    bench::{
        ahci::AhciLane,
        fill::{self, Model, SECTOR, STAMP},
        lane::{AsyncLane, Ended, FrontEnd, Lane, Op},
        virtio::{self, VirtioLane},
    },
    util::{
        errno,
        failure::{Failure, Outcome},
        interrupt,
    },
};

/// Which requests, in which order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    /// fio's name.
    pub(super) name: &'static str,
    pub(super) random: bool,
    /// How many of a hundred requests are reads.
    pub(super) read_percent: u8,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) mix: Mix,
    /// Bytes of a request.
    pub(super) bs: u64,
    /// Requests in flight, each job.
    pub(super) depth: usize,
    pub(super) jobs: usize,
    /// Bytes of the disk that are used: as much for each job, in whole requests.
    pub(super) size: u64,
    pub(super) runtime: Duration,
    /// Flush after so many writes; 0 never.
    pub(super) flush_every: u32,
}

/// What a load gave.
pub(super) struct Measured {
    pub(super) ios: u64,
    pub(super) time: Duration,
    pub(super) cpu: Duration,
    pub(super) latency: Histogram,
}

/// CPU time of the whole process.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = Duration::from_secs(now.tv_sec.cast_unsigned());
    seconds + Duration::from_nanos(now.tv_nsec.cast_unsigned())
}

/// Runs a load. With a model what is read is checked, and what is written is noted.
pub(super) fn run(
    disk: &dyn AsyncDiskFile,
    front_end: FrontEnd,
    load: &Load,
    mut model: Option<&mut Model>,
) -> Outcome<Measured> {
    let device = match front_end {
        FrontEnd::AsyncIo | FrontEnd::Ahci => None,
        FrontEnd::VirtioBlk => Some(virtio::device(disk, load.jobs, load.depth)?),
    };
    let ready = Barrier::new(load.jobs + 1);
    let done = Barrier::new(load.jobs + 1);
    let share = load.size / load.jobs as u64;
    let sectors = (share / SECTOR) as usize;
    let mut parts: Vec<Option<&mut [u32]>> = match &mut model {
        Some(model) => model.writes.chunks_mut(sectors).map(Some).collect(),
        None => Vec::new(),
    };
    parts.resize_with(load.jobs, || None);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, writes) in parts.into_iter().take(load.jobs).enumerate() {
            let (ready, done, device) = (&ready, &done, &device);
            let disk = disk.clone_async();
            let thread = move || {
                let lane: Outcome<Box<dyn Lane>> = match device {
                    None if front_end == FrontEnd::Ahci => {
                        AhciLane::new(&*disk, load.depth, load.bs)
                            .map(|lane| Box::new(lane) as Box<dyn Lane>)
                    }
                    None => AsyncLane::new(&*disk, load.depth, load.bs)
                        .map(|lane| Box::new(lane) as Box<dyn Lane>),
                    Some(device) => VirtioLane::new(device, index, load.depth, load.bs)
                        .map(|lane| Box::new(lane) as Box<dyn Lane>),
                };
                let job =
                    lane.map(|lane| Job::new(lane, load, index as u64 * share, share, writes));
                ready.wait();
                let result = job.and_then(Job::run);
                done.wait();
                result
            };
            threads.push(
                std::thread::Builder::new()
                    .name(format!("bench-{index}"))
                    .spawn_scoped(scope, thread)
                    .map_err(|error| Failure::new(format!("starting a thread: {error}"))),
            );
        }
        ready.wait();
        let (start, cpu) = (Instant::now(), cpu_time());
        done.wait();
        let (time, cpu) = (start.elapsed(), cpu_time().saturating_sub(cpu));
        let mut latency = Histogram::new();
        let mut first = Ok(());
        for thread in threads {
            let result = thread?
                .join()
                .unwrap_or_else(|_| Err(Failure::new("a job panicked")));
            match result {
                Ok(one) => latency.merge(&one),
                Err(failure) => first = first.and(Err(failure)),
            }
        }
        first?;
        Ok(Measured {
            ios: latency.count(),
            time,
            cpu,
            latency,
        })
    })
}

/// What a slot is doing.
#[derive(Clone, Copy)]
struct Flight {
    op: Op,
    /// The block in the job's region.
    block: u64,
    started: Instant,
    /// The number of this write.
    write: u32,
}

struct Job<'a> {
    // Dropped first: it waits for what is in flight.
    lane: Box<dyn Lane>,
    load: &'a Load,
    /// The first byte of the job's region.
    start: u64,
    blocks: u64,
    /// The last write of every sector of the region, if somebody wants to know.
    writes: Option<&'a mut [u32]>,
    flights: Vec<Option<Flight>>,
    /// Blocks in flight; two requests for one would race.
    busy: Vec<bool>,
    next: u64,
    random: u64,
    written: u32,
    unflushed: u32,
    latency: Histogram,
}

impl<'a> Job<'a> {
    fn new(
        mut lane: Box<dyn Lane>,
        load: &'a Load,
        start: u64,
        len: u64,
        writes: Option<&'a mut [u32]>,
    ) -> Self {
        let body = fill::body();
        for slot in 0..load.depth {
            for at in (0..load.bs).step_by(SECTOR as usize) {
                lane.put(slot, at as usize, &body);
            }
        }
        let blocks = len / load.bs;
        // Counting on from what earlier loads wrote keeps every write different.
        let written = writes
            .as_ref()
            .and_then(|w| w.iter().max().copied())
            .unwrap_or(0);
        Self {
            lane,
            load,
            start,
            blocks,
            writes,
            flights: vec![None; load.depth],
            busy: vec![false; blocks as usize],
            next: 0,
            random: start.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            written,
            unflushed: 0,
            latency: Histogram::new(),
        }
    }

    fn run(mut self) -> Outcome<Histogram> {
        let end = Instant::now() + self.load.runtime;
        let mut idle: Vec<usize> = (0..self.load.depth).collect();
        let mut ended: Vec<Ended> = Vec::with_capacity(self.load.depth);
        let mut running = true;
        loop {
            if running && !idle.is_empty() {
                let now = Instant::now();
                running = now < end;
                if running {
                    for slot in idle.drain(..) {
                        self.start(slot, now)?;
                    }
                    self.lane.kick()?;
                }
            }
            if !running && idle.len() == self.load.depth {
                return Ok(self.latency);
            }
            self.lane.reap(&mut ended)?;
            interrupt::check()?;
            if ended.is_empty() {
                self.lane.wait()?;
                continue;
            }
            let now = Instant::now();
            for (slot, result) in ended.drain(..) {
                self.finish(slot, result, now)?;
                idle.push(slot);
            }
        }
    }

    fn random(&mut self) -> u64 {
        // xorshift64*: cheap, and good enough to spread requests.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn pick(&mut self) -> u64 {
        let mut block = if self.load.mix.random {
            // The upper half times the range: no division.
            ((u128::from(self.random()) * u128::from(self.blocks)) >> 64) as u64
        } else {
            self.next
        };
        while self.busy[block as usize] {
            block = (block + 1) % self.blocks;
        }
        self.next = (block + 1) % self.blocks;
        block
    }

    fn start(&mut self, slot: usize, now: Instant) -> Outcome<()> {
        let flush = self.load.flush_every;
        let op = if flush > 0 && self.unflushed >= flush {
            Op::Flush
        } else {
            let percent = self.load.mix.read_percent;
            let reads = match percent {
                0 | 100 => percent == 100,
                percent => self.random() >> 32 < (u64::from(percent) << 32) / 100,
            };
            if reads { Op::Read } else { Op::Write }
        };
        let block = if op == Op::Flush { 0 } else { self.pick() };
        let offset = self.start + block * self.load.bs;
        match op {
            Op::Flush => self.unflushed = 0,
            Op::Read => self.busy[block as usize] = true,
            Op::Write => {
                self.busy[block as usize] = true;
                self.unflushed += 1;
                self.written = self.written.wrapping_add(1);
                if self.writes.is_some() {
                    self.stamp(slot, offset);
                }
            }
        }
        self.flights[slot] = Some(Flight {
            op,
            block,
            started: now,
            write: self.written,
        });
        self.lane.push(slot, op, offset)
    }

    fn stamp(&mut self, slot: usize, offset: u64) {
        for (at, sector) in (0..self.load.bs)
            .step_by(SECTOR as usize)
            .zip(offset / SECTOR..)
        {
            let stamp = fill::stamp(sector, self.written);
            self.lane.put(slot, at as usize, &stamp);
        }
    }

    fn finish(&mut self, slot: usize, result: Result<(), ErrorKind>, now: Instant) -> Outcome<()> {
        let Some(flight) = self.flights[slot].take() else {
            return Err(Failure::new(format!("slot {slot} ended twice")));
        };
        let offset = self.start + flight.block * self.load.bs;
        if let Err(kind) = result {
            let text = errno::request_text(kind);
            let op = format!("{:?}", flight.op).to_lowercase();
            return Err(Failure::new(format!(
                "{op} at offset {offset} failed: {text}"
            )));
        }
        let time = now.saturating_duration_since(flight.started);
        self.latency.record(time.as_nanos() as u64);
        if flight.op == Op::Flush {
            return Ok(());
        }
        self.busy[flight.block as usize] = false;
        let Some(writes) = &mut self.writes else {
            return Ok(());
        };
        let first = (flight.block * self.load.bs / SECTOR) as usize;
        let last = first + (self.load.bs / SECTOR) as usize;
        if flight.op == Op::Write {
            writes[first..last].fill(flight.write);
            return Ok(());
        }
        for (index, write) in writes[first..last].iter().enumerate() {
            let sector = offset / SECTOR + index as u64;
            let mut found = [0; STAMP];
            self.lane.get(slot, index * SECTOR as usize, &mut found);
            if found != fill::stamp(sector, *write) {
                return Err(Failure::new(format!(
                    "VERIFICATION FAILED: a read of sector {sector} did not return what write {write} wrote"
                )));
            }
        }
        Ok(())
    }
}
