//! `platter resize`: changes the size of the disk.

use block::{
    DiskFile, Format,
    maintenance::{self, Preallocate},
};
use clap::Args;

use crate::{
    grumble,
    image::{
        bitmaps,
        open::{self, OpenHow},
        qcow2_options::not_a_size,
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
        size,
    },
};

/// Change the size of the disk
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Make the disk 80 GiB, or 10 GiB larger:
    platter resize disk.qcow2 80G
    platter resize disk.qcow2 +10G

  Make it smaller. Shrink file systems and partitions inside first: what is beyond the new end is lost.
    platter resize --shrink disk.qcow2 -5G")]
pub(crate) struct ResizeArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Claim space for what is added: off, metadata (places in the file), falloc (space) or full (space,
    /// written)
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Allow the disk to get smaller, which loses data
    #[arg(long)]
    shrink: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    image_opts: bool,
    /// The image, and the size: absolute, +more or -less, with suffix k, M, G, T, P or E
    #[arg(value_name = "FILE SIZE", allow_hyphen_values = true)]
    names: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &ResizeArgs, persona: Persona) -> Outcome {
    let [file, text] = args.names.as_slice() else {
        return Err(Failure::usage(
            "resize",
            "Expecting image file name and size",
        ));
    };
    let preallocation = match args.preallocation.as_str() {
        "off" => None,
        "metadata" => Some(Preallocate::Metadata),
        "falloc" => Some(Preallocate::Falloc),
        "full" => Some(Preallocate::Full),
        other => {
            return Err(Failure::new(format!(
                "Invalid preallocation mode '{other}'"
            )));
        }
    };
    let (sign, digits) = match text.split_at_checked(1) {
        Some(("+", rest)) => (1, rest),
        Some(("-", rest)) => (-1, rest),
        _ => (0, text.as_str()),
    };
    let number = size::parse(digits).map_err(|_| Failure::new(not_a_size("size")))?;
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.image_opts, format, persona)?;
    let disk = open::open_disk(&spec, &OpenHow::default(), persona)?;
    let current = disk.size();
    let wanted = match sign {
        1 => current.checked_add(number),
        -1 => current.checked_sub(number),
        _ => Some(number),
    };
    let wanted = wanted
        .filter(|size| *size > 0)
        .ok_or_else(|| Failure::new("New image size must be positive"))?;
    if wanted < current && !args.shrink {
        grumble!(
            "{}: Use the --shrink option to perform a shrink operation.",
            persona.name()
        );
        return Err(Failure::new(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.",
        ));
    }
    let failed = |error: block::Error| Failure::new(bitmaps::explain(&error, persona));
    if wanted <= current && preallocation.is_some() {
        return Err(Failure::new(
            "Preallocation can only be used for growing images",
        ));
    }
    if preallocation == Some(Preallocate::Metadata) && disk.format() == Format::Raw {
        return Err(Failure::new("Unsupported preallocation mode 'metadata'"));
    }
    disk.resize(wanted).map_err(failed)?;
    if let Some(how) = preallocation {
        let claimed = maintenance::preallocate(&disk, current, wanted, how);
        if let Err(error) = claimed {
            // As it was: a disk that was to have its space and has it not is no success.
            disk.resize(current).map_err(failed)?;
            return Err(failed(error));
        }
    }
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    if !args.quiet {
        say!("Image resized.");
    }
    Ok(0)
}
