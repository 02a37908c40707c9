//! The drives and the devices of the command line.

use std::{path::Path, sync::Arc};

use block::{AsyncDiskFile, Format, OpenOptions, faults::Faults};
use virtio_devices::{
    ahci::{HbaConfig, OpticalConfig, Quirks},
    ata::DiskConfig,
    nvme::{NamespaceConfig, NvmeConfig, Subsystem, SubsystemConfig},
    testing::NullDisk,
    virtio_blk::VirtioBlkConfig,
};
use vm_memory::GuestMemoryMmap;
use vmm_glue::{
    pci::{
        AhciFunction, AhciFunctionConfig, BusSignals, PausableFunction, PciSlot, SlotInterrupts,
        VirtioPciBlk, VirtioPciConfig,
    },
    vfio_user::{NvmeFunction, NvmeFunctionConfig},
};

use crate::{
    Result,
    args::{Args, Options},
};

pub(crate) type Memory = Arc<GuestMemoryMmap>;
/// Vectors that a slot has room for.
const VECTORS: u16 = 64;

/// A disk, and the breakpoints of its requests.
pub(crate) type Opened = (Box<dyn AsyncDiskFile>, Option<Arc<Faults>>);

/// Opens the image of a `-drive` or `-blockdev`, and what can be done to its requests if it says so.
pub(crate) fn open(drive: &Options) -> Result<Opened> {
    let file = drive
        .get("file")
        .map_or_else(|| drive.need("filename"), Ok)?;
    if file == "null-co://" {
        return Ok((Box::new(NullDisk(1 << 30)), None));
    }
    // Breakpoints without a script; what a script would do belongs to a VMM that stops on errors.
    let (file, faults) = match file.strip_prefix("blkdebug::") {
        Some(file) => (file, Some(Arc::new(Faults::new(Vec::new(), Vec::new())))),
        None => (file, None),
    };
    let driver = drive.get("driver");
    if file.starts_with("blkdebug:") || driver.is_some_and(|driver| driver != "file") {
        return Err(format!("{file}: only files are drives here"));
    }
    let format = match drive.get("format") {
        Some("qcow2") => Format::Qcow2,
        Some("raw") | None => Format::Raw,
        Some(other) => return Err(format!("{file}: unknown format {other}")),
    };
    let mut options = OpenOptions::new()
        .format(format)
        .read_only(drive.get("readonly") == Some("on"));
    if let Some(faults) = &faults {
        options = options.faults(Arc::clone(faults));
    }
    let disk = options.open(Path::new(file));
    Ok((disk.map_err(|error| error.to_string())?, faults))
}

/// A slot of a new device, with the device as what it is.
pub(crate) struct Plugged<T> {
    pub(crate) slot: PciSlot,
    pub(crate) device: Arc<T>,
}

impl<T: PausableFunction + 'static> Plugged<T> {
    fn new(device: T, interrupts: Arc<SlotInterrupts>) -> Self {
        let device = Arc::new(device);
        let function = Arc::<T>::clone(&device);
        Self {
            slot: PciSlot::new(function, interrupts),
            device,
        }
    }
}

/// Where a `-device` is: device and function.
pub(crate) fn address(device: &Options) -> Result<u8> {
    let text = device.need("addr")?;
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let hex = |text: &str| u8::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    match (hex(slot), hex(function)) {
        (Some(slot @ 0..=31), Some(function @ 0..=7)) => Ok(slot << 3 | function),
        _ => Err(format!("addr={text}: expected SLOT.FUNCTION")),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: impl ToString) -> String {
    error.to_string()
}

pub(crate) fn virtio_blk(
    disk: Box<dyn AsyncDiskFile>,
    memory: &Memory,
    signals: Arc<dyn BusSignals>,
) -> Result<Plugged<VirtioPciBlk<Memory>>> {
    let interrupts = SlotInterrupts::new(signals, VECTORS);
    let config = VirtioPciConfig {
        device: VirtioBlkConfig::default(),
        ..VirtioPciConfig::default()
    };
    let sink = Arc::<SlotInterrupts>::clone(&interrupts);
    let device = VirtioPciBlk::new(disk, Arc::clone(memory), sink, config).map_err(failed)?;
    Ok(Plugged::new(device, interrupts))
}

pub(crate) fn nvme(
    disk: Box<dyn AsyncDiskFile>,
    memory: &Memory,
    signals: Arc<dyn BusSignals>,
) -> Result<Plugged<NvmeFunction>> {
    let interrupts = SlotInterrupts::new(signals, VECTORS);
    let subsystem = Subsystem::new(SubsystemConfig::default()).map_err(failed)?;
    subsystem
        .add_namespace(disk, &NamespaceConfig::default())
        .map_err(failed)?;
    let config = NvmeFunctionConfig {
        controller: NvmeConfig {
            io_queues: 4,
            vectors: 5,
            ..NvmeConfig::default()
        },
        ..NvmeFunctionConfig::default()
    };
    let sink = Arc::<SlotInterrupts>::clone(&interrupts);
    let device = NvmeFunction::new(&subsystem, config, memory, sink).map_err(failed)?;
    Ok(Plugged::new(device, interrupts))
}

/// The adapter of `q35`, which does what QEMU's does where the specification leaves a choice.
pub(crate) fn ahci(memory: &Memory, signals: Arc<dyn BusSignals>) -> Result<Plugged<AhciFunction>> {
    let interrupts = SlotInterrupts::new(signals, VECTORS);
    let config = AhciFunctionConfig {
        hba: HbaConfig {
            // The newest that the tests know is 1.3.
            version: 0x0001_0300,
            coalescing: false,
            quirks: Quirks {
                register_after_pio_in: true,
                no_descriptor_interrupt: true,
                wide_counts: true,
            },
            ..HbaConfig::default()
        },
        ..AhciFunctionConfig::default()
    };
    let sink = Arc::<SlotInterrupts>::clone(&interrupts);
    let device = AhciFunction::new(config, memory, sink).map_err(failed)?;
    Ok(Plugged::new(device, interrupts))
}

/// Plugs a drive into a port: `ide-hd` or `ide-cd`.
pub(crate) fn plug(
    adapter: &AhciFunction,
    port: u8,
    model: &str,
    disk: Box<dyn AsyncDiskFile>,
    args: &Args,
) -> Result<()> {
    let plugged = if model == "ide-cd" {
        let config = OpticalConfig::default();
        adapter.hba().plug_optical(port, Some(disk), config)
    } else {
        let mut config = DiskConfig::of(&*disk);
        for (field, key) in [
            (&mut config.serial, "serial"),
            (&mut config.firmware, "ver"),
        ] {
            if let Some(value) = args.global(model, key) {
                value.clone_into(field);
            }
        }
        adapter.hba().plug_disk(port, disk, config)
    };
    plugged.map_err(failed)
}
