//! `platter convert`: copies disks between images and formats.

mod bitmaps;
mod compress;
mod job;
mod plain;
mod queued;
mod scan;
mod transfer;
mod workers;

use std::{path::PathBuf, time::Instant};

use block::{AsyncDiskFile, CacheMode, Format, io::EngineKind};
use clap::Args;

use crate::{
    create::parse_size,
    image::{
        create::{self, CreateRequest},
        open::{self, OpenHow, ShareArgs, SnapshotChoice},
        secrets,
        spec::{ImageSpec, could_not_open},
    },
    util::{
        failure::{Failure, Outcome},
        interrupt,
        keyval::KeyVals,
        persona::Persona,
        progress::Progress,
        size,
    },
};

use job::Job;

/// Bytes of a run of data, where they are only counted.
const SCAN_CHUNK: u64 = 1 << 20;

/// Copy a disk into another image, changing its format or making it smaller
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  From qcow2 to raw, showing progress:
    platter convert -p -O raw disk.qcow2 disk.raw

  A small image to send around: zstd-compressed clusters, zeroes left out:
    platter convert -c -O qcow2 -o compression_type=zstd disk.raw disk.qcow2

  Only what differs from base.qcow2:
    platter convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 small-overlay.qcow2

  Into a block device that is there already:
    platter convert -n -O raw disk.qcow2 /dev/vg/disk

Several source images are copied one after the other into one disk. Reads and writes overlap;
holes and zeroes of the source are not read. A target that could not be completed is removed if
it was made here.

OPTIONS WITHOUT EFFECT
  -C (copy offloading) is accepted and never used.")]
pub(crate) struct ConvertArgs {
    /// The format of the source; detected otherwise
    #[arg(short, long = "source-format", value_name = "FMT")]
    format: Option<String>,
    /// The format of the target; raw if not given
    #[arg(short = 'O', long, value_name = "FMT")]
    target_format: Option<String>,
    /// Options for making the target: key=value,... or 'help'
    #[arg(short, long = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stack the target on this file, which the source is stacked on, too
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// The format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Compress
    #[arg(short, long)]
    compress: bool,
    /// The target is there: do not make it
    #[arg(short, long)]
    no_create: bool,
    /// With -n: the target reads as zeroes
    #[arg(long)]
    target_is_zero: bool,
    /// Zeroes shorter than this are written as data; 0 writes everything
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k")]
    sparse_size: String,
    /// Copy this internal snapshot (a name, an id, or snapshot.name=NAME)
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Chunks in hand, from 1 to 16: threads (no more than processors without -c), or requests in flight
    /// past the page cache or with --engine
    #[arg(short = 'm', long, value_name = "N", default_value = "8")]
    parallel: u32,
    /// Let writes to the target overtake each other
    #[arg(short = 'W', long)]
    oob: bool,
    /// Cache mode of the target
    #[arg(short = 't', long, value_name = "MODE")]
    target_cache: Option<String>,
    /// Cache mode of the source
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback")]
    source_cache: String,
    /// The most bytes a second
    #[arg(short, long, value_name = "RATE")]
    rate_limit: Option<String>,
    /// Read errors of the source become zeroes
    #[arg(long)]
    salvage: bool,
    /// Copy the persistent bitmaps of the source, too
    #[arg(long)]
    bitmaps: bool,
    /// With --bitmaps: leave out inconsistent ones
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// Copy offloading: accepted, without effect
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// The engine: sync, io_uring or linux-aio
    #[arg(long, value_name = "ENGINE", value_parser = crate::util::persona::engine)]
    engine: Option<EngineKind>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The target, too, is a list of options (with -n)
    #[arg(long)]
    target_image_opts: bool,
    #[command(flatten)]
    share: ShareArgs,
    /// One or more sources, and the target
    #[arg(value_name = "SOURCE... TARGET")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs, persona: Persona) -> Outcome {
    check(args)?;
    let target_format = args.target_format.as_deref().unwrap_or("raw");
    let target_format = Format::from_name(target_format)
        .ok_or_else(|| Failure::new(format!("Unknown file format '{target_format}'")))?;
    if args
        .options
        .iter()
        .any(|list| list == "help" || list == "?")
    {
        crate::say!("{}", create::describe_options(target_format));
        return Ok(0);
    }
    let mut options = KeyVals::of_lists(&args.options).map_err(Failure::new)?;
    let [names @ .., target] = args.files.as_slice() else {
        return Err(Failure::new("Must specify image file name"));
    };
    if names.is_empty() {
        return Err(Failure::new("Must specify image file name"));
    }
    let sources = open_sources(args, names, persona)?;
    if args.bitmaps {
        bitmaps::check_source(&sources, args.skip_broken_bitmaps, persona)?;
    }
    let total: u64 = sources.iter().map(|(_, disk)| disk.size()).sum();
    if let Some(name) = &args.backing {
        options.take("backing_file");
        options.push("backing_file", name);
    }
    if let Some(format) = &args.backing_format {
        options.take("backing_fmt");
        options.push("backing_fmt", format);
    }
    let backing = options
        .get("backing_file")
        .is_some_and(|name| !name.is_empty());
    if backing && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    if backing && !args.no_create && options.get("backing_fmt").is_none() {
        return Err(Failure::new(
            "Use of backing file requires explicit backing format",
        ));
    }
    if args.compress && target_format != Format::Qcow2 && !args.no_create {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    interrupt::watch();
    let made = if args.no_create {
        None
    } else {
        Some(make(target, target_format, options, total, persona)?)
    };
    let result = fill(
        args,
        sources,
        target,
        target_format,
        made.as_ref(),
        backing,
        persona,
    );
    if let (
        Err(_),
        Some(Made {
            path, new: true, ..
        }),
    ) = (&result, &made)
    {
        // What failed matters, not that its remains could not be removed.
        let _ = std::fs::remove_file(path);
    }
    result
}

/// The target as it was made.
struct Made {
    path: PathBuf,
    /// There was no file before.
    new: bool,
    /// It reads as zeroes until something is written: not what noise decrypts to.
    zero: bool,
    /// The option and the secret that open it, where it is encrypted.
    key: Option<(String, String)>,
}

fn check(args: &ConvertArgs) -> Outcome<()> {
    let refuse = |text: &str| Err(Failure::new(text));
    if !(1..=16).contains(&args.parallel) {
        return refuse("Invalid number of coroutines specified. Must be between 1 and 16.");
    }
    if args.no_create && !args.options.is_empty() {
        return refuse("-o has no effect when skipping image creation");
    }
    if args.target_is_zero && !args.no_create {
        return refuse("--target-is-zero requires use of -n flag");
    }
    if args.target_image_opts && !args.no_create {
        return refuse("--target-image-opts requires use of -n flag");
    }
    if args.skip_broken_bitmaps && !args.bitmaps {
        return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if args.copy_range_offloading && args.compress {
        return refuse("Cannot enable copy offloading when -c is used");
    }
    if args.copy_range_offloading && args.sparse_size != "4k" {
        return refuse("Cannot enable copy offloading when -S is used");
    }
    Ok(())
}

fn open_sources(
    args: &ConvertArgs,
    names: &[String],
    persona: Persona,
) -> Outcome<Vec<(u64, Box<dyn AsyncDiskFile>)>> {
    let how = OpenHow {
        force_share: args.share.force_share,
        cache: open::cache_mode(&args.source_cache)?,
        engine: args.engine,
        ..OpenHow::reading()
    };
    if args.snapshot.is_some() && names.len() > 1 {
        return Err(Failure::new(
            "No support for concatenating multiple snapshot",
        ));
    }
    let mut list = Vec::new();
    let mut start = 0;
    for name in names {
        let format = args.format.as_deref();
        let spec = ImageSpec::parse(name, args.share.image_opts, format, persona)?;
        let disk = match &args.snapshot {
            None => open::open(&spec, &how, persona)?,
            Some(text) => {
                let chosen = SnapshotChoice::read(text, persona)?;
                open::open_snapshot(&spec, &how, &chosen, persona)?
            }
        };
        let size = disk.size();
        list.push((start, disk));
        start += size;
    }
    Ok(list)
}

fn make(
    target: &str,
    format: Format,
    options: KeyVals,
    total: u64,
    persona: Persona,
) -> Outcome<Made> {
    let path = ImageSpec::parse(target, false, None, persona)?.path;
    let new = path.symlink_metadata().is_err();
    let size = options.get("size").is_none().then_some(total);
    let key = secrets::key_of(&options, format);
    let preallocated = options
        .get("preallocation")
        .is_some_and(|mode| mode != "off");
    let zero = format != Format::Luks && !(key.is_some() && preallocated);
    let request = CreateRequest {
        path: path.clone(),
        name: target.to_owned(),
        format,
        options,
        size,
        unchecked_backing: false,
    };
    let failed = |failure: Failure| failure.context(target).context("error while converting");
    let plan = create::plan(request, persona).map_err(failed)?;
    plan.execute().map_err(failed)?;
    Ok(Made {
        path,
        new,
        zero,
        key,
    })
}

#[allow(
    clippy::too_many_arguments,
    reason = "the parts of one command, in order"
)]
fn fill(
    args: &ConvertArgs,
    sources: Vec<(u64, Box<dyn AsyncDiskFile>)>,
    target: &str,
    format: Format,
    made: Option<&Made>,
    backing: bool,
    persona: Persona,
) -> Outcome {
    let cache = match &args.target_cache {
        Some(mode) => open::cache_mode(mode)?,
        None if persona.is_qemu() => CacheMode::Unsafe,
        None => CacheMode::WriteBack,
    };
    let source_cache = open::cache_mode(&args.source_cache)?;
    let how = OpenHow {
        cache,
        engine: args.engine,
        ..OpenHow::default()
    };
    let mut spec = if args.target_image_opts {
        ImageSpec::parse(target, true, None, persona)?
    } else {
        ImageSpec::parse(target, false, Some(format.name()), persona)?
    };
    if let Some((option, id)) = made.and_then(|made| made.key.as_ref()) {
        spec.options.push(option, id);
    }
    let disk = open::open_quietly(&spec, &how, persona)
        .map_err(|text| could_not_open(&spec.display(), &text, persona))?;
    if args.compress && disk.format() != Format::Qcow2 {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    if args.bitmaps {
        bitmaps::check_target(&*disk)?;
    }
    let size = sources
        .last()
        .map_or(0, |(start, disk)| start + disk.size());
    if disk.size() < size {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let sparse = size::parse(&args.sparse_size)
        .ok()
        .filter(|s| s.is_multiple_of(512));
    let sparse = sparse.ok_or_else(|| {
        let text = &args.sparse_size;
        Failure::new(format!(
            "Invalid buffer size for sparse output specified: '{text}'."
        ))
    })?;
    let rate = match &args.rate_limit {
        Some(text) => Some(
            parse_size(text)
                .map_err(|_| Failure::new(format!("Invalid rate limit specified: '{text}'.")))?,
        ),
        None => None,
    };
    let job = Job {
        sources,
        target_is_zero: args.target_is_zero
            || (made.is_some_and(|made| made.zero) && !backing && is_file(&spec)),
        target_has_backing: backing,
        sparse,
        parallel: args.parallel as usize,
        in_order: !args.oob,
        salvage: args.salvage,
        rate: rate.filter(|rate| *rate > 0),
        started: Instant::now(),
        target: disk,
        persona,
    };
    let shown = args.progress && !args.quiet;
    let work = if args.compress {
        size
    } else {
        work(&job, shown)?
    };
    let progress = Progress::bytes(shown, persona, "converting", work);
    if args.compress {
        compress::run(&job, &progress)?;
    } else if args.engine.is_none() && [source_cache, cache].iter().all(|mode| is_cached(*mode)) {
        plain::run(&job, &progress)?;
    } else {
        queued::run(&job, &progress)?;
    }
    if let (true, [(_, source)]) = (args.bitmaps, job.sources.as_slice()) {
        bitmaps::copy(&**source, &*job.target, persona)?;
    }
    let failed = |error: block::Error| Failure::new(error.to_string());
    job.target.flush().map_err(failed)?;
    job.target.close().map_err(failed)?;
    progress.finish();
    Ok(0)
}

/// Whether reads and writes only copy memory.
fn is_cached(mode: CacheMode) -> bool {
    matches!(mode, CacheMode::WriteBack | CacheMode::Unsafe)
}

/// The bytes to be copied, which are looked for only if progress is to be shown. QEMU looks always, and
/// says what it cannot find out.
fn work(job: &Job, shown: bool) -> Outcome<u64> {
    let tells = job.salvage && job.persona.is_qemu();
    let mut sum = 0u64;
    if !shown && !tells {
        return Ok(sum);
    }
    let mut result = Ok(());
    let look = job.look_for_copy(SCAN_CHUNK);
    scan::run(&scan::sources(&job.sources)?, look, &mut |run| match run {
        Ok(run) => {
            if let Some(kind) = run.unknown.filter(|_| tells) {
                job.warn("block status at offset", run.offset, kind);
            }
            sum += if job.is_work(&run) { run.len } else { 0 };
            true
        }
        Err(failure) => {
            result = Err(failure);
            false
        }
    });
    result.map(|()| sum)
}

/// A device that was not made here keeps what it held.
fn is_file(spec: &ImageSpec) -> bool {
    std::fs::metadata(&spec.path).is_ok_and(|meta| meta.is_file())
}
