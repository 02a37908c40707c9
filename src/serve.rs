//! `platter serve`: gives a disk to a virtual machine.

use std::{path::PathBuf, sync::Arc, time::Duration};

use block::io::EngineKind;
use clap::{Args, Subcommand};
use virtio_devices::virtio_blk::VirtioBlkConfig;
use vmm_glue::vhost_user::{StopSignals, VhostUserBlkConfig, VhostUserBlkServer};

use crate::{
    control::{self, BlkControl},
    image::{
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    serve_ahci::AhciArgs,
    serve_nvme::NvmeArgs,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};

/// Serve a disk to a virtual machine
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(subcommand)]
    transport: Transport,
}

#[derive(Subcommand, Debug)]
enum Transport {
    VhostUserBlk(VhostUserBlkArgs),
    Nvme(NvmeArgs),
    Ahci(AhciArgs),
}

/// Serve a disk as a vhost-user-blk device, for any VMM that speaks vhost-user
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Two queues on a socket, and QEMU using them:
    platter serve vhost-user-blk --socket /run/disk.sock --num-queues 2 -f qcow2 disk.qcow2
    qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -numa node,memdev=mem -chardev socket,id=disk,path=/run/disk.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=disk,num-queues=2

  A raw disk without the host's page cache:
    platter serve vhost-user-blk --socket /run/disk.sock --direct -f raw /dev/vg/disk

Name the format with -f wherever the guest can write to the disk: a guest must not be able to
make its raw disk look like an image that names other files. Files that an image names are opened
only if the format was named, and only inside the image's own folder.

SIGTERM and SIGINT stop the server in order: requests in flight end, caches are written, and a guest
that reconnects to the next server continues. SIGKILL is a power cut for formats that keep tables
in memory (qcow2), as far as the guest has not flushed; with --restartable every request completes
only when the tables that it needs are in the file, so that a killed server loses nothing; its successor
waits up to 30 seconds for the lock that the killed one may still hold.")]
struct VhostUserBlkArgs {
    /// The socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Request queues, a thread each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    num_queues: u16,
    /// The largest queue the guest may set up: a power of two
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue_size: u16,
    /// Refuse everything that writes
    #[arg(short, long)]
    read_only: bool,
    /// Bypass the host's page cache
    #[arg(long)]
    direct: bool,
    /// Cache mode: writeback (the default), writethrough, none, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<String>,
    /// The format of the image; detected otherwise, and then no other file is opened
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// What the guest reads as the disk's serial number: at most 20 bytes
    #[arg(long, value_name = "SERIAL", default_value = "")]
    serial: String,
    /// The engine: sync, io_uring or linux-aio (which needs --direct)
    #[arg(long, value_name = "ENGINE", value_parser = crate::util::persona::engine)]
    engine: Option<EngineKind>,
    /// What happens to discards: unmap (the default) or ignore
    #[arg(long, value_name = "MODE")]
    discard: Option<String>,
    /// Survive SIGKILL without losing a completed request
    #[arg(long)]
    restartable: bool,
    /// Pin guest memory once instead of for every request: faster with --direct; the memory cannot
    /// be swapped out or given back by a balloon
    #[arg(long)]
    pin_memory: bool,
    /// Microseconds that a queue's thread looks for requests before it sleeps, at most; 0: never
    #[arg(long, value_name = "US", default_value_t = 32, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    poll_max: u32,
    /// End after the first connection
    #[arg(long)]
    once: bool,
    /// A socket on which 'platter ctl' tells the running server what to do
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    image_opts: bool,
    /// The image
    #[arg(value_name = "IMAGE")]
    image: String,
}

/// Runs the command.
pub(crate) fn run(args: &ServeArgs, persona: Persona) -> Outcome {
    match &args.transport {
        Transport::VhostUserBlk(args) => vhost_user_blk(args, persona),
        Transport::Nvme(args) => crate::serve_nvme::run(args, persona),
        Transport::Ahci(args) => crate::serve_ahci::run(args, persona),
    }
}

fn vhost_user_blk(args: &VhostUserBlkArgs, persona: Persona) -> Outcome {
    // Before anything starts a thread, which would be killed by them otherwise.
    let signals = StopSignals::block()
        .map_err(|error| Failure::new(format!("signals cannot be blocked: {error}")))?;
    let spec = ImageSpec::parse(
        &args.image,
        args.image_opts,
        args.format.as_deref(),
        persona,
    )?;
    let mut how = OpenHow {
        read_only: args.read_only,
        direct: args.direct,
        engine: args.engine,
        restartable: args.restartable,
        named_files_need_format: true,
        ..OpenHow::default()
    };
    if let Some(mode) = &args.cache {
        how.cache = open::cache_mode(mode)?;
    }
    if let Some(name) = &args.discard {
        let policy = open::discard_policy(name);
        how.discard =
            Some(policy.ok_or_else(|| Failure::new(format!("Invalid discard option: {name}")))?);
    }
    let disk = open::open(&spec, &how, persona)?;
    let config = VhostUserBlkConfig {
        device: VirtioBlkConfig {
            num_queues: args.num_queues,
            queue_size: args.queue_size,
            serial: args.serial.clone(),
            read_only: args.read_only,
            pin_memory: args.pin_memory,
            poll_max: Duration::from_micros(args.poll_max.into()),
            ..VirtioBlkConfig::default()
        },
        once: args.once,
        ..VhostUserBlkConfig::default()
    };
    let failed = |error: vmm_glue::vhost_user::Error| Failure::new(error.to_string());
    let mut server = VhostUserBlkServer::bind(&args.socket, disk, config).map_err(failed)?;
    server.stop_on(signals).map_err(failed)?;
    tracing::info!(
        socket = %args.socket.display(),
        image = %spec.display(),
        queues = args.num_queues,
        "serving vhost-user-blk"
    );
    let control = args.control.as_deref().map(|path| {
        let device = Arc::new(BlkControl(Arc::clone(server.device())));
        control::start(path, device)
    });
    let control = control.transpose()?;
    let served = server.run().map_err(failed);
    drop(control);
    served?;
    Ok(0)
}
