//! `platter snapshot`: internal snapshots.

use block::{Error, ErrorKind, Format};
use clap::Args;

use crate::{
    image::{
        maintenance::{self, SnapshotAction},
        open::{self, OpenHow, ShareArgs},
        qcow2_options,
        spec::{ImageSpec, could_not_open},
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
    let action = if let Some(name) = &args.create {
        Some((SnapshotAction::Create, name))
    } else if let Some(name) = &args.apply {
        Some((SnapshotAction::Apply, name))
    } else {
        let delete = args.delete.as_ref();
        delete.map(|name| (SnapshotAction::Delete, name))
    };
    let Some((action, name)) = action else {
        let how = OpenHow {
            force_share: args.share.force_share,
            no_backing: true,
            ..OpenHow::reading()
        };
        let disk = open::open(&spec, &how, persona)?;
        if !args.quiet {
            snapshots::print(&disk.info().snapshots);
        }
        return Ok(0);
    };
    let format = match spec.format {
        Some(format) => format,
        None => maintenance::format_of(&spec.path)
            .map_err(|error| cannot_open(&spec, &error, persona))?,
    };
    open::check_offline(&spec).map_err(Failure::new)?;
    let passed = qcow2_options::take_pass_discards(&mut spec.options.clone());
    if !passed.map_err(Failure::new)?.snapshot {
        return Err(Failure::new(
            "pass-discard-snapshot: off, expected on: what a snapshot held alone gives its space back",
        ));
    }
    let done = if format == Format::Qcow2 {
        maintenance::snapshot(&spec.path, action, name)
    } else {
        Err(ErrorKind::Unsupported.into())
    };
    done.map_err(|error| refuse(action, name, &error))?;
    Ok(0)
}

fn cannot_open(spec: &ImageSpec, error: &Error, persona: Persona) -> Failure {
    let reason = open::explain(error, &spec.path, persona);
    could_not_open(&spec.display(), &reason, persona)
}

fn refuse(action: SnapshotAction, name: &str, error: &Error) -> Failure {
    let missing = error.kind() == ErrorKind::NotFound;
    let (verb, reason) = match action {
        SnapshotAction::Create => ("create", reason(error)),
        SnapshotAction::Apply if missing => {
            let text = errno::text(libc::ENOENT);
            ("apply", format!("Failed to load snapshot: {text}"))
        }
        SnapshotAction::Apply => ("apply", reason(error)),
        SnapshotAction::Delete if missing => ("delete", "snapshot not found".into()),
        SnapshotAction::Delete => ("delete", reason(error)),
    };
    Failure::new(format!("Could not {verb} snapshot '{name}': {reason}"))
}

fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Unsupported | ErrorKind::NoSpace | ErrorKind::Io(_) => {
            errno::text(error.kind().errno())
        }
        _ => error.message(),
    }
}
