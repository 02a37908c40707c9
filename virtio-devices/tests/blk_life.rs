//! Drain, reset, restart, migration, and the loop that serves doorbells.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    cell::RefCell,
    os::fd::{AsRawFd, BorrowedFd},
    rc::Rc,
    sync::Arc,
    thread,
};

use common::{DATA, Guest, IOERR, MEMORY, OK};
use virtio_devices::{
    Interrupt,
    testing::{CountingInterrupt, MockDisk, MockDiskConfig},
    virtio::InflightTracker,
    virtio_blk::{
        VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig},
    },
    worker::Progress,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    bitmap::{AtomicBitmap, Bitmap},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn sector(at: u64) -> [(GuestAddress, u32); 1] {
    [(GuestAddress(DATA + at), 512)]
}

fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[test]
fn drain_takes_nothing_new_and_posts_everything() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.turn(), []);
    guest.driver.read(1, &sector(0));
    let _ = guest.driver.publish();
    let disk = guest.disk.clone();
    let later = thread::spawn(move || {
        thread::sleep(std::time::Duration::from_millis(20));
        disk.release_all();
    });
    guest.worker.drain().unwrap();
    later.join().unwrap();
    assert_eq!(guest.worker.outstanding(), 0);
    let state = guest.worker.queue_state();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    assert_eq!(guest.poll().len(), 1);
    // It goes on from there.
    guest.disk.hold(false);
    assert_eq!(guest.turn().len(), 1);
}

#[test]
fn reset_in_flight_waits_for_the_disk_and_posts_nothing() {
    let mut guest = Guest::new();
    guest.fill(DATA, 512, 3);
    guest.disk.hold(true);
    guest.driver.write(0, &sector(0));
    guest.driver.read(1, &sector(512));
    assert_eq!(guest.turn(), []);
    let disk = guest.disk.clone();
    let later = thread::spawn(move || {
        thread::sleep(std::time::Duration::from_millis(20));
        disk.release_all();
    });
    guest.worker.reset().unwrap();
    assert_eq!(
        guest.disk.held(),
        0,
        "nothing refers to guest memory any more"
    );
    later.join().unwrap();
    guest.process();
    assert_eq!(guest.poll(), []);
    assert_eq!(guest.interrupt.count(0), 0);
    assert_eq!(guest.worker.outstanding(), 0);
    assert_eq!(guest.disk.contents()[..512], [3; 512]);
    // The driver starts again from nothing.
    guest.disk.hold(false);
    guest.device.reset();
    guest.device.ack_features(guest.device.features()).unwrap();
    guest.driver = Driver::new(
        &guest.memory,
        GuestAddress(0),
        DriverConfig {
            queue_size: 64,
            ..DriverConfig::default()
        },
    )
    .unwrap();
    guest.worker = guest
        .device
        .queue_worker(
            0,
            &guest.driver.queue(),
            Arc::clone(&guest.memory),
            guest.interrupt.clone(),
        )
        .unwrap();
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.one().status, OK);
}

#[test]
fn stop_says_where_the_queue_stands() {
    let mut guest = Guest::new();
    for _ in 0..5 {
        guest.driver.read(0, &sector(0));
    }
    assert_eq!(guest.turn().len(), 5);
    let state = guest.worker.stop().unwrap();
    assert_eq!((state.next_avail, state.next_used), (5, 5));
}

/// Records the calls of the inflight protocol.
struct Recorder(Rc<RefCell<Vec<String>>>);

impl InflightTracker for Recorder {
    fn popped(&mut self, head: u16) {
        self.0.borrow_mut().push(format!("popped {head}"));
    }

    fn publishing(&mut self, heads: &mut dyn Iterator<Item = u16>) {
        let heads: Vec<u16> = heads.collect();
        self.0.borrow_mut().push(format!("publishing {heads:?}"));
    }

    fn published(&mut self, heads: &mut dyn Iterator<Item = u16>, used_idx: u16) {
        let heads: Vec<u16> = heads.collect();
        self.0
            .borrow_mut()
            .push(format!("published {heads:?} {used_idx}"));
    }
}

#[test]
fn the_inflight_tracker_is_told_in_the_order_of_the_protocol() {
    let mut guest = Guest::new();
    let calls = Rc::new(RefCell::new(Vec::new()));
    guest
        .worker
        .set_inflight_tracker(Box::new(Recorder(Rc::clone(&calls))));
    guest.disk.hold(true);
    // Heads are multiples of a chain's length, 6 here.
    for index in 0..3 {
        guest.driver.read(index, &sector(0));
    }
    assert_eq!(guest.turn(), []);
    guest.disk.release(1);
    guest.disk.release(1);
    assert_eq!(guest.turn().len(), 2);
    assert_eq!(
        *calls.borrow(),
        [
            "popped 0",
            "popped 6",
            "popped 12",
            "publishing [6, 12]",
            "published [6, 12] 2"
        ]
    );
}

#[test]
fn what_a_killed_process_had_taken_is_done_again() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    guest.fill(DATA, 1024, 9);
    guest.driver.write(0, &sector(0));
    guest.driver.write(1, &sector(512));
    guest.driver.read(2, &sector(1024));
    assert_eq!(guest.turn(), []);
    guest.disk.release(1);
    assert_eq!(guest.turn().len(), 1);
    // The process dies: what is in flight never completes. Heads 0 and 12 are left.
    let interrupts = guest.interrupt.count(0);
    let mut queue = guest.driver.queue();
    virtio_queue::QueueT::set_next_used(&mut queue, 1);
    virtio_queue::QueueT::set_next_avail(&mut queue, 3);
    let disk = MockDisk::new(MockDiskConfig::default());
    let device = VirtioBlk::new(Box::new(disk.clone()), guest.device.config().clone()).unwrap();
    device.ack_features(guest.device.acked_features()).unwrap();
    let old = std::mem::replace(
        &mut guest.worker,
        device
            .queue_worker(
                0,
                &queue,
                Arc::clone(&guest.memory),
                guest.interrupt.clone(),
            )
            .unwrap(),
    );
    guest.worker.resubmit(&[0, 12]).unwrap();
    assert!(guest.interrupt.count(0) > interrupts);
    let ended = guest.poll();
    assert_eq!(ended.len(), 2);
    assert!(ended.iter().all(|used| used.status == OK));
    assert_eq!(disk.contents()[..512], [9; 512]);
    let state = guest.worker.queue_state();
    assert_eq!((state.next_avail, state.next_used), (3, 3));
    // Nonsense in the region is refused.
    let error = guest.worker.resubmit(&[64]).unwrap_err().to_string();
    assert!(error.contains("head 64"), "{error}");
    disk.hold(true);
    assert!(guest.worker.resubmit(&[6, 6]).is_err());
    disk.release_all();
    drop(old);
}

#[test]
fn filled_pages_and_the_used_ring_are_marked_dirty() {
    type Tracked = GuestMemoryMmap<AtomicBitmap>;
    let memory: Arc<Tracked> =
        Arc::new(Tracked::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    let disk = MockDisk::new(MockDiskConfig::default());
    let device = VirtioBlk::new(Box::new(disk), VirtioBlkConfig::default()).unwrap();
    device.ack_features(device.features()).unwrap();
    // Used ring and slots beyond the first page.
    let mut driver = Driver::new(&memory, GuestAddress(0x8000), DriverConfig::default()).unwrap();
    let line = Arc::new(CountingInterrupt::new(1).unwrap());
    let mut worker = device
        .queue_worker(0, &driver.queue(), Arc::clone(&memory), line)
        .unwrap();
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let dirty = |address: u64| {
        use vm_memory::GuestMemoryRegion;
        region.bitmap().dirty_at(address as usize)
    };
    driver.read(0, &[(GuestAddress(DATA + 0x1ff0), 8192)]);
    driver.write(0, &[(GuestAddress(DATA + 0x10000), 512)]);
    let _ = driver.publish();
    assert_eq!(worker.process(), Progress::Idle);
    assert_eq!(driver.poll(|used| assert_eq!(used.status, OK)), 2);
    assert!(!dirty(DATA) && !dirty(DATA + 0x4000));
    assert!(dirty(DATA + 0x1ff0) && dirty(DATA + 0x2000) && dirty(DATA + 0x3fef));
    assert!(!dirty(DATA + 0x10000), "a write only reads guest memory");
    assert!(dirty(driver.used_ring().0));
}

#[test]
fn a_new_memory_map_is_used_for_the_next_batch_while_the_old_one_lives() {
    type Memory = GuestMemoryMmap<()>;
    let small = Memory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let extra = vm_memory::GuestRegionMmap::new(
        vm_memory::MmapRegion::new(0x1000).unwrap(),
        GuestAddress(0x40_0000),
    );
    let grown = small.insert_region(Arc::new(extra.unwrap())).unwrap();
    let atomic = GuestMemoryAtomic::new(small);
    let disk = MockDisk::new(MockDiskConfig::default());
    disk.write(0, &[8; 512]);
    let device = VirtioBlk::new(Box::new(disk.clone()), VirtioBlkConfig::default()).unwrap();
    device.ack_features(device.features()).unwrap();
    let memory = {
        use vm_memory::GuestAddressSpace;
        atomic.memory().into_inner()
    };
    let mut driver = Driver::new(&memory, GuestAddress(0), DriverConfig::default()).unwrap();
    let line = Arc::new(CountingInterrupt::new(1).unwrap());
    let mut worker = device
        .queue_worker(0, &driver.queue(), atomic.clone(), line)
        .unwrap();
    let data = [(GuestAddress(0x40_0000), 512)];
    driver.read(0, &data);
    let _ = driver.publish();
    worker.process();
    driver.poll(|used| assert_eq!(used.status, IOERR));
    disk.hold(true);
    driver.read(0, &[(GuestAddress(DATA), 512)]);
    let _ = driver.publish();
    worker.process();
    atomic.lock().unwrap().replace(grown.clone());
    driver.read(0, &data);
    let _ = driver.publish();
    worker.process();
    disk.release_all();
    worker.process();
    assert_eq!(driver.poll(|used| assert_eq!(used.status, OK)), 2);
    let mut out = [0; 512];
    grown.read_slice(&mut out, GuestAddress(0x40_0000)).unwrap();
    assert_eq!(out, [8; 512]);
}

#[test]
fn memory_is_pinned_once_a_map_and_only_if_asked() {
    type Memory = GuestMemoryMmap<()>;
    let regions = |count: u64| {
        let ranges: Vec<_> = (0..count)
            .map(|n| (GuestAddress(n << 21), 0x20_0000))
            .collect();
        Memory::from_ranges(&ranges).unwrap()
    };
    for pin_memory in [false, true] {
        let atomic = GuestMemoryAtomic::new(regions(1));
        let disk = MockDisk::new(MockDiskConfig::default());
        let config = VirtioBlkConfig {
            pin_memory,
            ..VirtioBlkConfig::default()
        };
        let device = VirtioBlk::new(Box::new(disk.clone()), config).unwrap();
        device.ack_features(device.features()).unwrap();
        let memory = {
            use vm_memory::GuestAddressSpace;
            atomic.memory().into_inner()
        };
        let driver = Driver::new(&memory, GuestAddress(0), DriverConfig::default()).unwrap();
        let line = Arc::new(CountingInterrupt::new(1).unwrap());
        let mut worker = device
            .queue_worker(0, &driver.queue(), atomic.clone(), line)
            .unwrap();
        worker.process();
        worker.process();
        assert_eq!(disk.pinned(), [1].repeat(usize::from(pin_memory)));
        atomic.lock().unwrap().replace(regions(2));
        worker.process();
        worker.process();
        let expected: &[usize] = if pin_memory { &[1, 2] } else { &[] };
        assert_eq!(disk.pinned(), expected);
    }
}

#[test]
fn run_serves_doorbells_until_it_is_stopped_and_can_run_again() {
    let memory = common::memory();
    let disk = MockDisk::new(MockDiskConfig::default());
    let device = VirtioBlk::new(Box::new(disk), VirtioBlkConfig::default()).unwrap();
    device.ack_features(device.features()).unwrap();
    let mut driver = Driver::new(&memory, GuestAddress(0), DriverConfig::default()).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let line = Arc::new(CountingInterrupt::new(1).unwrap());
    let interrupt: Arc<dyn Interrupt> = line.clone();
    let queue = driver.queue();
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut worker = device
                .queue_worker(0, &queue, Arc::clone(&memory), interrupt)
                .unwrap();
            for _ in 0..3 {
                worker.run(borrowed(&kick), borrowed(&stop)).unwrap();
                stop.read().unwrap();
            }
            worker.stop().unwrap()
        });
        let mut total = 0;
        for round in 0..3 {
            for index in 0..200u64 {
                driver.arm_interrupt();
                driver.read(index, &sector(0)).unwrap();
                if driver.publish() {
                    kick.write(1).unwrap();
                }
                while driver.poll(|used| assert_eq!(used.status, OK)) == 0 {
                    thread::yield_now();
                }
                total += 1;
            }
            stop.write(1).unwrap();
            if round < 2 {
                while stop.as_fd_readable() {
                    thread::yield_now();
                }
            }
        }
        let state = worker.join().unwrap();
        assert_eq!(usize::from(state.next_used), total);
        assert!(line.count(0) > 0);
    });
}

/// Whether an eventfd still has something to read.
trait Readable {
    fn as_fd_readable(&self) -> bool;
}

impl Readable for EventFd {
    fn as_fd_readable(&self) -> bool {
        let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
        epoll
            .ctl(
                vmm_sys_util::epoll::ControlOperation::Add,
                self.as_raw_fd(),
                vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0),
            )
            .unwrap();
        let mut events = [vmm_sys_util::epoll::EpollEvent::default()];
        epoll.wait(0, &mut events).unwrap() > 0
    }
}
