//! The HBA: generic host control, and the way to the ports.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use block::AsyncDiskFile;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    config::{HbaConfig, OpticalConfig},
    drive::{Device, Drive},
    front::PortWorker,
    interrupt::Irq,
    port::Port,
    queue::PortQueue,
    regs::{self, cap, ghc},
    shared::{Shared, TrayListener},
    work::HostWork,
};
use crate::{
    Error, MemorySource, Result, VectorInterrupt,
    ata::{AtaDisk, AtapiDrive, DiskConfig, Protection},
    mmc::{MmcConfig, MmcDrive},
    stats::QueueStats,
    sync::lock,
    worker::Worker,
};

/// An AHCI host bus adapter. Every method may be called from any thread.
pub struct Hba {
    pub(super) shared: Arc<Shared>,
}

impl Hba {
    /// An HBA with empty ports.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of ports out of range.
    pub fn new(config: HbaConfig) -> Result<Self> {
        if !(1..=32).contains(&config.ports) {
            return Err(Error::Config(format!(
                "ports is {}, not 1 to 32",
                config.ports
            )));
        }
        let ccc_bit = (config.coalescing && config.ports < 32).then_some(u32::from(config.ports));
        let staggered = config.staggered_spin_up;
        Ok(Self {
            shared: Arc::new(Shared {
                ports: (0..config.ports)
                    .map(|_| Mutex::new(Port::new(staggered)))
                    .collect(),
                irq: Mutex::new(Irq::new(ccc_bit)),
                no_dma: AtomicBool::new(false),
                coalescing: AtomicBool::new(false),
                stats: (0..config.ports).map(|_| Arc::default()).collect(),
                on_tray: Mutex::new(None),
                config,
            }),
        })
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &HbaConfig {
        &self.shared.config
    }

    /// Bytes of the register space (the ABAR, BAR 5).
    #[must_use]
    pub fn size(&self) -> u64 {
        let end = regs::PORTS + u64::from(self.config().ports) * regs::PORT_SIZE;
        end.next_multiple_of(4096)
    }

    /// Where interrupts go from now on: the line, and the message of vector 0. It is called with
    /// locks of the HBA held and must not call back into it.
    pub fn set_interrupt(&self, sink: Arc<dyn VectorInterrupt>) {
        self.shared.irq().set_sink(sink);
    }

    /// Calls `listener` from now on when the guest moves a tray.
    pub fn on_tray(&self, listener: TrayListener) {
        *lock(&self.shared.on_tray) = Some(listener);
    }

    /// The counters of a port.
    #[must_use]
    pub fn stats(&self, port: u8) -> Option<&Arc<QueueStats>> {
        self.shared.stats.get(usize::from(port))
    }

    pub(super) fn check(&self, port: u8) -> Result<u32> {
        if port < self.config().ports {
            return Ok(u32::from(port));
        }
        Err(Error::NoSuchQueue {
            queue: u16::from(port),
            queues: u16::from(self.config().ports),
        })
    }

    /// Plugs a disk into a port, in place of what is there. The driver sees it as hot plug.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] for a port that is not there, [`Error::Config`] as
    /// [`AtaDisk::new`] and for a sidecar that is not one of ours or cannot be written; the host's
    /// error when there is no thread to be had.
    pub fn plug_disk(
        &self,
        port: u8,
        disk: Box<dyn AsyncDiskFile>,
        config: DiskConfig,
    ) -> Result<()> {
        let port = self.check(port)?;
        let size = Arc::new(AtomicU64::new(disk.size()));
        let sidecar = config.sidecar.clone();
        let can_erase = !config.read_only && disk.capabilities().overwrite;
        let mut device = AtaDisk::new(config, Arc::clone(&size))?;
        disk.on_resize(Box::new(move |now| size.store(now, Ordering::Release)));
        let disk = Arc::from(disk);
        let mut work = None;
        if let Some(path) = sidecar.filter(|_| can_erase) {
            let protection = Protection::open(&path)?;
            device.protect(Arc::clone(&protection));
            work = Some(HostWork::start(protection, &disk)?);
        }
        self.plug(
            port,
            Some(Drive {
                device: Device::Disk(device),
                disk: Some(disk),
                work,
            }),
        );
        Ok(())
    }

    /// Changes the size of the disk in a port to `size` bytes, after the commands in flight have
    /// ended. IDENTIFY DEVICE shows it from then on; ATA has no way to tell the driver, which asks
    /// when it looks for devices the next time.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] for a port that is not there, [`Error::Config`] for one without a disk
    /// and a size that is not whole logical sectors; the disk's error.
    pub fn resize_disk(&self, port: u8, size: u64) -> Result<()> {
        let index = self.check(port)?;
        let (disk, sector) = match &self.shared.port(index).drive {
            Some(Drive {
                device: Device::Disk(device),
                disk: Some(disk),
                ..
            }) => (Arc::clone(disk), device.config().logical_sector),
            _ => return Err(Error::Config(format!("port {port} has no disk"))),
        };
        if size == 0 || !size.is_multiple_of(u64::from(sector)) {
            return Err(Error::Config(format!(
                "the size of the disk in port {port} is {size}, expected a multiple of its {sector} bytes"
            )));
        }
        Ok(disk.resize(size)?)
    }

    /// The size of the disk in a port, in bytes; `None` without one.
    #[must_use]
    pub fn disk_size(&self, port: u8) -> Option<u64> {
        let index = self.check(port).ok()?;
        match &self.shared.port(index).drive {
            Some(Drive {
                device: Device::Disk(_),
                disk: Some(disk),
                ..
            }) => Some(disk.size()),
            _ => None,
        }
    }

    /// Plugs an optical drive into a port, in place of what is there, with a medium or without.
    ///
    /// # Errors
    /// As [`plug_disk`](Self::plug_disk).
    pub fn plug_optical(
        &self,
        port: u8,
        medium: Option<Box<dyn AsyncDiskFile>>,
        config: OpticalConfig,
    ) -> Result<()> {
        let port = self.check(port)?;
        let mut drive = MmcDrive::new(MmcConfig {
            serial: config.serial.clone(),
            ..MmcConfig::default()
        })?;
        if let Some(medium) = &medium {
            drive.load(medium.size());
        }
        let OpticalConfig {
            model,
            serial,
            firmware,
        } = config;
        let device = AtapiDrive::new(drive, &model, &serial, &firmware)?;
        self.plug(
            port,
            Some(Drive {
                device: Device::Optical(device),
                disk: medium.map(Arc::from),
                work: None,
            }),
        );
        Ok(())
    }

    /// Takes the drive out of a port, while the guest runs.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] for a port that is not there.
    pub fn unplug(&self, port: u8) -> Result<()> {
        let port = self.check(port)?;
        self.plug(port, None);
        Ok(())
    }

    /// Flushes and closes the disks of all ports; their commands fail from then on. Dropping does the
    /// same but cannot report an error. The workers are gone, or drained and not driven meanwhile.
    ///
    /// # Errors
    /// The first error of a disk; the others are closed all the same.
    pub fn close(&self) -> Result<()> {
        let mut result = Ok(());
        for index in 0..u32::from(self.config().ports) {
            let (disk, work) = {
                let mut port = self.shared.port(index);
                let drive = port.drive.as_mut();
                drive.map_or((None, None), |drive| {
                    (drive.disk.clone(), drive.work.take())
                })
            };
            // A sanitize operation goes on at the next start.
            drop(work);
            if let Some(disk) = disk {
                result = result.and(disk.close());
            }
        }
        Ok(result?)
    }

    fn plug(&self, index: u32, drive: Option<Drive>) {
        let mut port = self.shared.port(index);
        let old = port.plug(drive);
        self.shared.interrupt(index, &port, 0);
        port.ring();
        drop(port);
        drop(old);
    }

    /// The doorbell of a port: an eventfd that wakes its worker. Without one a VMM calls
    /// [`Worker::process`] itself after every register write.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] for a port that is not there; the host's error when there is no
    /// eventfd to be had.
    pub fn doorbell(&self, port: u8) -> Result<Arc<EventFd>> {
        let index = self.check(port)?;
        let mut port = self.shared.port(index);
        if let Some(doorbell) = &port.doorbell {
            return Ok(Arc::clone(doorbell));
        }
        let doorbell =
            EventFd::new(EFD_NONBLOCK).map_err(|source: io::Error| Error::Descriptor {
                what: "doorbell",
                source,
            })?;
        let doorbell = Arc::new(doorbell);
        port.doorbell = Some(Arc::clone(&doorbell));
        Ok(doorbell)
    }

    /// The worker of a port. It belongs to the calling thread, which drives it; a port has one at a
    /// time. It lives through hot plug and changes of the medium.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] for a port that is not there.
    pub fn port_worker<S: MemorySource>(&self, port: u8, memory: S) -> Result<PortWorker<S>> {
        let index = self.check(port)?;
        let stats = Arc::clone(&self.shared.stats[index as usize]);
        let front = PortQueue::new(Arc::clone(&self.shared), index, memory, stats);
        let mut worker = Worker::without_disk(front);
        worker.set_poll_max(self.shared.config.poll_max);
        Ok(worker)
    }

    /// The bus master bit of the function: while it is clear, no command is taken and none is posted,
    /// so that nothing accesses guest memory. Registers and resets work meanwhile. It is set at first.
    /// Whoever clears it holds the workers while he does: one in the midst of a batch finishes it.
    pub fn set_bus_master(&self, on: bool) {
        self.shared.no_dma.store(!on, Ordering::SeqCst);
        if on {
            for index in 0..u32::from(self.config().ports) {
                self.shared.port(index).ring();
            }
        }
    }

    /// Reset of the whole function: what [`GHC.HR`](Self::write) does.
    pub fn reset(&self) {
        for index in 0..u32::from(self.config().ports) {
            let mut port = self.shared.port(index);
            port.reset();
            // Forgotten requests end in the worker.
            port.ring();
        }
        self.shared.irq().reset();
    }

    /// Whether a reset still waits for requests in flight.
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        (0..u32::from(self.config().ports)).any(|index| self.shared.port(index).resetting)
    }

    /// Whether nothing of the guest's memory is in use: no command is in flight, forgotten ones
    /// included.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        (0..u32::from(self.config().ports)).all(|index| self.shared.port(index).taken == 0)
    }

    /// Reads from the register space, at any offset and of any length. What is not there reads as
    /// zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut data = data;
        while !data.is_empty() {
            let skip = (at & 3) as usize;
            let take = data.len().min(4 - skip);
            let value = self.read_register(at & !3).to_le_bytes();
            let (now, later) = data.split_at_mut(take);
            now.copy_from_slice(&value[skip..skip + take]);
            at = at.wrapping_add(take as u64);
            data = later;
        }
    }

    /// Writes to the register space. Only the bytes that are written count.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut data = data;
        while !data.is_empty() {
            let skip = (at & 3) as usize;
            let take = data.len().min(4 - skip);
            let (now, later) = data.split_at(take);
            let (mut value, mut mask) = ([0; 4], [0; 4]);
            value[skip..skip + take].copy_from_slice(now);
            mask[skip..skip + take].fill(0xff);
            self.write_register(at & !3, u32::from_le_bytes(value), u32::from_le_bytes(mask));
            at = at.wrapping_add(take as u64);
            data = later;
        }
    }

    /// The port and register at an offset.
    fn port_at(&self, offset: u64) -> Option<(u32, u64)> {
        let at = offset.checked_sub(regs::PORTS)?;
        let index = u32::try_from(at / regs::PORT_SIZE).ok()?;
        (index < u32::from(self.config().ports)).then_some((index, at % regs::PORT_SIZE))
    }

    fn read_register(&self, offset: u64) -> u32 {
        if let Some((index, register)) = self.port_at(offset) {
            return self.shared.port(index).read(register);
        }
        let config = self.config();
        match offset {
            regs::CAP => self.capabilities(),
            regs::GHC => {
                let ie = if self.shared.irq().enabled {
                    ghc::IE
                } else {
                    0
                };
                let hr = if self.is_resetting() { ghc::HR } else { 0 };
                ghc::AE | ie | hr
            }
            regs::IS => self.shared.irq().is,
            regs::PI => u32::MAX >> (32 - config.ports),
            regs::VS => config.version,
            regs::CCC_CTL => self.shared.irq().ccc_ctl,
            regs::CCC_PORTS => self.shared.irq().ccc_ports,
            _ => 0,
        }
    }

    fn capabilities(&self) -> u32 {
        let config = self.config();
        let mut cap = cap::S64A | cap::SNCQ | cap::SCLO | cap::ISS_GEN3 | cap::SAM | cap::PMD;
        cap |= cap::NCS_32 | u32::from(config.ports - 1);
        if config.staggered_spin_up {
            cap |= cap::SSS;
        }
        if config.coalescing && config.ports < 32 {
            cap |= cap::CCCS;
        }
        cap
    }

    fn write_register(&self, offset: u64, value: u32, mask: u32) {
        if let Some((index, register)) = self.port_at(offset) {
            let mut port = self.shared.port(index);
            let effects = port.write(register, value, mask);
            if register != regs::px::CI {
                self.shared.interrupt(index, &port, 0);
            }
            if effects.kick {
                port.ring();
            }
            return;
        }
        let ones = value & mask;
        match offset {
            regs::GHC => {
                if ones & ghc::HR != 0 {
                    self.reset();
                } else if mask & ghc::IE != 0 {
                    self.shared.irq().enable(ones & ghc::IE != 0);
                }
            }
            regs::IS => self.shared.irq().clear(ones),
            regs::CCC_CTL => {
                let mut irq = self.shared.irq();
                let value = irq.ccc_ctl & !mask | ones;
                irq.write_ccc_ctl(value);
            }
            regs::CCC_PORTS if self.capabilities() & cap::CCCS != 0 => {
                let implemented = u32::MAX >> (32 - self.config().ports);
                let mut irq = self.shared.irq();
                irq.ccc_ports = (irq.ccc_ports & !mask | ones) & implemented;
            }
            _ => {}
        }
    }
}
