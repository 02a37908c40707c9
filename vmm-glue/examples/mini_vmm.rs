//! A very small virtual machine monitor: everything that embeds a Platter disk, and nothing else.
//!
//! ```text
//! cargo run -p vmm-glue --example mini_vmm [IMAGE]
//! ```
//!
//! There is no processor in it. A "guest" (the functions under *The guest*) does what a driver in a
//! virtual machine would do: it writes registers through the bus, puts requests into rings in guest
//! memory and waits for interrupts. In a real VMM those accesses arrive as exits of a vCPU; the part
//! under *The VMM* stays as it is.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use block::{Format, OpenOptions};
use virtio_devices::virtio_blk::{
    VirtioBlkConfig,
    driver::{Driver, DriverConfig},
    feature,
};
use vm_device::{
    bus::{MmioAddress, MmioRange},
    device_manager::{IoManager, MmioManager},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_glue::in_process::{MMIO_SIZE, VirtioMmioBlk, VirtioMmioConfig};
use vmm_sys_util::eventfd::EventFd;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

// ---- The VMM ------------------------------------------------------------------------------------

/// Where the device's registers are on the bus. A guest learns it from the device tree, or from
/// `virtio_mmio.device=512@0xd0000000:5` on its command line.
const DEVICE: u64 = 0xd000_0000;
/// Guest memory: 32 MiB from address 0.
const MEMORY: usize = 32 << 20;

/// A machine with one disk.
struct MiniVmm {
    /// What an exit for MMIO looks up.
    bus: IoManager,
    memory: Arc<GuestMemoryMmap>,
    /// The interrupt line of the disk. A VMM gives it to KVM as an irqfd:
    /// `vm.register_irqfd(&irq, gsi)`.
    irq: EventFd,
    /// The device, for whatever is not the guest's: counters, resize, pause.
    disk: Arc<Mutex<VirtioMmioBlk<Arc<GuestMemoryMmap>>>>,
}

impl MiniVmm {
    fn new(image: &Path, queues: u16) -> Result<Self> {
        // 1. Memory. A VMM that adds memory later gives the device a `GuestMemoryAtomic` instead of
        //    the `Arc`, and the queues see the new map with their next batch.
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?);

        // 2. The disk. The factory finds the format; naming it is better, because a guest can write
        //    whatever it likes to the start of a raw disk. Threads of the blocking pool start here:
        //    a VMM that restricts itself with seccomp does so after step 3.
        let disk = OpenOptions::new().format(Format::Raw).open(image)?;

        // 3. The device. It makes a thread for each queue, which sleeps until the driver is ready.
        let irq = EventFd::new(0)?;
        let config = VirtioMmioConfig {
            device: VirtioBlkConfig {
                num_queues: queues,
                serial: "mini-vmm-disk".into(),
                ..VirtioBlkConfig::default()
            },
            ..VirtioMmioConfig::default()
        };
        let disk = VirtioMmioBlk::new(disk, Arc::clone(&memory), irq.try_clone()?, config)?;

        // 4. The bus. A `Mutex` makes a device of one that needs `&mut self`. To save the exits of
        //    doorbells, bind `disk.doorbell(n)` as an ioeventfd to a 32-bit write of `n` at
        //    `DEVICE + VirtioMmioBlk::QUEUE_NOTIFY`.
        let disk = Arc::new(Mutex::new(disk));
        let mut bus = IoManager::new();
        let range = MmioRange::new(MmioAddress(DEVICE), MMIO_SIZE).map_err(|e| e.to_string())?;
        bus.register_mmio(range, Arc::<Mutex<_>>::clone(&disk) as Arc<_>)
            .map_err(|e| e.to_string())?;
        Ok(Self {
            bus,
            memory,
            irq,
            disk,
        })
    }

    /// What a vCPU loop does with `VcpuExit::MmioRead(address, data)`.
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        // Nobody there: a bus reads as ones.
        if self.bus.mmio_read(MmioAddress(address), data).is_err() {
            data.fill(0xff);
        }
    }

    /// What a vCPU loop does with `VcpuExit::MmioWrite(address, data)`.
    fn mmio_write(&self, address: u64, data: &[u8]) {
        let _ = self.bus.mmio_write(MmioAddress(address), data);
    }
}

// ---- The guest ----------------------------------------------------------------------------------

/// The registers that the driver uses, by their names in the virtio specification.
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(super) const CONFIG: u64 = 0x100;
}

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// The driver, after it has found its device.
struct Guest<'a> {
    vmm: &'a MiniVmm,
    queues: Vec<Driver>,
    sectors: u64,
}

impl<'a> Guest<'a> {
    /// Finds the device and sets it up, as section 3.1 of the virtio specification tells a driver.
    fn boot(vmm: &'a MiniVmm, queues: u32) -> Result<Self> {
        let mut guest = Guest {
            vmm,
            queues: Vec::new(),
            sectors: 0,
        };
        if guest.get(register::MAGIC_VALUE) != u32::from_le_bytes(*b"virt")
            || guest.get(register::VERSION) != 2
            || guest.get(register::DEVICE_ID) != 2
        {
            return Err("no virtio block device on the bus".into());
        }
        guest.set(register::STATUS, 0);
        guest.set(register::STATUS, ACKNOWLEDGE);
        guest.set(register::STATUS, ACKNOWLEDGE | DRIVER);

        let mut offered = 0;
        for half in 0..2 {
            guest.set(register::DEVICE_FEATURES_SEL, half);
            offered |= u64::from(guest.get(register::DEVICE_FEATURES)) << (32 * half);
        }
        let wanted =
            offered & (feature::VERSION_1 | feature::EVENT_IDX | feature::FLUSH | feature::MQ);
        for half in 0..2 {
            guest.set(register::DRIVER_FEATURES_SEL, half);
            guest.set(register::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        guest.set(register::STATUS, status);
        if guest.get(register::STATUS) & FEATURES_OK == 0 {
            return Err("the device does not accept the features".into());
        }

        for index in 0..queues {
            guest.set(register::QUEUE_SEL, index);
            let size = guest.get(register::QUEUE_SIZE_MAX).min(128) as u16;
            let config = DriverConfig {
                queue_size: size,
                event_idx: wanted & feature::EVENT_IDX != 0,
                ..DriverConfig::default()
            };
            // Rings and request headers are in the first 4 MiB, 1 MiB for each queue.
            let base = GuestAddress(u64::from(index) << 20);
            let driver = Driver::new(&vmm.memory, base, config)?;
            guest.set(register::QUEUE_SIZE, u32::from(size));
            guest.set_address(register::QUEUE_DESC, driver.desc_table());
            guest.set_address(register::QUEUE_DRIVER, driver.avail_ring());
            guest.set_address(register::QUEUE_DEVICE, driver.used_ring());
            guest.set(register::QUEUE_READY, 1);
            guest.queues.push(driver);
        }
        guest.set(register::STATUS, status | DRIVER_OK);

        let mut capacity = [0; 8];
        vmm.mmio_read(DEVICE + register::CONFIG, &mut capacity);
        guest.sectors = u64::from_le_bytes(capacity);
        Ok(guest)
    }

    fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.vmm.mmio_read(DEVICE + register, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&self, register: u64, value: u32) {
        self.vmm.mmio_write(DEVICE + register, &value.to_le_bytes());
    }

    fn set_address(&self, register: u64, address: GuestAddress) {
        self.set(register, address.0 as u32);
        self.set(register + 4, (address.0 >> 32) as u32);
    }

    /// Rings the doorbell if the device wants it, and sleeps until everything has ended.
    fn finish(&mut self, queue: usize) -> Result<()> {
        if self.queues[queue].publish() {
            self.set(register::QUEUE_NOTIFY, queue as u32);
        }
        let mut failed = 0;
        loop {
            let driver = &mut self.queues[queue];
            driver.poll(|used| failed += usize::from(used.status != 0));
            if driver.in_flight() == 0 {
                break;
            }
            if driver.arm_interrupt() {
                continue;
            }
            // The interrupt: a real guest is in `hlt` here.
            self.vmm.irq.read()?;
            let status = self.get(register::INTERRUPT_STATUS);
            self.set(register::INTERRUPT_ACK, status);
        }
        if failed > 0 {
            return Err(format!("{failed} requests failed").into());
        }
        Ok(())
    }
}

/// Fills the disk with a pattern through every queue in turn, flushes, and reads it back.
fn guest_main(vmm: &MiniVmm, queues: u16) -> Result<u64> {
    const DATA: u64 = 16 << 20;
    const CHUNK: u64 = 64 << 10;
    let mut guest = Guest::boot(vmm, u32::from(queues))?;
    let bytes = (guest.sectors * 512).min(8 << 20);
    for at in (0..bytes).step_by(CHUNK as usize) {
        let pattern = vec![(at / CHUNK) as u8 ^ 0x5a; CHUNK as usize];
        vmm.memory.write_slice(&pattern, GuestAddress(DATA + at))?;
        let queue = (at / CHUNK) as usize % guest.queues.len();
        let data = [(GuestAddress(DATA + at), CHUNK as u32)];
        if guest.queues[queue].write(at / 512, &data).is_none() {
            guest.finish(queue)?;
            guest.queues[queue]
                .write(at / 512, &data)
                .ok_or("no room in an empty queue")?;
        }
    }
    for queue in 0..guest.queues.len() {
        guest.finish(queue)?;
    }
    guest.queues[0].flush().ok_or("no room in an empty queue")?;
    guest.finish(0)?;

    for at in (0..bytes).step_by(CHUNK as usize) {
        let queue = (at / CHUNK + 1) as usize % guest.queues.len();
        vmm.memory
            .write_slice(&vec![0; CHUNK as usize], GuestAddress(DATA))?;
        let data = [(GuestAddress(DATA), CHUNK as u32)];
        guest.queues[queue]
            .read(at / 512, &data)
            .ok_or("no room in an empty queue")?;
        guest.finish(queue)?;
        let mut read = vec![0; CHUNK as usize];
        vmm.memory.read_slice(&mut read, GuestAddress(DATA))?;
        if read.iter().any(|byte| *byte != (at / CHUNK) as u8 ^ 0x5a) {
            return Err(format!("wrong data at {at:#x}").into());
        }
    }
    // A guest that shuts down resets its devices.
    guest.set(register::STATUS, 0);
    Ok(bytes)
}

// ---- Both ---------------------------------------------------------------------------------------

/// Runs the guest on the image and checks the image afterwards. Returns the bytes that it wrote.
pub fn run(image: &Path, queues: u16) -> Result<u64> {
    let vmm = MiniVmm::new(image, queues)?;
    let bytes = guest_main(&vmm, queues)?;
    // The end of a machine: the device is dropped, and the disk with it, which flushes and closes.
    // Before that a VMM makes sure that nothing is lost, and hears of errors.
    let device = vmm.disk.lock().map_err(|e| e.to_string())?.device().clone();
    device.flush()?;
    drop((vmm, device));

    let disk = OpenOptions::new()
        .format(Format::Raw)
        .read_only(true)
        .open(image)?;
    let mut byte = [0];
    disk.read_at(&mut byte, bytes - 1)?;
    if byte != [((bytes - 1) >> 16) as u8 ^ 0x5a] {
        return Err("the image does not have what the guest wrote".into());
    }
    Ok(bytes)
}

/// Runs on the image named on the command line, or on one it makes.
pub fn main() -> Result<()> {
    let image = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => {
            let path = std::env::temp_dir().join(format!("mini-vmm-{}.raw", std::process::id()));
            std::fs::File::create(&path)?.set_len(16 << 20)?;
            path
        }
    };
    let result = run(&image, 2);
    if std::env::args_os().nth(1).is_none() {
        std::fs::remove_file(&image)?;
    }
    println!("wrote and verified {} bytes through two queues", result?);
    Ok(())
}
