//! The machine: RAM, ports, the PCI bus, and what is on it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
    sync::Arc,
};

use block::{AsyncDiskFile, Format, OpenOptions, faults::Faults};
use virtio_devices::ahci::TrayListener;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_glue::pci::{AhciFunction, BusSignals, PciSlot, VirtioPciBlk};

use crate::{
    Result,
    args::{Args, Kind, Options},
    devices::{self, Memory},
    monitor::Monitor,
};

/// The address and the data of the PCI configuration mechanism.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// fw_cfg: the selector, and its data, a byte at a time.
const FW_CFG_SELECT: u16 = 0x510;
const FW_CFG_DATA: u16 = 0x511;
/// The items of fw_cfg that tell the signature and the bytes of RAM.
const FW_CFG_SIGNATURE: u16 = 0;
const FW_CFG_RAM_SIZE: u16 = 3;
/// Hot plug of the ACPI tables: the slots to be ejected.
const EJECT: u16 = 0xae08;
/// The AHCI adapter of `q35`: 1f.2.
const AHCI: u8 = 0x1f << 3 | 2;

/// Messages are writes to memory; nobody is there to be interrupted.
struct Signals(Memory);

impl BusSignals for Signals {
    fn message(&self, address: u64, data: u32) -> io::Result<()> {
        self.0
            .write_slice(&data.to_le_bytes(), GuestAddress(address))
            .map_err(io::Error::other)
    }

    fn line(&self, _asserted: bool) {}
}

/// The machine.
pub(crate) struct Machine {
    pub(crate) memory: Memory,
    bytes: u64,
    slots: BTreeMap<u8, PciSlot>,
    pub(crate) ahci: Option<Arc<AhciFunction>>,
    /// virtio-blk devices, by the drive they have.
    blocks: HashMap<String, Arc<VirtioPciBlk<Memory>>>,
    /// Where devices that were plugged in are, by their names.
    plugged: HashMap<String, u8>,
    /// The device that a guest was asked to let go of.
    unplugging: Option<(String, u8)>,
    /// Optical drives, by their names.
    trays: HashMap<String, u8>,
    drives: HashMap<String, Options>,
    faults: HashMap<String, Arc<Faults>>,
    config_address: u32,
    fw_cfg: (u16, usize),
    monitor: Monitor,
    pub(crate) running: bool,
}

impl Machine {
    pub(crate) fn new(args: &Args, monitor: &Monitor) -> Result<Self> {
        let ranges = [(GuestAddress(0), args.memory as usize)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| e.to_string())?;
        let mut machine = Self {
            memory: Arc::new(memory),
            bytes: args.memory,
            slots: BTreeMap::new(),
            ahci: None,
            blocks: HashMap::new(),
            plugged: HashMap::new(),
            unplugging: None,
            trays: HashMap::new(),
            drives: HashMap::new(),
            faults: HashMap::new(),
            config_address: 0,
            fw_cfg: (0, 0),
            monitor: monitor.clone(),
            running: args.incoming.is_none(),
        };
        if args.kind == Kind::Q35 {
            let plugged = devices::ahci(&machine.memory, machine.signals())?;
            machine.slots.insert(AHCI, plugged.slot);
            machine.ahci = Some(plugged.device);
        }
        if args.incoming.is_none() {
            machine.add_devices(args)?;
        }
        Ok(machine)
    }

    fn signals(&self) -> Arc<dyn BusSignals> {
        Arc::new(Signals(Arc::clone(&self.memory)))
    }

    /// Adds what the command line says; for a machine that comes in, when the other has let go of the
    /// images.
    pub(crate) fn add_devices(&mut self, args: &Args) -> Result<()> {
        let mut devices = args.devices.clone();
        for drive in &args.drives {
            let name = drive.get("id").or_else(|| drive.get("node-name"));
            let name = name.unwrap_or("ide0").to_owned();
            if drive.get("if") == Some("ide") {
                devices.push(Options::parse(&format!("ide-hd,drive={name}")));
            }
            self.drives.insert(name, drive.clone());
        }
        let mut port = 0;
        for device in &devices {
            match device.name.as_str() {
                "virtio-blk-pci" | "nvme" => self.add_function(device)?,
                model @ ("ide-hd" | "ide-cd") => {
                    let disk = self.open(device.need("drive")?)?;
                    let adapter = self.ahci.as_ref().ok_or("only q35 has ports")?;
                    devices::plug(adapter, port, model, disk, args)?;
                    if let (Some(id), "ide-cd") = (device.get("id"), model) {
                        self.trays.insert(id.to_owned(), port);
                    }
                    port += 1;
                }
                name => return Err(format!("unknown device {name}")),
            }
        }
        if let Some(adapter) = &self.ahci {
            let (names, monitor) = (self.trays.clone(), self.monitor.clone());
            let listener: TrayListener = Arc::new(move |port, open| {
                let name = names.iter().find(|(_, at)| **at == port);
                monitor.tray_moved(name.map_or("", |(name, _)| name), open);
            });
            adapter.hba().on_tray(listener);
        }
        Ok(())
    }

    fn open(&mut self, drive: &str) -> Result<Box<dyn AsyncDiskFile>> {
        let options = self.drives.get(drive);
        let options = options.ok_or_else(|| format!("there is no drive {drive}"))?;
        let (disk, faults) = devices::open(options)?;
        if let Some(faults) = faults {
            self.faults.insert(drive.to_owned(), faults);
        }
        Ok(disk)
    }

    /// What can be done to the requests of a drive.
    pub(crate) fn faults(&self, drive: &str) -> Result<&Arc<Faults>> {
        let faults = self.faults.get(drive);
        faults.ok_or_else(|| format!("the drive {drive} has no breakpoints"))
    }

    /// Adds a function to the bus: at the start, or while the machine runs.
    pub(crate) fn add_function(&mut self, device: &Options) -> Result<()> {
        let at = devices::address(device)?;
        if self.slots.contains_key(&at) {
            return Err(format!("{}: the slot is taken", device.name));
        }
        let drive = device.need("drive")?;
        let disk = self.open(drive)?;
        let slot = if device.name == "nvme" {
            for missing in ["cmb_size_mb", "pmrdev"] {
                if device.get(missing).is_some() {
                    return Err(format!("nvme: {missing} is not offered"));
                }
            }
            devices::nvme(disk, &self.memory, self.signals())?.slot
        } else {
            let plugged = devices::virtio_blk(disk, &self.memory, self.signals())?;
            self.blocks.insert(drive.to_owned(), plugged.device);
            plugged.slot
        };
        self.slots.insert(at, slot);
        if let Some(id) = device.get("id") {
            self.plugged.insert(id.to_owned(), at);
        }
        Ok(())
    }

    /// Asks the guest to let go of a device; it is gone when the guest has.
    pub(crate) fn remove_function(&mut self, id: &str) -> Result<()> {
        let at = self.plugged.get(id);
        let at = at.ok_or_else(|| format!("there is no device {id}"))?;
        self.unplugging = Some((id.to_owned(), *at));
        Ok(())
    }

    fn eject(&mut self, slots: u32) {
        let Some((id, at)) = self.unplugging.take() else {
            return;
        };
        if slots & 1 << (at >> 3) != 0 {
            self.slots.remove(&at);
            self.plugged.remove(&id);
            self.monitor.device_deleted(&id);
        }
    }

    /// Changes the size of the disk behind a virtio-blk device.
    pub(crate) fn resize(&self, drive: &str, bytes: u64) -> Result<()> {
        let device = self.blocks.get(drive);
        let device = device.ok_or_else(|| format!("no device has the drive {drive}"))?;
        let resized = device.device().resize(bytes);
        resized.map_err(|error| error.to_string())
    }

    /// The port of an optical drive.
    pub(crate) fn tray(&self, id: &str) -> Result<(&AhciFunction, u8)> {
        let port = self.trays.get(id);
        let adapter = self.ahci.as_ref().zip(port);
        let (adapter, port) = adapter.ok_or_else(|| format!("there is no drive {id}"))?;
        Ok((adapter, *port))
    }

    /// Knows a drive under a name, for later.
    pub(crate) fn add_drive(&mut self, name: &str, file: &str) {
        let mut drive = Options::parse("");
        drive.set("file", file);
        drive.set("readonly", "on");
        self.drives.insert(name.to_owned(), drive);
    }

    /// A medium for an optical drive.
    pub(crate) fn medium(&self, name: &str) -> Result<Box<dyn AsyncDiskFile>> {
        let drive = self.drives.get(name);
        let drive = drive.ok_or_else(|| format!("there is no node {name}"))?;
        OpenOptions::new()
            .format(Format::Raw)
            .read_only(true)
            .open(Path::new(drive.need("file")?))
            .map_err(|error| error.to_string())
    }

    /// Reset of everything.
    pub(crate) fn reset(&mut self) {
        for slot in self.slots.values() {
            slot.reset();
        }
        self.config_address = 0;
    }

    /// The functions on the bus.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (&u8, &PciSlot)> {
        self.slots.iter()
    }

    /// The function that the configuration mechanism points at, and the register.
    fn selected(&self, port: u16) -> Option<(&PciSlot, u64)> {
        let address = self.config_address;
        if address & 1 << 31 == 0 || address >> 16 & 0xff != 0 {
            return None;
        }
        let slot = self.slots.get(&((address >> 8) as u8))?;
        // The tests keep the lowest bits of a register in the address, as QEMU lets them.
        let register = address & 0xff | u32::from(port & 3);
        Some((slot, register.into()))
    }

    fn decode(&self, io: bool, address: u64) -> Option<(&PciSlot, u8, u64)> {
        self.slots.values().find_map(|slot| {
            let (bar, offset) = slot.decode(io, address)?;
            Some((slot, bar, offset))
        })
    }

    /// An `in` of 1, 2 or 4 bytes.
    pub(crate) fn read_port(&mut self, port: u16, data: &mut [u8]) {
        // Nobody there: a bus reads as ones.
        data.fill(0xff);
        match port {
            CONFIG_ADDRESS => {
                data.copy_from_slice(&self.config_address.to_le_bytes()[..data.len()]);
            }
            CONFIG_DATA..=0xcff => {
                if let Some((slot, register)) = self.selected(port) {
                    slot.read_config(register, data);
                }
            }
            FW_CFG_DATA => {
                let (item, at) = &mut self.fw_cfg;
                let content = match *item {
                    FW_CFG_SIGNATURE => b"QEMU".to_vec(),
                    FW_CFG_RAM_SIZE => self.bytes.to_le_bytes().to_vec(),
                    _ => Vec::new(),
                };
                data[0] = content.get(*at).copied().unwrap_or(0);
                *at += 1;
            }
            _ => {
                if let Some((slot, bar, offset)) = self.decode(true, port.into()) {
                    slot.read_bar(bar, offset, data);
                }
            }
        }
    }

    /// An `out` of 1, 2 or 4 bytes.
    pub(crate) fn write_port(&mut self, port: u16, data: &[u8]) {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        match port {
            CONFIG_ADDRESS if data.len() == 4 => self.config_address = value,
            CONFIG_DATA..=0xcff => {
                if let Some((slot, register)) = self.selected(port) {
                    slot.write_config(register, data);
                }
            }
            FW_CFG_SELECT => self.fw_cfg = (value as u16, 0),
            EJECT => self.eject(value),
            _ => {
                if let Some((slot, bar, offset)) = self.decode(true, port.into()) {
                    slot.write_bar(bar, offset, data);
                }
            }
        }
    }

    /// Reads memory: RAM, or the BAR of a function.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if address < self.bytes {
            let _ = self.memory.read(data, GuestAddress(address));
        } else if let Some((slot, bar, offset)) = self.decode(false, address) {
            for (ahead, piece) in (offset..).step_by(8).zip(data.chunks_mut(8)) {
                slot.read_bar(bar, ahead, piece);
            }
        }
    }

    /// Writes memory.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if address < self.bytes {
            let _ = self.memory.write(data, GuestAddress(address));
        } else if let Some((slot, bar, offset)) = self.decode(false, address) {
            for (ahead, piece) in (offset..).step_by(8).zip(data.chunks(8)) {
                slot.write_bar(bar, ahead, piece);
            }
        }
    }
}
