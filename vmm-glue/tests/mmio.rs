//! The virtio-mmio registers, from the driver's seat.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "an example as a module"
)]
#[path = "../examples/mini_vmm.rs"]
mod mini_vmm;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use virtio_devices::{
    testing::{MockDisk, MockDiskConfig},
    virtio_blk::{
        VirtioBlkConfig, WRITEBACK_OFFSET, driver::Driver, driver::DriverConfig, feature,
    },
};
use vm_device::{MutDeviceMmio, bus::MmioAddress};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_glue::in_process::{IrqLine, VirtioMmioBlk, VirtioMmioConfig};

/// A level-triggered line.
#[derive(Default)]
struct Line {
    raised: AtomicUsize,
    lowered: AtomicUsize,
}

impl IrqLine for Line {
    fn raise(&self) -> io::Result<()> {
        self.raised.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn lower(&self) {
        self.lowered.fetch_add(1, Ordering::SeqCst);
    }
}

struct Machine {
    disk: MockDisk,
    memory: Arc<GuestMemoryMmap>,
    line: Arc<Line>,
    device: VirtioMmioBlk<Arc<GuestMemoryMmap>>,
    driver: Driver,
}

const DATA: GuestAddress = GuestAddress(1 << 20);

fn driver(memory: &Arc<GuestMemoryMmap>) -> Driver {
    let config = DriverConfig {
        queue_size: 64,
        ..DriverConfig::default()
    };
    Driver::new(memory, GuestAddress(0), config).unwrap()
}

impl Machine {
    fn new() -> Self {
        let disk = MockDisk::new(MockDiskConfig::default());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let line = Arc::new(Line::default());
        let config = VirtioMmioConfig {
            device: VirtioBlkConfig {
                num_queues: 2,
                ..VirtioBlkConfig::default()
            },
            ..VirtioMmioConfig::default()
        };
        let device = VirtioMmioBlk::new(
            Box::new(disk.clone()),
            Arc::clone(&memory),
            Arc::clone(&line),
            config,
        );
        Self {
            disk,
            device: device.unwrap(),
            driver: driver(&memory),
            memory,
            line,
        }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0xaa; 4];
        self.device.mmio_read(MmioAddress(0), offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.device
            .mmio_write(MmioAddress(0), offset, &value.to_le_bytes());
    }

    fn accept(&mut self, features: u64) {
        self.set(0x70, 1);
        self.set(0x70, 3);
        for half in 0..2 {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        self.set(0x30, index);
        self.set(0x38, size);
        for (register, address) in [
            (0x80, self.driver.desc_table()),
            (0x90, self.driver.avail_ring()),
            (0xa0, self.driver.used_ring()),
        ] {
            self.set(register, address.0 as u32);
            self.set(register + 4, (address.0 >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn boot(&mut self) {
        self.driver = driver(&self.memory);
        self.set(0x70, 0);
        self.accept(feature::VERSION_1 | feature::EVENT_IDX | feature::FLUSH | feature::CONFIG_WCE);
        self.set_up_queue(0, 64);
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15);
    }

    fn write(&mut self, byte: u8) {
        self.memory.write_slice(&[byte; 4096], DATA).unwrap();
        self.driver.write(0, &[(DATA, 4096)]).unwrap();
        let _ = self.driver.publish();
        self.set(0x50, 0);
    }

    fn finish(&mut self) {
        eventually(|| {
            self.driver.poll(|used| assert_eq!(used.status, 0));
            self.driver.in_flight() == 0
        });
    }
}

fn eventually(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_example_works() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(9 << 20)
        .unwrap();
    assert_eq!(mini_vmm::run(&image, 2).unwrap(), 8 << 20);
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes[(5 << 16) + 17], 5 ^ 0x5a);
    assert_eq!(bytes[8 << 20], 0);
}

#[test]
fn registers_read_as_specified() {
    let mut machine = Machine::new();
    assert_eq!(machine.get(0x00), 0x7472_6976);
    assert_eq!(machine.get(0x04), 2);
    assert_eq!(machine.get(0x08), 2);
    machine.set(0x14, 1);
    assert_eq!(machine.get(0x10), 1, "VERSION_1 is bit 32");
    machine.set(0x14, 2);
    assert_eq!(machine.get(0x10), 0);
    machine.set(0x30, 1);
    assert_eq!(machine.get(0x34), 256);
    machine.set(0x30, 2);
    assert_eq!(machine.get(0x34), 0, "no third queue");
    assert_eq!(machine.get(0x44), 0);
    for register in (0xb0..=0xbc).step_by(4) {
        assert_eq!(machine.get(register), u32::MAX, "no shared memory");
    }
    // Registers are words; the configuration space is bytes.
    for len in [1usize, 2, 3, 8] {
        let mut data = vec![0xaa; len];
        machine.device.mmio_read(MmioAddress(0), 0, &mut data);
        assert_eq!(data, vec![0; len]);
        machine
            .device
            .mmio_write(MmioAddress(0), 0x70, &vec![1; len]);
        assert_eq!(machine.get(0x70), 0);
    }
    let mut capacity = [0; 8];
    machine
        .device
        .mmio_read(MmioAddress(0), 0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), (1 << 20) / 512);
    let mut byte = [0];
    machine.device.mmio_read(MmioAddress(0), 0x101, &mut byte);
    assert_eq!(byte, [8]);
}

#[test]
fn the_status_follows_the_rules() {
    let mut machine = Machine::new();
    // DRIVER_OK before FEATURES_OK does not count.
    machine.set(0x70, 7);
    assert_eq!(machine.get(0x70), 3);
    // Bits cannot be cleared but by a reset.
    machine.set(0x70, 1);
    assert_eq!(machine.get(0x70), 3);
    machine.set(0x70, 0);
    assert_eq!(machine.get(0x70), 0);
    // Legacy, or something that is not offered.
    machine.accept(0);
    assert_eq!(machine.get(0x70), 3);
    machine.set(0x70, 0);
    machine.accept(feature::VERSION_1 | 1 << 60);
    assert_eq!(machine.get(0x70), 3);
    machine.set(0x70, 0);
    machine.accept(feature::VERSION_1);
    assert_eq!(machine.get(0x70), 11);
    // Settled features stay.
    machine.set(0x20, 0);
    machine.set(0x70, 15);
    assert_eq!(machine.get(0x70), 15);
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let mut machine = Machine::new();
    machine.boot();
    let lowered = machine.line.lowered.load(Ordering::SeqCst);
    machine.write(1);
    machine.finish();
    eventually(|| machine.line.raised.load(Ordering::SeqCst) == 1);
    assert_eq!(machine.get(0x60), 1);
    let generation = machine.get(0xfc);
    machine.device.device().resize(2 << 20).unwrap();
    assert_eq!(machine.get(0x60), 3);
    assert_ne!(machine.get(0xfc), generation);
    machine.set(0x64, 1);
    assert_eq!(machine.get(0x60), 2);
    assert_eq!(machine.line.lowered.load(Ordering::SeqCst), lowered);
    machine.set(0x64, 2);
    assert_eq!(machine.get(0x60), 0);
    assert_eq!(machine.line.lowered.load(Ordering::SeqCst), lowered + 1);
}

#[test]
fn a_reset_waits_for_the_disk_and_shows_nothing_more() {
    let mut machine = Machine::new();
    machine.boot();
    machine.disk.hold(true);
    machine.write(7);
    eventually(|| machine.disk.held() == 1);
    let disk = machine.disk.clone();
    let release = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        disk.hold(false);
        disk.release_all();
    });
    machine.set(0x70, 0);
    assert_eq!(machine.disk.held(), 0, "the reset is over when the disk is");
    release.join().unwrap();
    assert_eq!(machine.driver.poll(|_| ()), 0);
    assert_eq!(machine.get(0x70), 0);
    assert_eq!(machine.get(0x44), 0);
    // And again from the start, several times.
    for round in 0..3 {
        machine.boot();
        machine.write(round);
        machine.finish();
    }
    assert_eq!(machine.disk.contents()[..4096], [2; 4096]);
}

#[test]
fn a_queue_that_cannot_run_needs_a_reset() {
    let mut machine = Machine::new();
    machine.accept(feature::VERSION_1);
    machine.set_up_queue(0, 64);
    machine.set(0x44, 0);
    machine.set(0xa4, 1);
    machine.set(0x44, 1);
    machine.set(0x70, 15);
    assert_eq!(machine.get(0x70) & 0x40, 0x40);
    assert_eq!(machine.get(0x60), 2);
    machine.boot();
    machine.write(1);
    machine.finish();
    // A driver that breaks its ring.
    machine.driver.post(9999);
    let _ = machine.driver.publish();
    machine.set(0x50, 0);
    eventually(|| machine.get(0x70) & 0x40 != 0);
    assert_eq!(machine.get(0x60) & 2, 2);
    machine.boot();
    machine.write(2);
    machine.finish();
}

#[test]
fn pauses_and_goes_on() {
    let mut machine = Machine::new();
    machine.boot();
    for round in 0..5 {
        machine.write(round);
        machine.device.pause();
        let ended = machine.driver.in_flight();
        machine.memory.write_slice(&[round; 4096], DATA).unwrap();
        machine.driver.write(0, &[(DATA, 4096)]).unwrap();
        let _ = machine.driver.publish();
        machine.set(0x50, 0);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.driver.in_flight(), ended + 1);
        machine.device.resume();
        machine.finish();
    }
    // Doorbells of queues that are not there, and of one that is not set up.
    for queue in [1, 2, u32::MAX] {
        machine.set(0x50, queue);
    }
    machine.write(9);
    machine.finish();
}

#[test]
fn the_cache_mode_is_written_through_the_registers() {
    let mut machine = Machine::new();
    machine.boot();
    let at = 0x100 + WRITEBACK_OFFSET as u64;
    machine.device.mmio_write(MmioAddress(0), at, &[0]);
    assert!(!machine.device.device().write_back());
    machine.set(0x70, 0);
    assert!(machine.device.device().write_back());
}
