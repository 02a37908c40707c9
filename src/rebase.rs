//! `platter rebase`: puts an overlay on another backing file.

use block::{Disk, DiskFile, ErrorKind, Format, maintenance};
use clap::Args;

use crate::{
    image::{
        chain,
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    util::{
        failure::{Failure, Outcome},
        interrupt,
        persona::Persona,
        progress::Progress,
    },
};

/// Put an overlay on another backing file
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  The disk stays what it is, on top of another base. What the new base does not have, or has
  differently, is copied into the overlay:
    platter rebase -b new-base.qcow2 -F qcow2 overlay.qcow2

  The overlay is to stand alone, without any base:
    platter rebase -b '' overlay.qcow2

  The base was only moved or renamed; change the name and look at nothing else. If the content is
  not the same, the disk is damaged:
    platter rebase -u -b /new/place/base.qcow2 -F qcow2 overlay.qcow2

If the command is interrupted, the overlay is still on its old base, and sound.")]
pub(crate) struct RebaseArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The new backing file, relative to the image's folder; '' for none
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// The format of the new backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Change the name alone; neither backing file is opened
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_mode: bool,
    /// Compress what is copied
    #[arg(short, long)]
    compress: bool,
    /// Cache mode of the image
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// Cache mode of the backing files
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback")]
    source_cache: String,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    share: open::ShareArgs,
    /// The overlay
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &RebaseArgs, persona: Persona) -> Outcome {
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("rebase", "Expecting one image file name"));
    };
    let Some(backing) = args.backing.as_deref() else {
        return Err(Failure::usage("rebase", "Must specify backing file (-b)"));
    };
    if args.share.force_share {
        return Err(Failure::new(
            "-U/--force-share can only be used for reading: a rebase writes",
        ));
    }
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
    let how = OpenHow {
        cache: open::cache_mode(&args.cache)?,
        no_backing: args.unsafe_mode,
        ..OpenHow::default()
    };
    let source_cache = open::cache_mode(&args.source_cache)?;
    let disk = open::open_disk(&spec, &how, persona)?;
    let name = Some(backing).filter(|name| !name.is_empty());
    if disk.format() != Format::Qcow2 {
        return Err(Failure::new(if args.compress {
            "Compression not supported for this file format".to_owned()
        } else {
            let format = disk.format();
            format!("Could not change the backing file: {format} images have none")
        }));
    }
    let progress = Progress::bytes(
        args.progress && !args.quiet,
        persona,
        "comparing",
        disk.size(),
    );
    if !args.unsafe_mode {
        let below = OpenHow {
            cache: source_cache,
            ..OpenHow::reading()
        };
        let new = name
            .map(|name| open_new(&disk, name, args, &below, persona))
            .transpose()?;
        interrupt::watch();
        copy(&disk, new.as_ref(), args.compress, &progress)?;
    }
    let format = args.backing_format.as_deref();
    change(&disk, name, format)?;
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    progress.finish();
    Ok(0)
}

/// Opens the new backing file, whose name is relative to the image's folder.
fn open_new(
    disk: &Disk,
    name: &str,
    args: &RebaseArgs,
    how: &OpenHow,
    persona: Persona,
) -> Outcome<Disk> {
    let path = chain::resolve(disk.path(), name);
    let failed = |text: String| {
        let path = path.display();
        Failure::new(format!("Could not open new backing file '{path}': {text}"))
    };
    let named = args.backing_format.as_deref();
    let format = match named {
        Some(name) => Some(
            Format::from_name(name).ok_or_else(|| failed(format!("Unknown driver '{name}'")))?,
        ),
        None => None,
    };
    let spec = ImageSpec::plain(&path, format);
    open::open_disk_quietly(&spec, how, persona).map_err(failed)
}

fn copy(disk: &Disk, new: Option<&Disk>, compress: bool, progress: &Progress) -> Outcome<()> {
    let mut last = 0;
    let result = maintenance::copy_differences(disk, new, compress, &mut |done| {
        progress.advance(done - last);
        last = done;
        interrupt::stop()
    });
    result.map_err(|error| {
        interrupt::failure(&error).unwrap_or_else(|| Failure::new(error.to_string()))
    })
}

fn change(disk: &Disk, name: Option<&str>, format: Option<&str>) -> Outcome<()> {
    let shown = name.unwrap_or_default();
    let failed = |reason: &str| {
        Failure::new(format!(
            "Could not change the backing file to '{shown}': {reason}"
        ))
    };
    if name.is_some() && format.is_none() {
        return Err(failed("backing format must be specified"));
    }
    maintenance::set_backing(disk, name, format).map_err(|error| match error.kind() {
        ErrorKind::InvalidImage => failed("No space left in the file header"),
        _ => failed(&error.message()),
    })
}
