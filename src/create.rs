//! `platter create`: makes an image.

use std::path::PathBuf;

use block::Format;
use clap::Args;

use crate::{
    image::{
        create::{self, CreateRequest},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        keyval::KeyVals,
        persona::Persona,
        size::{self, SizeError},
    },
};

/// Make an image
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  A qcow2 image of 40 GiB that takes no space yet:
    platter create -f qcow2 disk.qcow2 40G

  An overlay: what is written goes to it, everything else is read from base.qcow2. The size is
  that of the base:
    platter create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2

  Larger clusters, zstd compression, tables in place from the start:
    platter create -f qcow2 -o cluster_size=2M,compression_type=zstd,preallocation=metadata disk.qcow2 1T

  What can be said with -o?
    platter create -f qcow2 -o help")]
pub(crate) struct CreateArgs {
    /// The format; raw if not given
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Options of the format: key=value,... or 'help'
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stack the image on this file
    #[arg(short, long = "backing", value_name = "FILE")]
    backing: Option<String>,
    /// The format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look whether the backing file can be opened; the size must be given
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The file to make, and the size of the disk (with suffix k, M, G, T, P or E)
    #[arg(value_name = "FILE [SIZE]", allow_negative_numbers = true)]
    names: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CreateArgs, persona: Persona) -> Outcome {
    if args
        .options
        .iter()
        .any(|list| list == "help" || list == "?")
    {
        let format = known(&args.format).map_err(Failure::new)?;
        say!("{}", create::describe_options(format));
        return Ok(0);
    }
    let mut options = KeyVals::of_lists(&args.options).map_err(Failure::new)?;
    let (name, size) = match args.names.as_slice() {
        [name] => (name, None),
        [name, size] => (name, Some(parse_size(size)?)),
        [] => return Err(Failure::usage("create", "Expecting image file name")),
        [_, _, extra, ..] => {
            let text = format!("Unexpected argument: {extra}");
            return Err(Failure::usage("create", text));
        }
    };
    if let Some(backing) = &args.backing {
        options.take("backing_file");
        options.push("backing_file", backing);
    }
    if let Some(format) = &args.backing_format {
        options.take("backing_fmt");
        options.push("backing_fmt", format);
    }
    let named = |failure: Failure| failure.context(name);
    if options.get("backing_file") == Some("") {
        return Err(named(Failure::new(
            "Expected backing file name, got empty string",
        )));
    }
    let format = known(&args.format).map_err(|text| named(Failure::new(text)))?;
    let path: PathBuf = ImageSpec::parse(name, false, None, persona)?.path;
    let request = CreateRequest {
        path,
        name: name.clone(),
        format,
        options,
        size,
        unchecked_backing: args.backing_unsafe,
    };
    let plan = create::plan(request, persona).map_err(named)?;
    if !args.quiet {
        say!("{}", plan.announcement(name));
    }
    plan.execute().map_err(named)?;
    Ok(0)
}

fn known(format: &str) -> Result<Format, String> {
    Format::from_name(format).ok_or_else(|| format!("Unknown file format '{format}'"))
}

/// Reads the size of an image.
pub(crate) fn parse_size(text: &str) -> Outcome<u64> {
    const RANGE: &str = "Invalid image size specified. Must be between 0 and 9223372036854775807.";
    if text
        .strip_prefix('-')
        .is_some_and(|rest| rest.parse::<u64>().is_ok())
    {
        return Err(Failure::new(RANGE));
    }
    match size::parse(text) {
        Ok(size) if i64::try_from(size).is_ok() => Ok(size),
        Ok(_) | Err(SizeError::TooLarge) => Err(Failure::new(RANGE)),
        Err(SizeError::NotANumber) => Err(Failure::new(format!(
            "Invalid image size specified: '{text}'."
        ))),
    }
}
