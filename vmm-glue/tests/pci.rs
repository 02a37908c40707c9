//! PCI functions in a VMM's own process, from the driver's seat: virtio-blk and AHCI in a slot.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use virtio_devices::{
    testing::{MockDisk, MockDiskConfig},
    virtio_blk::{
        VirtioBlkConfig,
        driver::{Driver, DriverConfig},
        feature,
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_glue::pci::{
    AhciFunction, AhciFunctionConfig, BusSignals, PciSlot, SlotInterrupts, VirtioPciBlk,
    VirtioPciConfig,
};

type Memory = Arc<GuestMemoryMmap>;

/// What arrives at the processor.
#[derive(Default)]
struct Signals {
    messages: Mutex<Vec<(u64, u32)>>,
    line: AtomicBool,
}

impl BusSignals for Signals {
    fn message(&self, address: u64, data: u32) -> io::Result<()> {
        self.messages.lock().unwrap().push((address, data));
        Ok(())
    }

    fn line(&self, asserted: bool) {
        self.line.store(asserted, Ordering::SeqCst);
    }
}

impl Signals {
    fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut *self.messages.lock().unwrap())
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

const DATA: GuestAddress = GuestAddress(1 << 20);
/// Where the driver puts the BARs.
const VIRTIO: u64 = 0xe000_0000;
const MSIX: u64 = 0xe010_0000;

/// A register of the configuration space.
fn config(slot: &PciSlot, at: u64) -> u32 {
    let mut word = [0; 4];
    slot.read_config(at, &mut word);
    u32::from_le_bytes(word)
}

struct Guest {
    slot: PciSlot,
    disk: MockDisk,
    memory: Memory,
    signals: Arc<Signals>,
    device: Arc<VirtioPciBlk<Memory>>,
    /// Where the structures are, by their kind, and the step from a doorbell to the next.
    structures: [u64; 5],
    step: u64,
}

impl Guest {
    /// Finds the device and its structures.
    fn new(queues: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let disk = MockDisk::new(MockDiskConfig::default());
        let signals = Arc::new(Signals::default());
        let to_bus: Arc<dyn BusSignals> = Arc::<Signals>::clone(&signals);
        let interrupts = SlotInterrupts::new(to_bus, queues + 1);
        let settings = VirtioPciConfig {
            device: VirtioBlkConfig {
                num_queues: queues,
                ..VirtioBlkConfig::default()
            },
            ..VirtioPciConfig::default()
        };
        let sink = Arc::<SlotInterrupts>::clone(&interrupts);
        let device = VirtioPciBlk::new(Box::new(disk.clone()), memory.clone(), sink, settings);
        let device = Arc::new(device.unwrap());
        let function = Arc::<VirtioPciBlk<Memory>>::clone(&device);
        let slot = PciSlot::new(function, interrupts);
        assert_eq!(config(&slot, 0), 0x1042_1af4);
        slot.write_config(0x10, &VIRTIO.to_le_bytes());
        slot.write_config(0x18, &(MSIX as u32).to_le_bytes());
        slot.write_config(0x04, &6_u16.to_le_bytes());
        let mut guest = Self {
            slot,
            disk,
            memory,
            signals,
            device,
            structures: [0; 5],
            step: 0,
        };
        let mut at = u64::from(config(&guest.slot, 0x34) & 0xff);
        while at != 0 {
            let head = config(&guest.slot, at);
            if head & 0xff == 9 {
                let kind = (head >> 24) as usize;
                assert_eq!(config(&guest.slot, at + 4) & 0xff, 0, "all are in BAR 0");
                guest.structures[kind] = VIRTIO + u64::from(config(&guest.slot, at + 8));
                if kind == 2 {
                    guest.step = u64::from(config(&guest.slot, at + 16));
                }
            }
            at = u64::from(head >> 8 & 0xff);
        }
        assert!(guest.structures[1..].iter().all(|at| *at != 0));
        guest
    }

    fn read(&self, address: u64, width: usize) -> u64 {
        let (bar, offset) = self.slot.decode(false, address).unwrap();
        let mut data = [0; 8];
        self.slot.read_bar(bar, offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn write(&self, address: u64, width: usize, value: u64) {
        let (bar, offset) = self.slot.decode(false, address).unwrap();
        self.slot
            .write_bar(bar, offset, &value.to_le_bytes()[..width]);
    }

    fn common(&self, register: u64, width: usize) -> u64 {
        self.read(self.structures[1] + register, width)
    }

    fn set_common(&self, register: u64, width: usize, value: u64) {
        self.write(self.structures[1] + register, width, value);
    }

    /// Switches MSI-X on, with a message for each vector.
    fn use_msix(&self, vectors: u64) {
        for vector in 0..vectors {
            let entry = MSIX + 16 * vector;
            self.write(entry, 4, 0xfee0_0000);
            self.write(entry + 8, 4, 100 + vector);
            self.write(entry + 12, 4, 0);
        }
        let mut at = u64::from(config(&self.slot, 0x34) & 0xff);
        while config(&self.slot, at) & 0xff != 0x11 {
            at = u64::from(config(&self.slot, at) >> 8 & 0xff);
        }
        assert!(self.slot.write_config(at + 3, &[0x80]).interrupts);
    }

    /// Starts the device, with its vectors if `msix`.
    fn start(&self, queues: u16, msix: bool) -> Vec<Driver> {
        self.set_common(0x14, 1, 0);
        self.set_common(0x14, 1, 3);
        let mut offered = 0;
        for half in 0..2 {
            self.set_common(0x00, 4, half);
            offered |= self.common(0x04, 4) << (32 * half);
        }
        let wanted = offered & (feature::VERSION_1 | feature::FLUSH | feature::MQ);
        for half in 0..2 {
            self.set_common(0x08, 4, half);
            self.set_common(0x0c, 4, wanted >> (32 * half) & 0xffff_ffff);
            assert_eq!(self.common(0x0c, 4), wanted >> (32 * half) & 0xffff_ffff);
        }
        self.set_common(0x14, 1, 11);
        assert_eq!(self.common(0x14, 1), 11);
        assert_eq!(self.common(0x12, 2), u64::from(queues));
        if msix {
            self.set_common(0x10, 2, 0);
            assert_eq!(self.common(0x10, 2), 0);
        }
        let mut drivers = Vec::new();
        for index in 0..queues {
            self.set_common(0x16, 2, index.into());
            let settings = DriverConfig {
                queue_size: 64,
                event_idx: false,
                ..DriverConfig::default()
            };
            let base = GuestAddress(u64::from(index) << 18);
            let driver = Driver::new(&self.memory, base, settings).unwrap();
            self.set_common(0x18, 2, 64);
            let addresses = [driver.desc_table(), driver.avail_ring(), driver.used_ring()];
            for (register, address) in (0x20..).step_by(8).zip(addresses) {
                self.set_common(register, 8, address.0);
                assert_eq!(self.common(register, 8), address.0);
            }
            if msix {
                self.set_common(0x1a, 2, u64::from(index) + 1);
                assert_eq!(self.common(0x1a, 2), u64::from(index) + 1);
            }
            self.set_common(0x1c, 2, 1);
            assert_eq!(self.common(0x1c, 2), 1);
            drivers.push(driver);
        }
        self.set_common(0x14, 1, 15);
        assert_eq!(self.common(0x14, 1), 15);
        drivers
    }

    fn kick(&self, index: u64) {
        self.set_common(0x16, 2, index);
        let at = self.structures[2] + self.common(0x1e, 2) * self.step;
        self.write(at, 2, index);
    }

    fn write_sector(&self, index: u64, driver: &mut Driver, sector: u64, byte: u8) {
        self.memory.write_slice(&[byte; 512], DATA).unwrap();
        driver.write(sector, &[(DATA, 512)]).unwrap();
        let _ = driver.publish();
        self.kick(index);
        let mut status = None;
        eventually("the request", || {
            driver.poll(|used| status = Some(used.status));
            status.is_some()
        });
        assert_eq!(status, Some(0));
        let at = sector as usize * 512;
        assert_eq!(self.disk.contents()[at..at + 512], [byte; 512]);
    }
}

#[test]
fn a_queue_has_its_vector_and_so_has_the_configuration() {
    let guest = Guest::new(2);
    guest.use_msix(3);
    for round in 1..3 {
        let mut drivers = guest.start(2, true);
        for index in [0, 1] {
            guest.write_sector(index, &mut drivers[index as usize], 3 + index, round);
            eventually("the message", || {
                guest.signals.take() == [(0xfee0_0000, 101 + index as u32)]
            });
        }
        let sectors = guest.read(guest.structures[4], 8);
        guest.device.resize_to(sectors * 512 - 4096);
        assert_eq!(guest.read(guest.structures[4], 8), sectors - 8);
        eventually("the message", || {
            guest.signals.take().contains(&(0xfee0_0000, 100))
        });
        assert!(!guest.signals.line.load(Ordering::SeqCst));
        assert_eq!(guest.read(guest.structures[3], 1), 0);
        guest.device.resize_to(sectors * 512);
        eventually("the message", || !guest.signals.take().is_empty());
    }
}

/// Changes the size from outside.
trait Resize {
    fn resize_to(&self, bytes: u64);
}

impl Resize for VirtioPciBlk<Memory> {
    fn resize_to(&self, bytes: u64) {
        self.device().resize(bytes).unwrap();
    }
}

#[test]
fn without_vectors_the_line_follows_isr() {
    let guest = Guest::new(1);
    let mut drivers = guest.start(1, false);
    guest.write_sector(0, &mut drivers[0], 0, 7);
    eventually("the line", || guest.signals.line.load(Ordering::SeqCst));
    assert_ne!(config(&guest.slot, 4) >> 16 & 1 << 3, 0);
    assert_eq!(guest.read(guest.structures[3], 1), 1);
    assert!(!guest.signals.line.load(Ordering::SeqCst));
    assert_eq!(guest.read(guest.structures[3], 1), 0);
    guest.device.resize_to(1 << 20);
    eventually("the line", || guest.signals.line.load(Ordering::SeqCst));
    assert_eq!(guest.read(guest.structures[3], 1) & 2, 2);
    assert!(guest.signals.take().is_empty());
}

#[test]
fn a_masked_vector_waits_for_its_driver() {
    let guest = Guest::new(1);
    guest.use_msix(2);
    guest.write(MSIX + 16 + 12, 4, 1);
    let mut drivers = guest.start(1, true);
    guest.write_sector(0, &mut drivers[0], 0, 7);
    let pending = MSIX + 0x1000;
    eventually("the pending bit", || guest.read(pending, 8) == 2);
    assert!(guest.signals.take().is_empty());
    guest.write(MSIX + 16 + 12, 4, 0);
    assert_eq!(guest.signals.take(), [(0xfee0_0000, 101)]);
    assert_eq!(guest.read(pending, 8), 0);
}

#[test]
fn registers_of_no_queue_and_of_wrong_widths_do_nothing() {
    let guest = Guest::new(1);
    guest.use_msix(2);
    let mut drivers = guest.start(1, true);
    // A queue that is not there: no size, no vector, and nothing to enable.
    for queue in [1, 2, 0xffff] {
        guest.set_common(0x16, 2, queue);
        for (register, width) in [
            (0x18, 2),
            (0x1a, 2),
            (0x1c, 2),
            (0x20, 8),
            (0x28, 8),
            (0x30, 8),
        ] {
            guest.set_common(register, width, 1);
        }
        assert_eq!(guest.common(0x18, 2), 0);
        assert_eq!(guest.common(0x1a, 2), 0xffff);
        guest.write(guest.structures[2] + queue * guest.step % 0x1000, 2, queue);
    }
    // A vector that is not there is refused.
    guest.set_common(0x16, 2, 0);
    guest.set_common(0x1a, 2, 2);
    assert_eq!(guest.common(0x1a, 2), 0xffff);
    guest.set_common(0x1a, 2, 1);
    // Every place at every width; a running queue does not change.
    for offset in 0..0x4000 {
        let status = (0x14_u64.saturating_sub(7)..0x15).contains(&offset);
        for width in [1, 2, 4, 8] {
            let _ = guest.read(VIRTIO + offset, width);
            if !status && offset < 0x1000 && offset > 0x1c {
                guest.write(VIRTIO + offset, width, u64::MAX);
            }
        }
    }
    guest.set_common(0x16, 2, 0);
    guest.write_sector(0, &mut drivers[0], 1, 9);
}

#[test]
fn a_reset_of_the_function_ends_everything() {
    let guest = Guest::new(1);
    guest.use_msix(2);
    let mut drivers = guest.start(1, true);
    guest.disk.hold(true);
    guest.memory.write_slice(&[1; 512], DATA).unwrap();
    drivers[0].write(0, &[(DATA, 512)]).unwrap();
    let _ = drivers[0].publish();
    guest.kick(0);
    eventually("the request", || guest.disk.held() == 1);
    let disk = guest.disk.clone();
    let release = thread::spawn(move || {
        disk.hold(false);
        disk.release_all();
    });
    let mut at = u64::from(config(&guest.slot, 0x34) & 0xff);
    while config(&guest.slot, at) & 0xff != 0x10 {
        at = u64::from(config(&guest.slot, at) >> 8 & 0xff);
    }
    assert!(guest.slot.write_config(at + 9, &[0x80]).reset);
    release.join().unwrap();
    assert_eq!(guest.disk.held(), 0);
    assert!(guest.slot.decode(false, VIRTIO).is_none());
    guest.slot.write_config(0x10, &VIRTIO.to_le_bytes());
    guest.slot.write_config(0x18, &(MSIX as u32).to_le_bytes());
    guest.slot.write_config(0x04, &6_u16.to_le_bytes());
    assert_eq!(guest.common(0x14, 1), 0);
    assert_eq!(guest.common(0x10, 2), 0xffff);
    let mut drivers = guest.start(1, false);
    guest.write_sector(0, &mut drivers[0], 1, 9);
}

#[test]
fn ahci_sends_one_message_or_raises_the_line() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let signals = Arc::new(Signals::default());
    let to_bus: Arc<dyn BusSignals> = Arc::<Signals>::clone(&signals);
    let interrupts = SlotInterrupts::new(to_bus, 0);
    let sink = Arc::<SlotInterrupts>::clone(&interrupts);
    let settings = AhciFunctionConfig::default();
    let function = Arc::new(AhciFunction::new(settings, &Arc::new(memory), sink).unwrap());
    let shared = Arc::<AhciFunction>::clone(&function);
    let slot = PciSlot::new(shared, interrupts);
    slot.write_config(0x24, &0xe000_0000_u32.to_le_bytes());
    slot.write_config(0x04, &6_u16.to_le_bytes());
    let (bar, offset) = slot.decode(false, 0xe000_0000).unwrap();
    assert_eq!((bar, offset), (5, 0));
    // Interrupts of port 0 and of the adapter; then a drive is plugged in.
    let write = |register: u64, value: u32| slot.write_bar(5, register, &value.to_le_bytes());
    let plug = || {
        let disk = Box::new(MockDisk::new(MockDiskConfig::default()));
        let drive = virtio_devices::ata::DiskConfig::of(&*disk);
        function.hba().plug_disk(0, disk, drive).unwrap();
    };
    write(0x114, u32::MAX);
    write(0x04, 1 << 31 | 2);
    plug();
    assert!(signals.line.load(Ordering::SeqCst));
    // MSI is the first capability: 64-bit, one vector, no mask.
    let msi = u64::from(config(&slot, 0x34) & 0xff);
    assert_eq!(config(&slot, msi) & 0xff, 5);
    assert_eq!(config(&slot, msi) >> 16, 1 << 7);
    slot.write_config(msi + 4, &0xfee0_1000_u64.to_le_bytes());
    slot.write_config(msi + 12, &77_u16.to_le_bytes());
    assert!(slot.write_config(msi + 2, &[1, 0]).interrupts);
    assert!(!signals.line.load(Ordering::SeqCst));
    write(0x130, u32::MAX);
    write(0x08, u32::MAX);
    assert!(signals.take().is_empty());
    plug();
    assert!(signals.take().contains(&(0xfee0_1000, 77)));
    // A message is a write to memory: it waits for the bus master bit.
    slot.write_config(0x04, &2_u16.to_le_bytes());
    write(0x130, u32::MAX);
    write(0x08, u32::MAX);
    assert!(signals.take().is_empty());
    plug();
    assert!(signals.take().is_empty());
    slot.write_config(0x04, &6_u16.to_le_bytes());
    assert_eq!(signals.take(), [(0xfee0_1000, 77)]);
}

#[test]
fn a_queue_does_nothing_until_its_function_may_access_memory() {
    let guest = Guest::new(1);
    guest.use_msix(2);
    let mut drivers = guest.start(1, true);
    guest.write_sector(0, &mut drivers[0], 0, 7);
    eventually("the message", || !guest.signals.take().is_empty());
    guest.disk.hold(true);
    drivers[0].write(1, &[(DATA, 512)]).unwrap();
    let _ = drivers[0].publish();
    guest.kick(0);
    eventually("the request", || guest.disk.held() == 1);
    let disk = guest.disk.clone();
    let release = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        disk.hold(false);
        disk.release_all();
    });
    // What was begun has ended when the bit is clear.
    assert!(guest.slot.write_config(0x04, &2_u16.to_le_bytes()).master);
    release.join().unwrap();
    let mut ended = 0;
    drivers[0].poll(|_| ended += 1);
    assert_eq!((ended, guest.signals.take().len()), (1, 1));
    drivers[0].write(2, &[(DATA, 512)]).unwrap();
    let _ = drivers[0].publish();
    guest.kick(0);
    thread::sleep(Duration::from_millis(50));
    drivers[0].poll(|_| ended += 1);
    assert_eq!(ended, 1);
    guest.slot.write_config(0x04, &6_u16.to_le_bytes());
    eventually("the request", || {
        drivers[0].poll(|_| ended += 1);
        ended == 2
    });
    eventually("its message", || !guest.signals.take().is_empty());
    // A device that is reset and started without the bit starts with it.
    guest.slot.write_config(0x04, &2_u16.to_le_bytes());
    let mut drivers = guest.start(1, true);
    drivers[0].write(3, &[(DATA, 512)]).unwrap();
    let _ = drivers[0].publish();
    guest.kick(0);
    thread::sleep(Duration::from_millis(50));
    drivers[0].poll(|_| ended += 1);
    assert_eq!(ended, 2);
    guest.slot.write_config(0x04, &6_u16.to_le_bytes());
    eventually("the request", || {
        drivers[0].poll(|_| ended += 1);
        ended == 3
    });
}
