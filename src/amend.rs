//! `platter amend`: changes what an image is.

use block::{DiskFile, Format, formats::qcow2::amend::AmendOptions};
use clap::Args;

use crate::{
    image::{
        encryption, maintenance,
        open::{self, OpenHow},
        qcow2_options::not_a_size,
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        keyval::{KeyVals, parse_switch},
        persona::Persona,
        progress::Progress,
        size,
    },
};

/// Change what an image is: its version, features, width of reference counts, size
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  An old program has to read the image:
    platter amend -o compat=0.10 disk.qcow2

  An old image is to have what the present format has:
    platter amend -o compat=1.1 disk.qcow2

  Very many snapshots need wider reference counts:
    platter amend -o refcount_bits=32 disk.qcow2

  Another password, then the old one is no use any more:
    platter amend --object secret,id=old,file=a --object secret,id=new,file=b --image-opts \
      -o encrypt.state=active,encrypt.new-secret=new \
      driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=old
    platter amend --object secret,id=old,file=a --object secret,id=new,file=b --image-opts \
      -o encrypt.state=inactive,encrypt.old-secret=old \
      driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=new

  What can be changed?
    platter amend -f qcow2 -o help

The image is changed in an order that keeps it sound if the command is interrupted. The backing file
is changed by 'platter rebase'. Options that only 'platter create' knows cannot be changed: convert
the image.")]
pub(crate) struct AmendArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// What to change: key=value,... or 'help'
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// Change passwords even if the image, or a key slot, is lost by that
    #[arg(long)]
    force: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    image_opts: bool,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// What can be changed, as `-o help` says it.
const HELP: &str = "\
Amend options for 'qcow2':
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  encrypt.iter-time=<num> - Time to spend in PBKDF in milliseconds
  encrypt.keyslot=<num>  - Select a single keyslot to modify explicitly
  encrypt.new-secret=<str> - New secret to set in the matching keyslots
  encrypt.old-secret=<str> - Select all keyslots that match this password
  encrypt.state=<str>    - Select new state of affected keyslots (active/inactive)
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size";

/// The same for LUKS.
const LUKS_HELP: &str = "\
Amend options for 'luks':
  iter-time=<num>        - Time to spend in PBKDF in milliseconds
  keyslot=<num>          - Select a single keyslot to modify explicitly
  new-secret=<str>       - New secret to set in the matching keyslots
  old-secret=<str>       - Select all keyslots that match this password
  state=<str>            - Select new state of affected keyslots (active/inactive)";

/// Options of `create` that no image changes once it is there.
const CREATION_ONLY: &[&str] = &[
    "cluster_size",
    "compression_type",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.format",
    "encrypt.hash-alg",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.key-secret",
    "encryption",
    "extended_l2",
    "nocow",
    "preallocation",
];

/// Everything that is asked for.
#[derive(Debug, Default)]
struct Wanted {
    image: AmendOptions,
    size: Option<u64>,
}

/// Runs the command.
pub(crate) fn run(args: &AmendArgs, persona: Persona) -> Outcome {
    if args.options.is_empty() {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    }
    if args
        .options
        .iter()
        .any(|list| list == "help" || list == "?")
    {
        return help(args);
    }
    let mut options = KeyVals::of_lists(&args.options).map_err(Failure::new)?;
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("amend", "Expecting one image file name"));
    };
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.image_opts, format, persona)?;
    open::check_offline(&spec).map_err(Failure::new)?;
    let cache = open::cache_mode(&args.cache)?;
    // As every other command opens it: locked, its options checked, repaired if need be.
    let how = OpenHow {
        cache,
        ..OpenHow::default()
    };
    let disk = open::open_disk(&spec, &how, persona)?;
    if !matches!(disk.format(), Format::Qcow2 | Format::Luks) {
        let format = disk.format();
        return Err(Failure::new(format!(
            "Format driver '{format}' does not support option amendment"
        )));
    }
    let failed = |error: block::Error| Failure::new(error.message());
    let change = encryption::take_key_change(&mut options, disk.format(), args.force);
    if let Some(change) = change.map_err(Failure::new)? {
        disk.change_keys(&change).map_err(failed)?;
    }
    if disk.format() == Format::Luks {
        if let Some(key) = options.first_key() {
            return Err(Failure::new(format!("Invalid parameter '{key}'")));
        }
        disk.close().map_err(failed)?;
        return Ok(0);
    }
    let info = disk.info();
    check_backing(&mut options, &info)?;
    let wanted = parse(options)?;
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    drop(disk);
    let mut progress = None;
    let shown = args.progress && !args.quiet;
    let mut last = 0;
    let mut step = |done: u64, total: u64| {
        let bar =
            progress.get_or_insert_with(|| Progress::bytes(shown, persona, "amending", total));
        bar.advance(done.saturating_sub(last));
        last = done;
    };
    let version = wanted.image.version;
    maintenance::amend(&spec.path, &wanted.image, &mut step).map_err(failed)?;
    if let Some(size) = wanted.size {
        let disk = open::open_disk(&spec, &how, persona)?;
        if disk.size() != size {
            disk.resize(size).map_err(failed)?;
        }
        disk.close().map_err(failed)?;
    }
    if version == Some(2) {
        maintenance::downgrade(&spec.path, &mut step).map_err(failed)?;
    }
    if let Some(progress) = progress {
        progress.finish();
    } else if shown {
        Progress::bytes(true, persona, "amending", 1).finish();
    }
    Ok(0)
}

fn help(args: &AmendArgs) -> Outcome {
    match args.format.as_deref() {
        None | Some("qcow2") => {
            say!("{HELP}");
            Ok(0)
        }
        Some("luks") => {
            say!("{LUKS_HELP}");
            Ok(0)
        }
        Some(other) => Err(Failure::new(format!(
            "Format driver '{other}' does not support option amendment"
        ))),
    }
}

/// The backing file may be named, if it is the one there is.
fn check_backing(options: &mut KeyVals, info: &block::image::ImageInfo) -> Outcome<()> {
    let given = |value: Option<String>, there: &Option<String>| {
        value.is_some_and(|value| value != there.as_deref().unwrap_or_default())
    };
    if given(options.take("backing_file"), &info.backing_file)
        || given(options.take("backing_fmt"), &info.backing_format)
    {
        return Err(Failure::new(
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ));
    }
    Ok(())
}

fn parse(mut options: KeyVals) -> Outcome<Wanted> {
    let mut wanted = Wanted::default();
    let image = &mut wanted.image;
    if let Some(compat) = options.take("compat") {
        image.version = Some(match compat.as_str() {
            "0.10" | "v2" => 2,
            "1.1" | "v3" => 3,
            other => {
                return Err(Failure::new(format!("Unknown compatibility level {other}")));
            }
        });
    }
    let mut switch = |key: &str| -> Outcome<Option<bool>> {
        let read = |text: String| {
            parse_switch(&text)
                .ok_or_else(|| Failure::new(format!("Parameter '{key}' expects 'on' or 'off'")))
        };
        options.take(key).map(read).transpose()
    };
    image.lazy_refcounts = switch("lazy_refcounts")?;
    image.data_file_raw = switch("data_file_raw")?;
    image.data_file = options.take("data_file");
    if let Some(text) = options.take("refcount_bits") {
        let bits = text
            .parse::<u64>()
            .map_err(|_| Failure::new("Parameter 'refcount_bits' expects a number"))?;
        image.refcount_bits = Some(u32::try_from(bits).unwrap_or(u32::MAX));
    }
    if let Some(text) = options.take("size") {
        wanted.size = Some(size::parse(&text).map_err(|_| Failure::new(not_a_size("size")))?);
    }
    if let Some(key) = options.first_key() {
        let mut text = format!("Invalid parameter '{key}'");
        if CREATION_ONLY.contains(&key) {
            text += "\nThis option is only supported for image creation";
        }
        return Err(Failure::new(text));
    }
    Ok(wanted)
}
