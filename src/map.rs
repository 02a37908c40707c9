//! `platter map`: where the bytes of the disk live.

use block::{DiskFile, image::BlockStatus};
use clap::Args;

use crate::{
    image::{
        chain,
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
        size,
    },
};

/// Show where the bytes of the disk live
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Which parts of the disk have data, and where in which file?
    platter map overlay.qcow2

  Everything, holes and zeroes included, for a program:
    platter map --output json disk.qcow2

In the JSON, depth counts the images down the backing chain; present says that some image has an
allocation; data, zero and compressed how it is kept; offset where in the file.")]
pub(crate) struct MapArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// Start at this offset
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// Show at most this many bytes
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    #[command(flatten)]
    share: ShareArgs,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// A run of the disk that lives in one way.
struct Run {
    start: u64,
    status: BlockStatus,
}

/// Runs the command.
pub(crate) fn run(args: &MapArgs, persona: Persona) -> Outcome {
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("map", "Expecting one image file name"));
    };
    let number = |text: &Option<String>, what: &str| -> Outcome<Option<u64>> {
        let read = |text: &String| {
            size::parse(text)
                .map_err(|_| Failure::new(format!("Invalid {what} specified: '{text}'.")))
        };
        text.as_ref().map(read).transpose()
    };
    let start = number(&args.start_offset, "start offset")?.unwrap_or(0);
    let most = number(&args.max_length, "max length")?.unwrap_or(u64::MAX);
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
    let how = OpenHow {
        force_share: args.share.force_share,
        ..OpenHow::reading()
    };
    let disk = open::open(&spec, &how, persona)?;
    let names: Vec<String> = chain::open_all(&spec, &how, persona)?
        .iter()
        .map(|disk| disk.path().display().to_string())
        .collect();
    let end = start.saturating_add(most).min(disk.size());
    let json = args.output == "json";
    if json {
        crate::util::out::print(format_args!("["));
    } else {
        say!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    }
    let mut first = true;
    let mut at = start;
    let mut unshown = false;
    while at < end {
        let run = next_run(&*disk, at, end)?;
        at += run.status.len;
        if json {
            let comma = if first { "" } else { ",\n" };
            crate::util::out::print(format_args!("{comma}{}", json_line(&run)));
            first = false;
        } else {
            unshown |= !print_line(&run, &names);
            if unshown {
                break;
            }
        }
    }
    if json {
        say!("]");
    }
    if unshown {
        return Err(Failure::new(
            "File contains external, encrypted or compressed clusters.",
        ));
    }
    Ok(0)
}

/// The longest run from `start` that lives in one way.
fn next_run(disk: &dyn DiskFile, start: u64, end: u64) -> Outcome<Run> {
    let status = |at: u64| -> Outcome<BlockStatus> {
        let mut status = disk
            .block_status(at, end - at)
            .map_err(|error| Failure::new(error.to_string()))?;
        status.len = status.len.clamp(1, end - at);
        Ok(status)
    };
    let mut run = Run {
        start,
        status: status(start)?,
    };
    while start + run.status.len < end {
        let next = status(start + run.status.len)?;
        if !continues(&run.status, &next) {
            break;
        }
        run.status.len += next.len;
    }
    Ok(run)
}

fn continues(run: &BlockStatus, next: &BlockStatus) -> bool {
    let place = match (run.offset, next.offset) {
        (Some(a), Some(b)) => run.file == next.file && a.checked_add(run.len) == Some(b),
        (None, None) => true,
        _ => false,
    };
    place
        && (run.depth, run.present, run.zero, run.data, run.compressed)
            == (
                next.depth,
                next.present,
                next.zero,
                next.data,
                next.compressed,
            )
}

fn json_line(run: &Run) -> String {
    let status = &run.status;
    let offset = status
        .offset
        .map(|offset| format!(", \"offset\": {}", offset.0))
        .unwrap_or_default();
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{offset}}}",
        run.start,
        status.len,
        status.depth,
        status.present,
        status.zero,
        status.data,
        status.compressed
    )
}

/// Prints a run with data; whether it can be shown, which needs a place in a file.
fn print_line(run: &Run, names: &[String]) -> bool {
    let status = &run.status;
    if !status.data || status.zero {
        return true;
    }
    let Some(offset) = status.offset else {
        return false;
    };
    let name = names.get(status.depth as usize).map_or("", String::as_str);
    let hex = |value: u64| match value {
        0 => "0".to_owned(),
        value => format!("{value:#x}"),
    };
    say!(
        "{:<16}{:<16}{:<16}{name}",
        hex(run.start),
        hex(status.len),
        hex(offset.0)
    );
    true
}
