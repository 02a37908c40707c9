//! `platter serve ahci`: disks and optical drives behind an AHCI host bus adapter, over vfio-user.

use std::{path::PathBuf, sync::Arc};

use block::AsyncDiskFile;
use clap::Args;
use virtio_devices::{
    ahci::{Hba, HbaConfig, OpticalConfig},
    ata::DiskConfig,
};
use vm_memory::GuestMemoryAtomic;
use vmm_glue::{
    pci::{AhciFunction, AhciFunctionConfig},
    vfio_user::{StopSignals, VfioUserInterrupts, VfioUserMemory, VfioUserServer},
};

use crate::{
    control::{self, AhciControl},
    image::{open, spec::ImageSpec},
    serve_vfio_user::VfioUserArgs,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};

/// Serve disks and optical drives behind an AHCI adapter, for any VMM that speaks vfio-user
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  A disk and a drive with a medium in it, and QEMU (10.1 or newer) using them:
    platter serve ahci --socket /run/ahci.sock --disk disk.qcow2,format=qcow2 --cdrom install.iso
    qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -machine memory-backend=mem \\
      -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"/run/ahci.sock\"}}'

A disk is IMAGE and options: format=FMT, port=N, readonly=on, lba=512|4096, physical=BYTES, serial=TEXT (at most 20
characters), wwn=HEX (16 digits), model=TEXT (40), firmware=TEXT (8), cache=on|off (the volatile write cache that the
guest sees), sidecar=PATH. Serial number and WWN are made of its path otherwise. The sidecar is a file of its own that
remembers passwords and a sanitize operation that runs: with it the guest can lock the disk (ATA Security) and erase it
(SECURITY ERASE UNIT, SANITIZE DEVICE). It is for raw and LUKS images, which are really overwritten.
An optical drive is an ISO image, or 'empty', and port=N, serial=, model=, firmware=. Drives without port= take the free
ports in the order disks, optical drives. With --control a medium is changed by
'platter ctl PATH insert port=1 image=second.iso', and 'platter ctl PATH help' lists the rest.")]
pub(crate) struct AhciArgs {
    /// The socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// A disk: an image, with ,format=FMT ,serial=TEXT ,wwn=HEX ,sidecar=PATH and so on as wanted
    #[arg(long, value_name = "IMAGE[,…]")]
    disk: Vec<String>,
    /// An optical drive: an ISO image, or 'empty'
    #[arg(long, value_name = "ISO[,…]")]
    cdrom: Vec<String>,
    /// Ports of the adapter
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u8).range(1..=32))]
    ports: u8,
    #[command(flatten)]
    common: VfioUserArgs,
}

/// How images are opened, whenever they are.
#[derive(Clone, Debug)]
struct Opening {
    common: VfioUserArgs,
    persona: Persona,
}

/// Runs the command.
pub(crate) fn run(args: &AhciArgs, persona: Persona) -> Outcome {
    // Before anything starts a thread, which would be killed by them otherwise.
    let signals = StopSignals::block()
        .map_err(|error| Failure::new(format!("signals cannot be blocked: {error}")))?;
    let mut drives = Vec::new();
    for text in &args.disk {
        drives.push(Drive::parse("--disk", text)?);
    }
    for text in &args.cdrom {
        drives.push(Drive::parse("--cdrom", text)?);
    }
    let ports = assign(&drives, args.ports)?;
    let interrupts = Arc::new(VfioUserInterrupts::default());
    let memory = GuestMemoryAtomic::new(VfioUserMemory::new());
    let config = AhciFunctionConfig {
        hba: HbaConfig {
            ports: args.ports,
            poll_max: args.common.poll_max(),
            ..HbaConfig::default()
        },
        ..AhciFunctionConfig::default()
    };
    let function = AhciFunction::new(config, &memory, interrupts.clone()).map_err(failed)?;
    let hba = Arc::clone(function.hba());
    let opening = Opening {
        common: args.common.clone(),
        persona,
    };
    for (drive, port) in drives.iter().zip(ports) {
        drive.plug(&hba, port, &opening)?;
    }
    let _control = match &args.common.control {
        Some(path) => Some(control::start(path, Arc::new(controlled(&hba, opening)))?),
        None => None,
    };
    let mut server = VfioUserServer::bind(&args.socket, Arc::new(function), memory, interrupts)
        .map_err(server_failed)?;
    server.once(args.common.once);
    server.stop_on(signals);
    tracing::info!(socket = %args.socket.display(), drives = drives.len(), "serving ahci");
    server.run().map_err(server_failed)?;
    // Ends the threads of the ports; what they had in flight has ended then.
    drop(server);
    hba.close().map_err(failed)?;
    Ok(0)
}

fn controlled(hba: &Arc<Hba>, opening: Opening) -> AhciControl {
    let for_media = opening.clone();
    AhciControl {
        hba: Arc::clone(hba),
        open: Box::new(move |image| {
            let medium = Drive {
                optical: true,
                image: image.to_owned(),
                ..Drive::default()
            };
            let opened = medium.open(&for_media);
            opened.map_err(|error| error.to_string())
        }),
        plug: Box::new(move |hba, port, option, value| {
            let plugged = Drive::parse(option, value).and_then(|drive| match drive.port {
                Some(_) => Err(Failure::new(format!(
                    "{}: expected no port= beside the port of the command",
                    drive.text
                ))),
                None => drive.plug(hba, port, &opening),
            });
            plugged.map_err(|error| error.to_string())
        }),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: virtio_devices::Error) -> Failure {
    Failure::new(error.to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn server_failed(error: vmm_glue::vfio_user::Error) -> Failure {
    Failure::new(error.to_string())
}

/// `IMAGE[,option=value]…` of an option.
#[derive(Debug, Default)]
struct Drive {
    /// The option and its value, for messages.
    text: String,
    optical: bool,
    image: String,
    port: Option<u8>,
    format: Option<String>,
    read_only: bool,
    logical: Option<u32>,
    physical: Option<u32>,
    serial: Option<String>,
    wwn: Option<u64>,
    model: Option<String>,
    firmware: Option<String>,
    write_cache: Option<bool>,
    sidecar: Option<PathBuf>,
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

impl Drive {
    fn parse(option: &str, value: &str) -> Result<Self, Failure> {
        let mut parts = value.split(',');
        let mut drive = Self {
            text: format!("{option} {value}"),
            optical: option == "--cdrom",
            image: parts.next().unwrap_or_default().to_owned(),
            ..Self::default()
        };
        for part in parts {
            drive.option(part).map_err(|expected| {
                Failure::new(format!("{}: '{part}': expected {expected}", drive.text))
            })?;
        }
        Ok(drive)
    }

    /// Takes one option; an error says what was expected.
    fn option(&mut self, part: &str) -> Result<(), &'static str> {
        let (key, value) = part.split_once('=').ok_or("option=value")?;
        let text = || Some(value.to_owned());
        match (key, self.optical) {
            ("port", _) => self.port = Some(value.parse().map_err(|_| "a number from 0 to 31")?),
            ("serial", _) => self.serial = text(),
            ("model", _) => self.model = text(),
            ("firmware", _) => self.firmware = text(),
            ("format", false) => self.format = text(),
            ("readonly", false) => self.read_only = switch(value).ok_or("on or off")?,
            ("cache", false) => self.write_cache = Some(switch(value).ok_or("on or off")?),
            ("sidecar", false) => self.sidecar = Some(PathBuf::from(value)),
            ("lba", false) => {
                self.logical = match value {
                    "512" => Some(512),
                    "4096" => Some(4096),
                    _ => return Err("512 or 4096"),
                }
            }
            ("physical", false) => {
                self.physical = Some(value.parse().map_err(|_| "a number of bytes")?);
            }
            ("wwn", false) => {
                let digits = value.strip_prefix("0x").unwrap_or(value);
                let wwn = u64::from_str_radix(digits, 16).ok();
                self.wwn = Some(wwn.filter(|_| digits.len() == 16).ok_or("16 hex digits")?);
            }
            (_, false) => {
                return Err(
                    "format, port, readonly, lba, physical, serial, wwn, model, firmware, cache or sidecar",
                );
            }
            (_, true) => return Err("port, serial, model or firmware"),
        }
        Ok(())
    }

    fn plug(&self, hba: &Hba, port: u8, opening: &Opening) -> Result<(), Failure> {
        let named = |error: virtio_devices::Error| Failure::new(format!("{}: {error}", self.text));
        if self.optical {
            let medium = match self.image.as_str() {
                "empty" => None,
                _ => Some(self.open(opening)?),
            };
            return hba
                .plug_optical(port, medium, self.optical_config())
                .map_err(named);
        }
        let disk = self.open(opening)?;
        if let Some(path) = &self.sidecar
            && !disk.capabilities().overwrite
        {
            return Err(Failure::new(format!(
                "{}: sidecar={}: expected a writable raw or LUKS image: of others an erase leaves copies",
                self.text,
                path.display()
            )));
        }
        let config = self.disk_config(&*disk);
        hba.plug_disk(port, disk, config).map_err(named)
    }

    fn open(&self, opening: &Opening) -> Result<Box<dyn AsyncDiskFile>, Failure> {
        // What is in an optical drive is what its sectors say, and never an image format.
        let format = if self.optical {
            Some("raw")
        } else {
            self.format.as_deref()
        };
        let spec = ImageSpec::parse(&self.image, false, format, opening.persona)?;
        let how = opening.common.how(self.read_only || self.optical)?;
        open::open(&spec, &how, opening.persona)
    }

    fn disk_config(&self, disk: &dyn AsyncDiskFile) -> DiskConfig {
        let mut config = DiskConfig::of(disk);
        if let Some(logical) = self.logical {
            config.logical_sector = logical;
            config.physical_sector = config.physical_sector.max(logical);
        }
        config.physical_sector = self.physical.unwrap_or(config.physical_sector);
        config.wwn = self.wwn.unwrap_or(config.wwn);
        config.write_cache = self.write_cache.unwrap_or(config.write_cache);
        config.sidecar.clone_from(&self.sidecar);
        for (own, given) in [
            (&mut config.serial, &self.serial),
            (&mut config.model, &self.model),
            (&mut config.firmware, &self.firmware),
        ] {
            if let Some(given) = given {
                own.clone_from(given);
            }
        }
        config
    }

    fn optical_config(&self) -> OpticalConfig {
        let defaults = OpticalConfig::default();
        OpticalConfig {
            model: self.model.clone().unwrap_or(defaults.model),
            serial: self.serial.clone().unwrap_or(defaults.serial),
            firmware: self.firmware.clone().unwrap_or(defaults.firmware),
        }
    }
}

/// The port of each drive: the one it names, or the first that is free.
fn assign(drives: &[Drive], ports: u8) -> Result<Vec<u8>, Failure> {
    let mut taken = vec![false; usize::from(ports)];
    for drive in drives {
        let Some(port) = drive.port else { continue };
        let bad = |why: String| Failure::new(format!("{}: port={port}: {why}", drive.text));
        match taken.get_mut(usize::from(port)) {
            Some(place) if *place => return Err(bad("expected a free port".to_owned())),
            Some(place) => *place = true,
            None => return Err(bad(format!("expected a port below {ports}, see --ports"))),
        }
    }
    let mut assigned = Vec::new();
    for drive in drives {
        let port = match drive.port {
            Some(port) => port,
            None => {
                let free = (0..ports).find(|port| !taken[usize::from(*port)]);
                let free = free.ok_or_else(|| {
                    Failure::new(format!(
                        "{}: expected at most {ports} drives, see --ports",
                        drive.text
                    ))
                })?;
                taken[usize::from(free)] = true;
                free
            }
        };
        assigned.push(port);
    }
    Ok(assigned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(option: &str, value: &str) -> Drive {
        Drive::parse(option, value).unwrap_or_else(|error| panic!("{error:?}"))
    }

    #[test]
    fn options_of_a_disk() {
        let text = "a.raw,format=raw,port=2,serial=S1,wwn=0x5000c500a0000001,lba=4096,cache=off,sidecar=a.ata";
        let disk = drive("--disk", text);
        assert_eq!((disk.image.as_str(), disk.port), ("a.raw", Some(2)));
        assert_eq!(disk.wwn, Some(0x5000_c500_a000_0001));
        assert_eq!(disk.sidecar, Some(PathBuf::from("a.ata")));
        assert_eq!((disk.logical, disk.write_cache), (Some(4096), Some(false)));
        for bad in ["a,wwn=1", "a,lba=1024", "a,port=x", "a,readonly", "a,x=1"] {
            assert!(Drive::parse("--disk", bad).is_err(), "{bad}");
        }
        assert!(Drive::parse("--cdrom", "a.iso,format=qcow2").is_err());
        assert!(Drive::parse("--cdrom", "a.iso,sidecar=a").is_err());
    }

    #[test]
    fn drives_take_the_ports_that_are_free() {
        let drives = [
            drive("--disk", "a"),
            drive("--disk", "b,port=0"),
            drive("--cdrom", "empty"),
        ];
        assert_eq!(assign(&drives, 3).ok(), Some(vec![1, 0, 2]));
        assert!(assign(&drives, 2).is_err());
        let twice = [drive("--disk", "a,port=1"), drive("--disk", "b,port=1")];
        assert!(assign(&twice, 6).is_err());
    }
}
