//! `platter serve nvme`: disks as namespaces of NVMe controllers, over vfio-user.

use std::{path::PathBuf, sync::Arc, thread};

use block::AsyncDiskFile;
use clap::Args;
use virtio_devices::nvme::{
    NamespaceConfig, NvmeConfig, OpenImage, PoolConfig, Subsystem, SubsystemConfig,
};
use vm_memory::GuestMemoryAtomic;
use vmm_glue::vfio_user::{
    NvmeFunction, NvmeFunctionConfig, StopSignals, VfioUserInterrupts, VfioUserMemory,
    VfioUserServer,
};

use crate::{
    control::{self, NvmeControl},
    grumble,
    image::{open, spec::ImageSpec},
    serve_vfio_user::VfioUserArgs,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
        size,
    },
};

/// Serve disks as namespaces of an NVMe controller, for any VMM that speaks vfio-user
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
EXAMPLES
  A controller with one namespace, and QEMU (10.1 or newer) using it:
    platter serve nvme --socket /run/nvme.sock --namespace disk.qcow2,format=qcow2
    qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -machine memory-backend=mem \\
      -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"/run/nvme.sock\"}}'

  Two controllers, each for a guest of its own, that share a namespace with reservations:
    platter serve nvme --socket a.sock --socket b.sock --namespace disk.raw,format=raw,sidecar=disk.nvme

  Namespaces added, removed and resized while the guest runs:
    platter serve nvme --socket nvme.sock --namespace disk.raw,format=raw --control nvme.ctl
    platter ctl nvme.ctl add-namespace namespace=more.raw,format=raw
    platter ctl nvme.ctl resize nsid=1 size=80G

  For a client that writes doorbells to memory without a message, as SPDK's does; the server uses a whole
  processor from start to end:
    platter serve nvme --socket nvme.sock --namespace disk.raw,format=raw --poll

With --pool the guest creates namespaces itself, as images in that folder. They are there again at the next start with
the same --pool, with their identifiers and attached to the same controllers, and count against the capacity.

A namespace is IMAGE and options: format=FMT, lba=512|4096, nsid=N, readonly=on, sidecar=PATH, nguid=HEX,
eui64=HEX, uuid=UUID. The sidecar is a file of its own that remembers what NVMe knows beyond the image: the
block size that a format set, blocks marked uncorrectable, reservations that persist, a sanitize that runs.
Without it those commands are not offered.")]
pub(crate) struct NvmeArgs {
    /// A socket to listen on: a controller each
    #[arg(long, value_name = "PATH", required = true)]
    socket: Vec<PathBuf>,
    /// A namespace: an image, with ,format=FMT ,lba=4096 and ,sidecar=PATH as wanted
    #[arg(long, value_name = "IMAGE[,…]")]
    namespace: Vec<String>,
    /// I/O queue pairs of a controller
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128))]
    queues: u16,
    /// Threads for the I/O queues of a controller
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=128))]
    threads: u16,
    /// Offer namespace management, with images in a folder: DIR,capacity=SIZE
    #[arg(long, value_name = "DIR,capacity=SIZE")]
    pool: Option<String>,
    /// Let clients map the doorbells, and look at them all the time: a thread for each socket, which never
    /// sleeps and takes a whole processor
    #[arg(long)]
    poll: bool,
    /// Serial number: at most 20 bytes
    #[arg(long, value_name = "SERIAL", default_value = "")]
    serial: String,
    /// Qualified name of the subsystem
    #[arg(long, value_name = "NQN", default_value = "")]
    subnqn: String,
    /// PCI vendor and device, for whoever has numbers of their own; drivers do not look at them
    #[arg(long, value_name = "VVVV:DDDD", default_value = "1af4:10f4", value_parser = pci_id)]
    pci_id: (u16, u16),
    #[command(flatten)]
    common: VfioUserArgs,
}

/// Runs the command.
pub(crate) fn run(args: &NvmeArgs, persona: Persona) -> Outcome {
    // Before anything starts a thread, which would be killed by them otherwise.
    let signals = StopSignals::block()
        .map_err(|error| Failure::new(format!("signals cannot be blocked: {error}")))?;
    if args.namespace.is_empty() && args.pool.is_none() {
        return Err(Failure::new("expected a --namespace or a --pool"));
    }
    let subsystem = Subsystem::new(SubsystemConfig {
        nqn: args.subnqn.clone(),
        serial: args.serial.clone(),
        model: String::new(),
        seed: seed(args),
        pool: pool(args, persona)?,
    })
    .map_err(failed)?;
    for text in &args.namespace {
        let (disk, config) = namespace(args, text, persona)?;
        subsystem.add_namespace(disk, &config).map_err(failed)?;
    }
    serve(args, &subsystem, signals, persona)?;
    for namespace in subsystem.namespaces() {
        let closed = namespace.disk().close();
        closed.map_err(|error| Failure::new(error.to_string()))?;
    }
    Ok(0)
}

/// What makes the default names of this subsystem unique, and the same at every start.
fn seed(args: &NvmeArgs) -> String {
    let first = args.namespace.first().map(String::as_str);
    let image = first.map(|text| text.split(',').next().unwrap_or(text));
    let path = image.map_or_else(|| args.socket[0].clone(), PathBuf::from);
    let path = path.canonicalize().unwrap_or(path);
    path.display().to_string()
}

fn serve(
    args: &NvmeArgs,
    subsystem: &Arc<Subsystem>,
    signals: StopSignals,
    persona: Persona,
) -> Result<(), Failure> {
    let mut servers = Vec::new();
    let mut controllers = Vec::new();
    for socket in &args.socket {
        let interrupts = Arc::new(VfioUserInterrupts::default());
        let memory = GuestMemoryAtomic::new(VfioUserMemory::new());
        let config = NvmeFunctionConfig {
            controller: NvmeConfig {
                io_queues: args.queues,
                workers: usize::from(args.threads.min(args.queues)),
                vectors: args.queues + 1,
                vendor: args.pci_id.0,
                poll_max: args.common.poll_max(),
                ..NvmeConfig::default()
            },
            device: args.pci_id.1,
            poll: args.poll,
        };
        let function = NvmeFunction::new(subsystem, config, &memory, interrupts.clone());
        let function = Arc::new(function.map_err(server_failed)?);
        controllers.push(Arc::clone(&function));
        let mut server =
            VfioUserServer::bind(socket, function, memory, interrupts).map_err(server_failed)?;
        server.once(args.common.once);
        servers.push(server);
        tracing::info!(socket = %socket.display(), "serving nvme");
        if args.poll {
            grumble!(
                "platter: {}: --poll: looks at the doorbells all the time, and never sleeps",
                socket.display()
            );
        }
    }
    // Gone before the servers are, and the disks are closed.
    let _control = match &args.common.control {
        Some(path) => {
            let args = args.clone();
            let control = NvmeControl {
                subsystem: Arc::clone(subsystem),
                controllers,
                open: Box::new(move |text| namespace(&args, text, persona)),
            };
            Some(control::start(path, Arc::new(control))?)
        }
        None => None,
    };
    let mut stops = Vec::new();
    for server in &servers[1..] {
        stops.push(server.stop_handle().map_err(server_failed)?);
    }
    servers[0].stop_on(signals);
    thread::scope(|scope| {
        let mut servers = servers.iter_mut();
        let first = servers.next();
        let others: Vec<_> = servers.map(|it| scope.spawn(|| it.run())).collect();
        let mut result = first.map_or(Ok(()), VfioUserServer::run);
        if !args.common.once {
            for stop in &stops {
                stop.stop();
            }
        }
        for other in others {
            let ended = other.join().unwrap_or(Ok(()));
            result = result.and(ended);
        }
        result
    })
    .map_err(server_failed)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: virtio_devices::Error) -> Failure {
    Failure::new(error.to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn server_failed(error: vmm_glue::vfio_user::Error) -> Failure {
    Failure::new(error.to_string())
}

/// Opens `IMAGE[,option=value]…`.
fn namespace(
    args: &NvmeArgs,
    text: &str,
    persona: Persona,
) -> Result<(Box<dyn AsyncDiskFile>, NamespaceConfig), Failure> {
    let mut parts = text.split(',');
    let image = parts.next().unwrap_or_default();
    let mut config = NamespaceConfig::default();
    let mut format = None;
    for part in parts {
        let bad = |expected: &str| {
            Failure::new(format!("--namespace {text}: '{part}': expected {expected}"))
        };
        let (key, value) = part.split_once('=').ok_or_else(|| bad("option=value"))?;
        match key {
            "format" => format = Some(value),
            "lba" => {
                config.lba_size = match value {
                    "512" => 512,
                    "4096" => 4096,
                    _ => return Err(bad("512 or 4096")),
                }
            }
            "nsid" => config.nsid = Some(value.parse().map_err(|_| bad("a number"))?),
            "readonly" => {
                config.read_only = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("on or off")),
                }
            }
            "sidecar" => config.sidecar = Some(PathBuf::from(value)),
            "nguid" => config.nguid = Some(hex(value).ok_or_else(|| bad("32 hex digits"))?),
            "eui64" => config.eui64 = Some(hex(value).ok_or_else(|| bad("16 hex digits"))?),
            "uuid" => config.uuid = Some(hex(value).ok_or_else(|| bad("a UUID"))?),
            _ => {
                return Err(bad(
                    "format, lba, nsid, readonly, sidecar, nguid, eui64 or uuid",
                ));
            }
        }
    }
    let spec = ImageSpec::parse(image, false, format, persona)?;
    let how = args.common.how(config.read_only)?;
    Ok((open::open(&spec, &how, persona)?, config))
}

/// `VVVV:DDDD`, in hex; neither may be what an empty slot reads.
fn pci_id(text: &str) -> Result<(u16, u16), String> {
    let number = |digits: &str| u16::from_str_radix(digits, 16).ok();
    text.split_once(':')
        .and_then(|(vendor, device)| Some((number(vendor)?, number(device)?)))
        .filter(|(vendor, _)| !matches!(vendor, 0 | 0xffff))
        .ok_or_else(|| "expected two numbers in hex, as 1af4:10f4".to_owned())
}

/// Hex digits, with or without dashes.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut out = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(out)
}

/// `DIR,capacity=SIZE`.
fn pool(args: &NvmeArgs, persona: Persona) -> Result<Option<PoolConfig>, Failure> {
    let Some(text) = &args.pool else {
        return Ok(None);
    };
    let bad = || Failure::new(format!("--pool {text}: expected DIR,capacity=SIZE"));
    let (folder, capacity) = text.rsplit_once(",capacity=").ok_or_else(bad)?;
    let folder = PathBuf::from(folder);
    if !folder.is_dir() {
        return Err(Failure::new(format!(
            "--pool {}: expected an existing folder",
            folder.display()
        )));
    }
    // Read and written as the images of the command line are.
    let how = args.common.how(false)?;
    let open: OpenImage = Arc::new(move |path| {
        let name = path.to_str().ok_or("its name is no text")?;
        let spec = ImageSpec::parse(name, false, Some("raw"), persona);
        let spec = spec.map_err(|failure| failure.to_string())?;
        Ok(open::open_quietly(&spec, &how, persona)?)
    });
    let reopen = Arc::clone(&open);
    Ok(Some(PoolConfig {
        folder,
        capacity: size::parse(capacity).map_err(|_| bad())?,
        create: Arc::new(move |path, bytes| {
            // A sparse file is a raw image.
            let file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(path)?;
            file.set_len(bytes)?;
            reopen(path)
        }),
        open,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_identifiers() {
        assert_eq!(pci_id("1aF4:0010"), Ok((0x1af4, 0x10)));
        for text in [
            "", "1af4", "1af4:", ":1", "0:1", "ffff:1", "12345:1", "1:2:3",
        ] {
            assert!(pci_id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hex_digits_of_the_right_number() {
        assert_eq!(hex::<2>("0aF0"), Some([10, 240]));
        assert_eq!(hex::<2>("0a-f0"), Some([10, 240]));
        for text in ["", "0a", "0af0f", "0ag0"] {
            assert_eq!(hex::<2>(text), None, "{text}");
        }
    }
}
