//! Rings, doorbells, interrupts, capacity.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};

use common::{DATA, Guest, OK, Setup};
use virtio_devices::{
    Interrupt,
    testing::{CountingInterrupt, MockDisk, MockDiskConfig},
    virtio::QueueFault,
    virtio_blk::{
        VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig},
    },
    worker::Progress,
};
use vm_memory::GuestAddress;

fn sector(at: u64) -> [(GuestAddress, u32); 1] {
    [(GuestAddress(DATA + at), 512)]
}

fn flags_mode() -> Guest {
    let mut setup = Setup::default();
    setup.driver.event_idx = false;
    Guest::with(setup)
}

#[test]
fn one_kick_is_one_batch_and_its_completions_are_one_interrupt() {
    for event_idx in [false, true] {
        let mut setup = Setup::default();
        setup.driver.event_idx = event_idx;
        let mut guest = Guest::with(setup);
        for index in 0..10 {
            guest.driver.read(index, &sector(512 * index));
        }
        assert!(guest.driver.publish());
        guest.driver.arm_interrupt();
        guest.process();
        assert_eq!(guest.disk.batches(), [10]);
        assert_eq!(guest.poll().len(), 10);
        assert_eq!(guest.interrupt.count(0), 1, "event_idx {event_idx}");
    }
}

#[test]
fn completions_in_any_order_are_posted_as_they_end() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    let slots: Vec<u16> = (0..4)
        .map(|index| guest.driver.read(index, &sector(0)).unwrap())
        .collect();
    assert_eq!(guest.turn(), []);
    guest.disk.release(2);
    assert_eq!(guest.one().slot, slots[2]);
    guest.disk.release_all();
    let rest: Vec<u16> = guest.turn().iter().map(|used| used.slot).collect();
    assert_eq!(rest, [slots[0], slots[1], slots[3]]);
}

#[test]
fn a_doorbell_is_wanted_while_a_request_is_in_flight() {
    for event_idx in [false, true] {
        let mut setup = Setup::default();
        setup.driver.event_idx = event_idx;
        let mut guest = Guest::with(setup);
        guest.disk.hold(true);
        guest.driver.flush();
        assert!(guest.driver.publish());
        guest.process();
        // The only request in flight is slow; the next one must not wait for it.
        guest.driver.read(0, &sector(0));
        assert!(guest.driver.publish(), "event_idx {event_idx}");
        // Posted but not yet noticed: one doorbell is enough.
        guest.driver.read(1, &sector(0));
        let again = guest.driver.publish();
        assert_eq!(again, !event_idx);
        guest.process();
        assert_eq!(guest.disk.held(), 3);
    }
}

#[test]
fn no_interrupt_without_event_idx_when_the_driver_says_so() {
    let mut guest = flags_mode();
    guest.driver.disarm_interrupt();
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.turn().len(), 1);
    assert_eq!(guest.interrupt.count(0), 0);
    guest.driver.arm_interrupt();
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.turn().len(), 1);
    assert_eq!(guest.interrupt.count(0), 1);
}

#[test]
fn one_interrupt_for_two_requests_and_none_before_the_used_event() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    guest.driver.arm_interrupt_after(1);
    guest.driver.read(0, &sector(0));
    guest.driver.read(1, &sector(0));
    assert_eq!(guest.turn(), []);
    guest.disk.release(0);
    assert_eq!(guest.turn().len(), 1);
    assert_eq!(guest.interrupt.count(0), 0);
    guest.disk.release(0);
    assert_eq!(guest.turn().len(), 1);
    assert_eq!(guest.interrupt.count(0), 1);
    // The event is behind: no further interrupt.
    guest.driver.read(0, &sector(0));
    guest.disk.hold(false);
    assert_eq!(guest.turn().len(), 1);
    assert_eq!(guest.interrupt.count(0), 1);
    // A batch that passes over the event interrupts.
    guest.driver.arm_interrupt_after(2);
    for _ in 0..6 {
        guest.driver.read(0, &sector(0));
    }
    assert_eq!(guest.turn().len(), 6);
    assert_eq!(guest.interrupt.count(0), 2);
}

#[test]
fn a_full_data_plane_stalls_the_ring_and_a_completion_resumes_it() {
    let mut setup = Setup::default();
    setup.disk.capacity = 3;
    setup.driver.max_segments = 1;
    let mut guest = Guest::with(setup);
    guest.disk.hold(true);
    for index in 0..10 {
        guest.driver.read(index, &sector(0)).unwrap();
    }
    assert_eq!(guest.turn(), []);
    assert_eq!(guest.disk.held(), 3);
    assert!(guest.device.stats(0).unwrap().stalls() > 0);
    // No doorbell from here on: completions alone move the rest.
    let mut done = 0;
    while done < 10 {
        assert!(guest.disk.release(0));
        guest.process();
        done += guest.poll().len();
        assert!(guest.disk.held() <= 3);
        assert_eq!(guest.disk.held(), 3.min(10 - done));
    }
    assert_eq!(guest.disk.log().len(), 10);
    assert_eq!(guest.worker.outstanding(), 0);
}

#[test]
fn a_request_of_more_parts_than_the_data_plane_holds_is_done_in_pieces() {
    let mut setup = Setup::default();
    setup.disk.capacity = 2;
    let mut guest = Guest::with(setup);
    guest.disk.hold(true);
    let ranges: Vec<_> = (0..8)
        .map(|index| virtio_devices::virtio_blk::driver::Range {
            sector: 8 * index,
            sectors: 8,
            flags: 0,
        })
        .collect();
    guest.driver.discard(&ranges);
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.turn(), []);
    for _ in 0..8 {
        assert!(guest.disk.held() <= 2);
        guest.disk.release(0);
        guest.process();
    }
    assert_eq!(guest.poll().len(), 1);
    guest.disk.release(0);
    assert_eq!(guest.one().status, OK);
    assert_eq!(guest.disk.batches().iter().sum::<usize>(), 9);
}

#[test]
fn the_ring_wraps_at_65535() {
    for event_idx in [false, true] {
        let mut setup = Setup {
            start: 65_530,
            ..Setup::default()
        };
        setup.driver.event_idx = event_idx;
        let mut guest = Guest::with(setup);
        guest.process();
        for round in 0..20u64 {
            guest.driver.arm_interrupt();
            guest.driver.read(round, &sector(0));
            assert!(guest.driver.publish());
            guest.process();
            assert_eq!(guest.poll().len(), 1);
            assert_eq!(guest.interrupt.count(0), round as usize + 1);
        }
        assert_eq!(guest.worker.queue_state().next_avail, 14);
        assert_eq!(guest.worker.queue_state().next_used, 14);
        // And with a batch across the edge.
        let mut guest = Guest::with(Setup {
            start: 65_533,
            ..Setup::default()
        });
        for _ in 0..8 {
            guest.driver.read(0, &sector(0));
        }
        assert_eq!(guest.turn().len(), 8);
    }
}

#[test]
fn every_slot_of_the_ring_can_be_in_flight() {
    let mut setup = Setup::default();
    setup.driver.indirect = true;
    let mut guest = Guest::with(setup);
    guest.disk.hold(true);
    for round in 0..3 {
        while guest.driver.free() > 0 {
            guest.driver.read(0, &sector(0));
        }
        assert_eq!(guest.turn(), []);
        assert_eq!(guest.disk.held(), 64, "round {round}");
        guest.disk.release_all();
        assert_eq!(guest.turn().len(), 64);
    }
}

#[test]
fn queues_are_independent_and_a_broken_one_stops_alone() {
    let memory = common::memory();
    let disk = MockDisk::new(MockDiskConfig::default());
    let config = VirtioBlkConfig {
        num_queues: 2,
        ..VirtioBlkConfig::default()
    };
    let device = VirtioBlk::new(Box::new(disk.clone()), config).unwrap();
    device.ack_features(device.features()).unwrap();
    let line = Arc::new(CountingInterrupt::new(2).unwrap());
    let mut queues: Vec<_> = (0..2u16)
        .map(|index| {
            let base = GuestAddress(0x4_0000 * u64::from(index));
            let driver = Driver::new(&memory, base, DriverConfig::default()).unwrap();
            let worker = device
                .queue_worker(index, &driver.queue(), Arc::clone(&memory), line.clone())
                .unwrap();
            (driver, worker)
        })
        .collect();
    for (driver, worker) in &mut queues {
        driver.read(0, &sector(0));
        let _ = driver.publish();
        worker.process();
        assert_eq!(driver.poll(|used| assert_eq!(used.status, OK)), 1);
    }
    assert_eq!((line.count(0), line.count(1)), (1, 1));
    // Queue 0 breaks with a request in flight.
    disk.hold(true);
    let (driver, worker) = &mut queues[0];
    driver.read(0, &sector(0));
    driver.post(7777);
    let _ = driver.publish();
    worker.process();
    assert_eq!(
        line.faults(),
        [(0, QueueFault::HeadOutOfRange { head: 7777 })]
    );
    assert!(device.needs_reset());
    assert_eq!(line.config_count(), 1);
    let (driver, worker) = &mut queues[1];
    disk.hold(false);
    driver.read(0, &sector(0));
    let _ = driver.publish();
    worker.process();
    assert_eq!(driver.poll(|used| assert_eq!(used.status, OK)), 1);
    // What queue 0 had in flight ends, and nothing more is taken from it.
    let (driver, worker) = &mut queues[0];
    disk.release_all();
    worker.process();
    assert_eq!(driver.poll(|used| assert_eq!(used.status, OK)), 1);
    driver.read(0, &sector(0));
    let _ = driver.publish();
    assert_eq!(worker.process(), Progress::Idle);
    assert_eq!(driver.poll(|_| {}), 0);
    assert_eq!(line.faults().len(), 1, "reported once");
    worker.drain().unwrap();
    device.reset();
    assert!(!device.needs_reset());
}

#[test]
fn the_notifier_tells_an_event_loop_that_requests_ended() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    guest.driver.read(0, &sector(0));
    assert_eq!(guest.turn(), []);
    let notifier = guest
        .worker
        .notifier()
        .as_fd()
        .try_clone_to_owned()
        .unwrap();
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    let event = vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0);
    epoll
        .ctl(
            vmm_sys_util::epoll::ControlOperation::Add,
            notifier.as_raw_fd(),
            event,
        )
        .unwrap();
    let mut events = [event];
    assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
    guest.disk.release_all();
    assert_eq!(epoll.wait(0, &mut events).unwrap(), 1);
    guest.process();
    assert_eq!(guest.poll().len(), 1);
    assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
}

/// A guest that posts a request from within every interrupt.
struct Restless(std::sync::Mutex<Driver>);

impl Interrupt for Restless {
    fn signal_queue(&self, _queue: u16) -> std::io::Result<()> {
        let mut driver = self.0.lock().unwrap();
        driver.poll(|used| assert_eq!(used.status, OK));
        driver.arm_interrupt();
        driver.read(0, &sector(0)).unwrap();
        let _ = driver.publish();
        Ok(())
    }

    fn signal_config(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_that_never_stops_posting_does_not_keep_the_thread() {
    let memory = common::memory();
    let disk = MockDisk::new(MockDiskConfig::default());
    let device = VirtioBlk::new(Box::new(disk.clone()), VirtioBlkConfig::default()).unwrap();
    device.ack_features(device.features()).unwrap();
    let driver = Driver::new(&memory, GuestAddress(0), DriverConfig::default()).unwrap();
    let queue = driver.queue();
    let guest = Arc::new(Restless(std::sync::Mutex::new(driver)));
    let line: Arc<dyn Interrupt> = guest.clone();
    let mut worker = device.queue_worker(0, &queue, memory, line).unwrap();
    guest.signal_queue(0).unwrap();
    for _ in 0..10 {
        assert_eq!(worker.process(), Progress::More);
    }
    assert!(disk.log().len() > 50);
    worker.drain().unwrap();
}
