//! `platter check`: looks for damage, and repairs it.

use block::{
    Format,
    formats::qcow2::check::{CheckReport, Repair},
};
use clap::Args;

use crate::{
    grumble,
    image::{
        maintenance::{self, Checked},
        open::{self, ShareArgs},
        spec::{ImageSpec, could_not_open},
    },
    say,
    util::{
        failure::{Failure, Outcome},
        json,
        persona::Persona,
    },
};

/// Look for damage in an image, and repair it
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Is this image sound?
    platter check disk.qcow2

  Give back space that nothing uses (after a crash, for instance):
    platter check -r leaks disk.qcow2

  Repair whatever can be repaired; make a copy first:
    platter check -r all disk.qcow2

EXIT STATUS
  0   sound, or repaired
  1   the check could not be done
  2   damaged
  3   not damaged, but space is lost (leaked clusters)
  63  images of this format cannot be checked")]
pub(crate) struct CheckArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Repair: leaks, or all
    #[arg(short, long, value_name = "leaks|all")]
    repair: Option<String>,
    /// Print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// Cache mode
    #[arg(
        short = 'T',
        long = "cache",
        value_name = "MODE",
        default_value = "writeback"
    )]
    cache: String,
    /// Print only what is wrong
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    share: ShareArgs,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs, persona: Persona) -> Outcome {
    let repair = match args.repair.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            let text = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            return Err(Failure::usage("check", text));
        }
    };
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("check", "Expecting one image file name"));
    };
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
    // The check goes through the page cache and reads each table once, whatever the mode.
    open::cache_mode(&args.cache)?;
    let cannot_open = |error: block::Error| {
        let reason = open::explain(&error, &spec.path, persona);
        could_not_open(&spec.display(), &reason, persona)
    };
    let format = match spec.format {
        Some(format) => format,
        None => maintenance::format_of(&spec.path).map_err(cannot_open)?,
    };
    if format != Format::Qcow2 {
        return Err(Failure::new("This image format does not support checks").status(63));
    }
    open::check_offline(&spec).map_err(Failure::new)?;
    let as_json = args.output == "json";
    let mut tell = |line: &str| {
        // Repairs are told on the standard output, what is wrong on the standard error.
        grumble!("{line}");
    };
    let share = args.share.force_share;
    let mut check = |repair| match maintenance::check_qcow2(&spec.path, repair, share, &mut tell) {
        Checked::Unusable(error) => Err(cannot_open(error)),
        Checked::Report(Err(error)) => {
            Err(Failure::new(format!("Check failed: {}", error.message())))
        }
        Checked::Report(Ok(report)) => Ok(report),
    };
    let mut report = check(repair)?;
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
        if !as_json && !args.quiet {
            say!(
                "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    {corruptions} corruptions\n\nDouble checking the fixed image now..."
            );
        }
        report = check(Repair::None)?;
        (report.corruptions_fixed, report.leaks_fixed) = (corruptions, leaks);
    }
    if as_json {
        json::print(&report);
    } else {
        print(&report, args.quiet);
    }
    Ok(if report.check_errors > 0 {
        1
    } else if report.corruptions > 0 {
        2
    } else if report.leaks > 0 {
        3
    } else {
        0
    })
}

fn print(report: &CheckReport, quiet: bool) {
    if quiet {
        return;
    }
    if report.corruptions + report.leaks + report.check_errors == 0 {
        say!("No errors were found on the image.");
    } else {
        if report.corruptions > 0 {
            say!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                report.corruptions
            );
        }
        if report.leaks > 0 {
            say!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                report.leaks
            );
        }
        if report.check_errors > 0 {
            say!(
                "\n{} internal errors have occurred during the check.",
                report.check_errors
            );
        }
    }
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        say!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        say!("Image end offset: {}", report.image_end_offset);
    }
}
