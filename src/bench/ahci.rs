//! The way through the AHCI host bus adapter: a driver with a command list in guest memory, and the
//! port's worker, on one thread. Every job has an adapter of its own; requests are queued commands.

use std::sync::Arc;

use block::AsyncDiskFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_devices::{
    ahci::{
        Hba, HbaConfig, PortWorker,
        driver::{Driver, Issue, Layout, command, queued},
        regs::px,
    },
    ata::{DiskConfig, opcode},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    bench::lane::{Ended, Lane, Op, PATIENCE},
    util::failure::{Failure, Outcome},
};

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Commands that a port takes at once.
const TAGS: usize = 32;

/// Bytes that one descriptor can describe.
const DESCRIPTOR: u64 = 4 << 20;

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: virtio_devices::Error) -> Failure {
    Failure::new(error.to_string())
}

/// A port of an adapter, with its driver.
pub(super) struct AhciLane {
    // Dropped first: it waits for what is in flight.
    worker: PortWorker<Arc<GuestMemoryMmap>>,
    driver: Driver<GuestMemoryMmap>,
    memory: Arc<GuestMemoryMmap>,
    data: u64,
    bs: u64,
    pushed: Vec<(usize, Op, u64)>,
    waiting: Vec<(usize, Op, u64)>,
    /// A flush is no queued command: nothing is issued beside it.
    flushes: Vec<usize>,
    flushing: bool,
}

impl AhciLane {
    /// A port with the disk.
    pub(super) fn new(disk: &dyn AsyncDiskFile, depth: usize, bs: u64) -> Outcome<Self> {
        if depth > TAGS {
            return Err(Failure::new(format!(
                "--iodepth {depth}: AHCI has {TAGS} commands at once"
            )));
        }
        if bs > DESCRIPTOR {
            return Err(Failure::new(format!(
                "--bs {bs}: at most 4M through AHCI here"
            )));
        }
        let layout = Layout {
            base: 0,
            descriptors: 8,
        };
        let data = layout.bytes().next_multiple_of(4096);
        let size = data + bs.next_multiple_of(4096) * depth as u64;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)])
            .map_err(|error| Failure::new(format!("guest memory of {size} bytes: {error}")))?;
        let memory = Arc::new(memory);
        let hba = Arc::new(Hba::new(HbaConfig::default()).map_err(failed)?);
        hba.plug_disk(0, disk.clone_async(), DiskConfig::default())
            .map_err(failed)?;
        let mut worker = hba.port_worker(0, Arc::clone(&memory)).map_err(failed)?;
        let driver = Driver::new(hba, 0, Arc::clone(&memory), layout);
        driver.receive();
        worker.process();
        driver.start();
        Ok(Self {
            worker,
            driver,
            memory,
            data,
            bs,
            pushed: Vec::new(),
            waiting: Vec::new(),
            flushes: Vec::new(),
            flushing: false,
        })
    }

    fn address(&self, slot: usize) -> u64 {
        self.data + self.bs.next_multiple_of(4096) * slot as u64
    }

    fn prepare(&mut self, slot: usize, op: Op, offset: u64) {
        let data = [(self.address(slot), self.bs as u32)];
        let task = match op {
            Op::Flush => command(opcode::FLUSH_CACHE_EXT, 0, 0),
            op => queued(
                slot as u8,
                op == Op::Write,
                offset / SECTOR,
                (self.bs / SECTOR) as u16,
            ),
        };
        self.driver.prepare(
            slot as u32,
            &Issue {
                task,
                write: op == Op::Write,
                packet: None,
                data: if op == Op::Flush { &[] } else { &data },
            },
        );
    }

    /// Issues what was pushed; returns whether there was something that could be. Flushes wait until
    /// the port is empty, and everything else for them.
    fn issue(&mut self) -> bool {
        for (slot, op, offset) in std::mem::take(&mut self.pushed) {
            match op {
                Op::Flush => self.flushes.push(slot),
                op => self.waiting.push((slot, op, offset)),
            }
        }
        if self.flushing || (self.flushes.is_empty() && self.waiting.is_empty()) {
            return false;
        }
        if self.flushes.is_empty() {
            for (slot, op, offset) in std::mem::take(&mut self.waiting) {
                self.prepare(slot, op, offset);
            }
            self.driver.issue();
            return true;
        }
        if self.driver.issued() == 0
            && let Some(slot) = self.flushes.pop()
        {
            self.flushing = true;
            self.prepare(slot, Op::Flush, 0);
            self.driver.issue();
            return true;
        }
        false
    }
}

impl AhciLane {
    /// Appends what has ended.
    fn collect(&mut self, ended: &mut Vec<Ended>) -> Outcome<()> {
        let mut slots = self.driver.ended();
        while slots != 0 {
            ended.push((slots.trailing_zeros() as usize, Ok(())));
            slots &= slots - 1;
            self.flushing = false;
        }
        if self.driver.get(px::TFD) & 1 != 0 {
            return Err(Failure::new("the port reported an error"));
        }
        Ok(())
    }
}

impl Lane for AhciLane {
    fn push(&mut self, slot: usize, op: Op, offset: u64) -> Outcome<()> {
        self.pushed.push((slot, op, offset));
        Ok(())
    }

    fn kick(&mut self) -> Outcome<()> {
        self.issue();
        self.worker.process();
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Outcome<()> {
        self.worker.process();
        self.collect(ended)?;
        // What waited for the end of something else may have ended already, too: nobody will say so
        // again.
        while self.issue() {
            self.worker.process();
            self.collect(ended)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Outcome<()> {
        let mut fds: Vec<PollFd<'_>> = self
            .worker
            .notifiers()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let timeout = Timespec {
            tv_sec: PATIENCE.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(Failure::new("no request ended within a minute")),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Failure::new(format!("waiting for I/O: {error}"))),
        }
    }

    fn put(&mut self, slot: usize, at: usize, bytes: &[u8]) {
        let address = GuestAddress(self.address(slot) + at as u64);
        let done = self.memory.write_slice(bytes, address);
        debug_assert!(done.is_ok(), "buffers are in guest memory");
    }

    fn get(&self, slot: usize, at: usize, bytes: &mut [u8]) {
        let address = GuestAddress(self.address(slot) + at as u64);
        let done = self.memory.read_slice(bytes, address);
        debug_assert!(done.is_ok(), "buffers are in guest memory");
    }
}
