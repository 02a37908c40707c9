//! `platter snapshot`: internal snapshots.

use block::{Error, ErrorKind};
use clap::Args;

use crate::{
    image::{
        maintenance,
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
    },
    util::{
        errno,
        failure::{Failure, Outcome},
        persona::Persona,
        snapshots,
    },
};

/// List, take, go back to or delete internal snapshots
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Before an experiment, take a snapshot; go back to it; forget it:
    platter snapshot -c before disk.qcow2
    platter snapshot -a before disk.qcow2
    platter snapshot -d before disk.qcow2

  Which are there?
    platter snapshot -l disk.qcow2

The image must not be in use.")]
pub(crate) struct SnapshotArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// List (the default)
    #[arg(short, long)]
    list: bool,
    /// Take a snapshot
    #[arg(short, long, value_name = "NAME")]
    create: Option<String>,
    /// Go back to a snapshot, by id or name
    #[arg(short, long, value_name = "NAME")]
    apply: Option<String>,
    /// Delete a snapshot, by id or name
    #[arg(short, long, value_name = "NAME")]
    delete: Option<String>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    share: ShareArgs,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &SnapshotArgs, persona: Persona) -> Outcome {
    let actions = [
        args.list,
        args.create.is_some(),
        args.apply.is_some(),
        args.delete.is_some(),
    ];
    if actions.iter().filter(|given| **given).count() > 1 {
        return Err(Failure::usage(
            "snapshot",
            "Cannot mix '-l', '-a', '-c', '-d'",
        ));
    }
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("snapshot", "Expecting one image file name"));
    };
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
    let changes = actions[1..].contains(&true);
    let how = OpenHow {
        read_only: !changes,
        force_share: args.share.force_share,
        no_backing: true,
        ..OpenHow::default()
    };
    let disk = open::open(&spec, &how, persona)?;
    let failed = |action: &str, name: &str, error: &Error| {
        let reason = reason(error);
        Failure::new(format!("Could not {action} snapshot '{name}': {reason}"))
    };
    if let Some(name) = &args.create {
        maintenance::snapshot_create(&*disk, name).map_err(|e| failed("create", name, &e))?;
    } else if let Some(name) = &args.apply {
        maintenance::snapshot_apply(&*disk, name).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Failure::new(format!(
                "Could not apply snapshot '{name}': Failed to load snapshot: {}",
                errno::text(libc::ENOENT)
            )),
            _ => failed("apply", name, &e),
        })?;
    } else if let Some(name) = &args.delete {
        maintenance::snapshot_delete(&*disk, name).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Failure::new(format!(
                "Could not delete snapshot '{name}': snapshot not found"
            )),
            _ => failed("delete", name, &e),
        })?;
    } else if !args.quiet {
        snapshots::print(&disk.info().snapshots);
    }
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    Ok(0)
}

fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Unsupported | ErrorKind::NoSpace | ErrorKind::Io(_) => {
            errno::text(error.kind().errno())
        }
        _ => error.message(),
    }
}
