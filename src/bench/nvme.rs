//! The way through the NVMe controller: a driver with queues in guest memory, and the controller's
//! worker, on one thread. A doorbell is a call, an interrupt a count.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use block::{AsyncDiskFile, ErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_devices::{
    VectorInterrupt,
    nvme::{
        NamespaceConfig, NvmeConfig, NvmeController, NvmeWorker, Subsystem, SubsystemConfig,
        driver::{Entry, QueuePair},
    },
    worker::Progress,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    bench::lane::{Ended, Lane, Op, PATIENCE},
    util::failure::{Failure, Outcome},
};

type Memory = GuestMemoryMmap;

/// Entries of a queue: the power of two above the depth, so that it is never full.
fn entries(depth: usize) -> u16 {
    (depth + 1).next_power_of_two().clamp(2, 4096) as u16
}

/// Counts interrupts.
#[derive(Default)]
struct Counter(AtomicU64);

impl VectorInterrupt for Counter {
    fn signal(&self, _vector: u16) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn set_level(&self, _asserted: bool) {}
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: virtio_devices::Error) -> Failure {
    Failure::new(error.to_string())
}

/// A controller with one I/O queue pair, and its driver.
pub(super) struct NvmeLane {
    // Dropped first: it waits for what is in flight.
    worker: NvmeWorker<Arc<Memory>>,
    admin: NvmeWorker<Arc<Memory>>,
    controller: NvmeController,
    queue: QueuePair,
    memory: Arc<Memory>,
    data: u64,
    bs: u64,
    shift: u32,
}

impl NvmeLane {
    /// A controller of its own over the disk, enabled, with a queue pair.
    pub(super) fn new(disk: &dyn AsyncDiskFile, depth: usize, bs: u64) -> Outcome<Self> {
        let size = entries(depth);
        let subsystem = Subsystem::new(SubsystemConfig::default()).map_err(failed)?;
        let namespace = NamespaceConfig::default();
        subsystem
            .add_namespace(disk.clone_async(), &namespace)
            .map_err(failed)?;
        let config = NvmeConfig {
            io_queues: 1,
            workers: 1,
            vectors: 2,
            ring_depth: depth as u32,
            mdts: 13,
            inline: true,
            ..NvmeConfig::default()
        };
        let interrupts = Arc::new(Counter::default());
        let controller = NvmeController::new(&subsystem, config, interrupts).map_err(failed)?;
        let shift = subsystem
            .namespace(1)
            .map_or(9, |it| it.lba_size().trailing_zeros());

        // The admin queue, the I/O queues, a PRP list for each slot, the data.
        // Queues begin with a page.
        let sq = 0x4000;
        let cq = sq + (u64::from(size) * 64).next_multiple_of(4096);
        let lists = (cq + u64::from(size) * 16).next_multiple_of(4096);
        let list_bytes = 8 * bs.div_ceil(4096);
        let list_stride = list_bytes.next_multiple_of(4096);
        let data = lists + list_stride * depth as u64;
        let total = data + bs.next_multiple_of(4096) * depth as u64;
        let memory = Memory::from_ranges(&[(GuestAddress(0), total as usize)])
            .map_err(|error| Failure::new(format!("guest memory of {total} bytes: {error}")))?;
        let memory = Arc::new(memory);
        let mut lane = Self {
            admin: controller.worker(0, Arc::clone(&memory)).map_err(failed)?,
            worker: controller.worker(1, Arc::clone(&memory)).map_err(failed)?,
            queue: QueuePair::new(&memory, 1, sq, cq, size),
            controller,
            memory,
            data,
            bs,
            shift,
        };
        lane.write_lists(lists, list_stride, depth)?;
        lane.set_up()?;
        Ok(lane)
    }

    fn write_lists(&self, lists: u64, stride: u64, depth: usize) -> Outcome<()> {
        for slot in 0..depth {
            let pages = self.bs.div_ceil(4096);
            let list: Vec<u8> = (1..pages)
                .flat_map(|page| (self.address(slot).0 + page * 4096).to_le_bytes())
                .collect();
            let at = GuestAddress(lists + stride * slot as u64);
            self.memory
                .write_slice(&list, at)
                .map_err(|error| Failure::new(format!("guest memory: {error}")))?;
        }
        Ok(())
    }

    fn set_up(&mut self) -> Outcome<()> {
        let mut admin = QueuePair::new(&self.memory, 0, 0, 0x1000, 16);
        self.controller.write(0x24, &0x000f_000f_u32.to_le_bytes());
        self.controller.write(0x28, &0_u64.to_le_bytes());
        self.controller.write(0x30, &0x1000_u64.to_le_bytes());
        self.controller.write(0x14, &0x0046_0001_u32.to_le_bytes());
        self.admin.process();
        let size = u32::from(self.queue.size) - 1;
        for (opcode, at, flags) in [
            (5, self.queue.cq, 3 | 1 << 16),
            (1, self.queue.sq, 1 | 1 << 16),
        ] {
            let entry = Entry::new(opcode).data(at, 0);
            admin.push(&entry.cdw(10, 1 | size << 16).cdw(11, flags));
            admin.ring(&self.controller);
            self.admin.process();
            let done = admin.next();
            if !done.is_some_and(|it| it.status.is_success()) {
                return Err(Failure::new(format!("no queue was created: {done:?}")));
            }
        }
        self.worker.process();
        Ok(())
    }

    fn address(&self, slot: usize) -> GuestAddress {
        GuestAddress(self.data + self.bs.next_multiple_of(4096) * slot as u64)
    }

    fn list(&self, slot: usize) -> u64 {
        let stride = (8 * self.bs.div_ceil(4096)).next_multiple_of(4096);
        let lists = (self.queue.cq + u64::from(self.queue.size) * 16).next_multiple_of(4096);
        lists + stride * slot as u64
    }
}

impl Lane for NvmeLane {
    fn push(&mut self, slot: usize, op: Op, offset: u64) -> Outcome<()> {
        let data = self.address(slot).0;
        let second = if self.bs <= 8192 {
            data + 4096
        } else {
            self.list(slot)
        };
        let entry = |opcode| {
            Entry::new(opcode)
                .nsid(1)
                .blocks(offset >> self.shift, (self.bs >> self.shift) as u32)
                .data(data, second)
        };
        let entry = match op {
            Op::Read => entry(2),
            Op::Write => entry(1),
            Op::Flush => Entry::new(0).nsid(1),
        };
        self.queue.push(&entry.cid(slot as u16));
        Ok(())
    }

    fn kick(&mut self) -> Outcome<()> {
        self.queue.ring(&self.controller);
        self.worker.process();
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Outcome<()> {
        while self.worker.process() == Progress::More {}
        let took = self.queue.poll(|done| {
            let result = if done.status.is_success() {
                Ok(())
            } else {
                Err(ErrorKind::Io(libc::EIO))
            };
            ended.push((usize::from(done.cid), result));
        });
        if took > 0 {
            self.queue.release(&self.controller);
        }
        Ok(())
    }

    fn wait(&mut self) -> Outcome<()> {
        let notifiers: Vec<BorrowedFd<'_>> = self.worker.notifiers().collect();
        let mut fds: Vec<PollFd<'_>> = notifiers
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
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
        let address = GuestAddress(self.address(slot).0 + at as u64);
        let done = self.memory.write_slice(bytes, address);
        debug_assert!(done.is_ok(), "buffers are in guest memory");
    }

    fn get(&self, slot: usize, at: usize, bytes: &mut [u8]) {
        let address = GuestAddress(self.address(slot).0 + at as u64);
        let done = self.memory.read_slice(bytes, address);
        debug_assert!(done.is_ok(), "buffers are in guest memory");
    }
}
