//! `platter measure`: how much space an image will take.

use std::path::PathBuf;

use block::{AsyncDiskFile, DiskFile, Format, formats::qcow2::create::Encrypt};
use clap::Args;
use serde::Serialize;

use crate::{
    create::parse_size,
    image::{
        bitmaps,
        create::{self, CreateRequest},
        maintenance::{Preallocation, Qcow2Create},
        open::{self, OpenHow, ShareArgs, SnapshotChoice},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        json,
        keyval::KeyVals,
        persona::Persona,
    },
};

/// The longest L1 table, in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;

/// Tell how much space a new image takes
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  How large can a qcow2 image of a terabyte get, and how large is it at first?
    platter measure -O qcow2 --size 1T

  How much space does this disk need as qcow2?
    platter measure -O qcow2 disk.raw

The sizes are those of all files of the image: what is in a data file counts as well. With -o
backing_file=... nothing is taken to be in the backing file already.")]
pub(crate) struct MeasureArgs {
    /// The format of the source; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The format of the new image; raw if not given
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options for making it, as 'create' knows them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Print for people or for programs: human or json
    #[arg(long, value_name = "human|json", default_value = "human")]
    output: String,
    /// A disk of this size, instead of a source
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
    /// Measure the source as it was at this internal snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    #[command(flatten)]
    share: ShareArgs,
    /// The source
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// What was found, with QEMU's names.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

/// Runs the command.
pub(crate) fn run(args: &MeasureArgs, persona: Persona) -> Outcome {
    let options = KeyVals::of_lists(&args.options).map_err(Failure::new)?;
    if !matches!(args.output.as_str(), "human" | "json") {
        return Err(Failure::new(
            "--output must be used with human or json as argument.",
        ));
    }
    let (virtual_size, source) = source(args, persona)?;
    let format = &args.target_format;
    let target = Format::from_name(format)
        .ok_or_else(|| Failure::new(format!("Unknown file format '{format}'")))?;
    let wanted = create::plan(
        CreateRequest {
            path: PathBuf::new(),
            name: String::new(),
            format: target,
            options,
            size: Some(virtual_size),
            unchecked_backing: true,
        },
        persona,
    )?
    .into_checked()?;
    let (required, full) = match target {
        Format::Qcow2 => measure_qcow2(&wanted, source.as_deref())?,
        // Every sector of it is data.
        Format::Luks => {
            let all = header_len(&wanted).saturating_add(virtual_size);
            (all, all)
        }
        // A raw image is as long as the disk; what a file system keeps of it is its own affair.
        _ => {
            let all = virtual_size.next_multiple_of(512);
            (all, all)
        }
    };
    let bitmaps = match &source {
        Some(disk) if target == Format::Qcow2 && wanted.version3 && bitmaps::supported(&**disk) => {
            let list = disk.extras().bitmaps();
            let cluster = wanted.cluster_size;
            Some(bitmaps::space(&list, virtual_size, cluster))
        }
        _ => None,
    };
    if args.output == "json" {
        let all = Measured {
            bitmaps,
            required,
            fully_allocated: full,
        };
        json::print(&all);
    } else {
        say!("required size: {required}");
        say!("fully allocated size: {full}");
        if let Some(bytes) = bitmaps {
            say!("bitmaps size: {bytes}");
        }
    }
    Ok(0)
}

/// The size of the disk, and the source where there is one.
fn source(args: &MeasureArgs, persona: Persona) -> Outcome<(u64, Option<Box<dyn AsyncDiskFile>>)> {
    let chosen = match &args.snapshot {
        Some(text) => Some(SnapshotChoice::read(text, persona)?),
        None => None,
    };
    let size = args.size.as_deref().map(parse_size).transpose()?;
    let refuse = |text: &str| Err(Failure::new(text));
    let file = match args.files.as_slice() {
        [] => None,
        [file] => Some(file),
        _ => return refuse("At most one filename argument is allowed."),
    };
    match (file, size) {
        (None, _) if args.share.image_opts || args.format.is_some() || chosen.is_some() => {
            refuse("--image-opts, -f, and -l require a filename argument.")
        }
        (None, None) => refuse("Either --size N or one filename must be specified."),
        (Some(_), Some(_)) => refuse("--size N cannot be used together with a filename."),
        (None, Some(size)) => Ok((size, None)),
        (Some(file), None) => {
            let format = args.format.as_deref();
            let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
            let how = OpenHow {
                force_share: args.share.force_share,
                ..OpenHow::reading()
            };
            let disk = match &chosen {
                None => open::open(&spec, &how, persona)?,
                Some(chosen) => open::open_snapshot(&spec, &how, chosen, persona)?,
            };
            Ok((disk.size(), Some(disk)))
        }
    }
}

/// The bytes of the LUKS header that an image is to have.
fn header_len(wanted: &Qcow2Create) -> u64 {
    match &wanted.encrypt {
        Some(Encrypt::Luks { options, .. }) => options.header_len(),
        _ => 0,
    }
}

/// What a qcow2 image takes, together with its data file if it has one: filled from the source, and
/// full.
fn measure_qcow2(wanted: &Qcow2Create, source: Option<&dyn AsyncDiskFile>) -> Outcome<(u64, u64)> {
    let cluster = wanted.cluster_size;
    let all = wanted.size.next_multiple_of(cluster);
    let header = header_len(wanted).next_multiple_of(cluster);
    let metadata = metadata_size(wanted, header).ok_or_else(|| {
        Failure::new("The image size is too large (try using a larger cluster size)")
    })?;
    let preallocated = matches!(
        wanted.preallocation,
        Preallocation::Falloc | Preallocation::Full
    );
    let data = match source {
        _ if preallocated => all,
        // How much of it the backing file has is not known: nothing, at worst.
        Some(_) if wanted.backing_file.is_some() => all,
        Some(disk) => allocated(disk, cluster)?,
        None => 0,
    };
    Ok((metadata + data, metadata + all))
}

/// Bytes of the units that hold data.
fn allocated(disk: &dyn DiskFile, unit: u64) -> Outcome<u64> {
    let size = disk.size();
    let (mut at, mut sum, mut counted) = (0, 0, 0);
    while at < size {
        let status = disk
            .block_status(at, size - at)
            .map_err(|error| Failure::new(error.to_string()))?;
        let len = status.len.clamp(1, size - at);
        if status.data && !status.zero {
            // From the unit of the first byte, unless that one is counted, to the end of the last.
            let from = (at / unit * unit).max(counted);
            let to = (at + len).next_multiple_of(unit);
            sum += to.saturating_sub(from);
            counted = to;
        }
        at += len;
    }
    Ok(sum)
}

/// Bytes of tables of a fully mapped qcow2 image, and of its LUKS header, which takes `header`. `None` if no
/// L1 table can be so long.
fn metadata_size(wanted: &Qcow2Create, header: u64) -> Option<u64> {
    const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / 8;
    let cluster = wanted.cluster_size;
    let clusters = wanted.size.div_ceil(cluster);
    let entries = cluster / if wanted.extended_l2 { 16 } else { 8 };
    let l2_tables = clusters.div_ceil(entries);
    if l2_tables > MAX_L1_ENTRIES {
        return None;
    }
    let l1_clusters = (l2_tables * 8).div_ceil(cluster);
    let header = header / cluster;
    let counted = 1 + l1_clusters + l2_tables + header + clusters;
    // Reference counts count the clusters they are kept in, too.
    let per_block = cluster * 8 / u64::from(wanted.refcount_bits);
    let (mut blocks, mut table) = (0u64, 0u64);
    loop {
        let total = counted + blocks + table;
        let more_blocks = total.div_ceil(per_block);
        let more_table = (more_blocks * 8).div_ceil(cluster);
        if (more_blocks, more_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (more_blocks, more_table);
    }
    Some((1 + l1_clusters + l2_tables + header + blocks + table) * cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_those_of_qemu() {
        let wanted = |size: u64, cluster_size: u64, refcount_bits: u32| Qcow2Create {
            size,
            cluster_size,
            refcount_bits,
            ..Qcow2Create::default()
        };
        assert_eq!(metadata_size(&wanted(1 << 30, 65536, 16), 0), Some(393_216));
        assert_eq!(
            metadata_size(&wanted(1 << 40, 2 << 20, 64), 0),
            Some(16_777_216)
        );
        let extended = Qcow2Create {
            extended_l2: true,
            ..wanted(1 << 30, 65536, 16)
        };
        assert_eq!(metadata_size(&extended, 0), Some(524_288));
        assert_eq!(metadata_size(&wanted(7 << 60, 65536, 16), 0), None);
    }
}
