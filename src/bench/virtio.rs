//! The way through the virtio-blk device: a driver with split rings in guest memory, and the device's
//! worker, on one thread. A doorbell is a call, an interrupt a count.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use block::{AsyncDiskFile, ErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_devices::{
    Interrupt,
    virtio_blk::{
        BlkWorker, VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig},
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    bench::lane::{Ended, Lane, Op, PATIENCE},
    util::failure::{Failure, Outcome},
};

/// Bytes of a sector as virtio counts them.
const SECTOR: u64 = 512;

/// A device for `jobs` queues of the disk.
pub(super) fn device(
    disk: &dyn AsyncDiskFile,
    jobs: usize,
    depth: usize,
) -> Outcome<Arc<VirtioBlk>> {
    let config = VirtioBlkConfig {
        num_queues: u16::try_from(jobs).unwrap_or(u16::MAX),
        queue_size: driver_config(depth).queue_size,
        ring_depth: depth as u32,
        ..VirtioBlkConfig::default()
    };
    let device = VirtioBlk::new(disk.clone_async(), config).map_err(failed)?;
    device.ack_features(device.features()).map_err(failed)?;
    Ok(device)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: virtio_devices::Error) -> Failure {
    Failure::new(error.to_string())
}

fn driver_config(depth: usize) -> DriverConfig {
    DriverConfig {
        // Three descriptors a request: header, data, status.
        queue_size: (depth as u16 * 3).next_power_of_two(),
        ..DriverConfig::default()
    }
}

/// Counts interrupts.
#[derive(Default)]
struct Counter(AtomicU64);

impl Interrupt for Counter {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A queue of the device, with its driver.
pub(super) struct VirtioLane {
    // Dropped first: it waits for what is in flight.
    worker: BlkWorker<Arc<GuestMemoryMmap>>,
    driver: Driver,
    memory: Arc<GuestMemoryMmap>,
    data: u64,
    bs: u64,
    /// Which of our slots the driver's slot serves.
    slots: Vec<usize>,
}

impl VirtioLane {
    /// Queue `index` of the device.
    pub(super) fn new(device: &VirtioBlk, index: usize, depth: usize, bs: u64) -> Outcome<Self> {
        let config = driver_config(depth);
        let data = (config.bytes() as u64).next_multiple_of(4096);
        let size = data + bs.next_multiple_of(4096) * depth as u64;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)])
            .map_err(|error| Failure::new(format!("guest memory of {size} bytes: {error}")))?;
        let memory = Arc::new(memory);
        let mut driver = Driver::new(&memory, GuestAddress(0), config).map_err(failed)?;
        driver.disarm_interrupt();
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        let queue = driver.queue();
        let interrupt = Arc::new(Counter::default());
        let worker = device
            .queue_worker(index, &queue, Arc::clone(&memory), interrupt)
            .map_err(failed)?;
        Ok(Self {
            worker,
            slots: vec![0; config.slots()],
            driver,
            memory,
            data,
            bs,
        })
    }

    fn address(&self, slot: usize) -> GuestAddress {
        GuestAddress(self.data + self.bs.next_multiple_of(4096) * slot as u64)
    }
}

impl Lane for VirtioLane {
    fn push(&mut self, slot: usize, op: Op, offset: u64) -> Outcome<()> {
        let data = [(self.address(slot), self.bs as u32)];
        let sector = offset / SECTOR;
        let used = match op {
            Op::Read => self.driver.read(sector, &data),
            Op::Write => self.driver.write(sector, &data),
            Op::Flush => self.driver.flush(),
        };
        let used = used.ok_or_else(|| Failure::new("the ring has no room for a request"))?;
        self.slots[usize::from(used)] = slot;
        Ok(())
    }

    fn kick(&mut self) -> Outcome<()> {
        if self.driver.publish() {
            self.worker.process();
        }
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Outcome<()> {
        self.worker.process();
        let slots = &self.slots;
        self.driver.poll(|used| {
            let result = match used.status {
                0 => Ok(()),
                2 => Err(ErrorKind::Unsupported),
                _ => Err(ErrorKind::Io(libc::EIO)),
            };
            ended.push((slots[usize::from(used.slot)], result));
        });
        Ok(())
    }

    fn wait(&mut self) -> Outcome<()> {
        let mut fds = [PollFd::from_borrowed_fd(
            self.worker.notifier(),
            PollFlags::IN,
        )];
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
