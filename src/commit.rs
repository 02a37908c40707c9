//! `platter commit`: puts what an overlay holds into the image below.

use std::path::Path;

use block::{Disk, DiskFile, maintenance};
use clap::Args;

use crate::{
    image::{
        chain,
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        interrupt,
        persona::Persona,
        progress::Progress,
        rate::Rate,
    },
};

/// Put what an overlay holds into the image it is stacked on
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  base.qcow2 <- overlay.qcow2: keep what the overlay has, and go on with it empty:
    platter commit overlay.qcow2

  The same, leaving the overlay as it is, because it is going to be removed:
    platter commit -d overlay.qcow2 && rm overlay.qcow2

  base.qcow2 <- monday.qcow2 <- tuesday.qcow2: all into the base; both overlays are of no use then:
    platter commit -b base.qcow2 tuesday.qcow2

The backing file is opened for writing, which nobody else may do meanwhile. It grows if the overlay's
disk is larger. If the command is interrupted, nothing is lost: the overlay still has everything, and
the command can be given again. Every other overlay of the same backing file is of no use
afterwards.")]
pub(crate) struct CommitArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Commit into this image of the chain, instead of the one right below; implies -d
    #[arg(short, long, value_name = "FILE")]
    base: Option<String>,
    /// Leave the overlay as it is, instead of emptying it
    #[arg(short, long = "drop")]
    drop: bool,
    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// The most bytes a second
    #[arg(short, long, value_name = "RATE")]
    rate_limit: Option<String>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    image_opts: bool,
    /// The overlay
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CommitArgs, persona: Persona) -> Outcome {
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("commit", "Expecting one image file name"));
    };
    let rate = Rate::parse(args.rate_limit.as_deref())?;
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.image_opts, format, persona)?;
    let depth = match &args.base {
        None => 1,
        Some(base) => depth_of(base, &spec, persona)?,
    };
    let how = OpenHow {
        cache: open::cache_mode(&args.cache)?,
        writable_backing: depth,
        ..OpenHow::default()
    };
    let disk = open::open_disk(&spec, &how, persona)?;
    if disk.info().backing_file.is_none() {
        return Err(Failure::new("Image does not have a backing file"));
    }
    interrupt::watch();
    let progress = Progress::bytes(
        args.progress && !args.quiet,
        persona,
        "committing",
        disk.size(),
    );
    copy(&disk, depth, &progress, rate, persona)?;
    if args.base.is_none() && !args.drop {
        maintenance::make_empty(&disk).map_err(|error| match persona.is_qemu() {
            true => Failure::new(format!(
                "Failed to empty {file}: {}",
                crate::util::errno::request_text(error.kind())
            )),
            false => Failure::new(error.to_string()).context("committed, but not emptied"),
        })?;
    }
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    progress.finish();
    if !args.quiet {
        say!("Image committed.");
    }
    Ok(0)
}

fn copy(
    disk: &Disk,
    depth: usize,
    progress: &Progress,
    rate: Rate,
    persona: Persona,
) -> Outcome<()> {
    let mut last = 0;
    let result = maintenance::commit(disk, depth, &mut |done| {
        progress.advance(done - last);
        last = done;
        rate.keep(done);
        interrupt::stop()
    });
    result.map_err(|error| {
        interrupt::failure(&error).unwrap_or_else(|| match persona.is_qemu() {
            true => Failure::new(format!(
                "Block job failed: {}",
                crate::util::errno::request_text(error.kind())
            )),
            false => Failure::new(error.to_string()),
        })
    })
}

/// How far down the chain the image is that `base` names.
fn depth_of(base: &str, spec: &ImageSpec, persona: Persona) -> Outcome<usize> {
    let how = OpenHow {
        force_share: true,
        ..OpenHow::reading()
    };
    let disks = chain::open_all(spec, &how, persona)?;
    let same = |a: &Path, b: &Path| match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    };
    let found = disks.windows(2).position(|pair| {
        let (above, below) = (&pair[0], &pair[1]);
        above.info().backing_file.as_deref() == Some(base)
            || same(&chain::resolve(above.path(), base), below.path())
    });
    found.map(|at| at + 1).ok_or_else(|| {
        Failure::new(format!(
            "Did not find '{base}' in the backing chain of '{}'",
            spec.display()
        ))
    })
}
