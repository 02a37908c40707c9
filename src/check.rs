//! `platter check`: looks for damage, and repairs it.

use block::AsyncDiskFile;
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    grumble,
    image::{
        maintenance::{self, CheckReport, Repair},
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
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
    let how = OpenHow {
        read_only: repair == Repair::None,
        repair: repair != Repair::None,
        force_share: args.share.force_share,
        cache: open::cache_mode(&args.cache)?,
        no_backing: true,
        ..OpenHow::default()
    };
    let disk = open::open(&spec, &how, persona)?;
    let report = match maintenance::check(&*disk, repair) {
        Ok(Some(report)) => report,
        Ok(None) => {
            return Err(Failure::new("This image format does not support checks").status(63));
        }
        Err(error) => return Err(Failure::new(format!("Check failed: {}", error.message()))),
    };
    if args.output == "json" {
        report.messages.iter().for_each(|line| grumble!("{line}"));
        json::print(&describe(&report, &spec, &*disk));
    } else {
        print(&report, args.quiet);
    }
    // A check that changed nothing wrote nothing; one that repaired must have reached the file.
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
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
    for line in &report.messages {
        grumble!("{line}");
    }
    if quiet {
        return;
    }
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        say!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...",
            report.leaks_fixed,
            report.corruptions_fixed
        );
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
    if let Some(end) = report.image_end_offset {
        say!("Image end offset: {end}");
    }
}

fn describe(report: &CheckReport, spec: &ImageSpec, disk: &dyn AsyncDiskFile) -> Value {
    let mut map = Map::new();
    map.insert("filename".into(), spec.display().to_string().into());
    map.insert("format".into(), disk.format().name().into());
    map.insert("check-errors".into(), report.check_errors.into());
    if let Some(end) = report.image_end_offset {
        map.insert("image-end-offset".into(), end.into());
    }
    for (key, value) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if value > 0 {
            map.insert(key.into(), value.into());
        }
    }
    map.into()
}
