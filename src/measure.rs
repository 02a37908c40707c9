//! `platter measure`: how much space an image will take.

use block::{DiskFile, Format};
use clap::Args;
use serde::Serialize;

use crate::{
    create::parse_size,
    image::{
        bitmaps, encryption,
        open::{self, OpenHow, ShareArgs},
        qcow2_options::not_a_size,
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        json,
        keyval::KeyVals,
        persona::Persona,
        size,
    },
};

/// Tell how much space a new image takes
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  How large can a qcow2 image of a terabyte get, and how large is it at first?
    platter measure -O qcow2 --size 1T

  How much space does this disk need as qcow2?
    platter measure -O qcow2 disk.raw")]
pub(crate) struct MeasureArgs {
    /// The format of the source; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The format of the new image; raw if not given
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options for making it: cluster_size and refcount_bits count
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// A disk of this size, instead of a source
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,
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
    let (virtual_size, source) = match (&args.size, args.files.as_slice()) {
        (Some(text), []) => (parse_size(text)?, None),
        (None, [file]) => {
            let format = args.format.as_deref();
            let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
            let how = OpenHow {
                force_share: args.share.force_share,
                ..OpenHow::reading()
            };
            let disk = open::open(&spec, &how, persona)?;
            (disk.size(), Some(disk))
        }
        (Some(_), [_, ..]) => {
            return Err(Failure::new(
                "--size N cannot be used together with a filename.",
            ));
        }
        (None, _) => {
            return Err(Failure::new(
                "Either --size N or one filename must be specified.",
            ));
        }
    };
    let mut options = KeyVals::default();
    args.options
        .iter()
        .for_each(|list| options.extend(KeyVals::parse(list, None)));
    let target = Format::from_name(&args.target_format);
    let encryption = encryption::Wanted::take(&mut options, target.unwrap_or(Format::Raw));
    let header = encryption.header_len().map_err(Failure::new)?;
    let mut sized = |key: &str, default: u64| -> Outcome<u64> {
        let read = |text: String| size::parse(&text).map_err(|_| Failure::new(not_a_size(key)));
        options.take(key).map_or(Ok(default), read)
    };
    let cluster = sized("cluster_size", 65536)?;
    let refcount_bits = sized("refcount_bits", 16)?;
    let preallocated = matches!(options.get("preallocation"), Some("falloc" | "full"));
    let (required, full) = match target {
        Some(Format::Qcow2) => {
            if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
                return Err(Failure::new(
                    "Cluster size must be a power of two between 512 and 2048k",
                ));
            }
            if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
                return Err(Failure::new(
                    "Refcount width must be a power of two and may not exceed 64 bits",
                ));
            }
            let data = match &source {
                Some(disk) => allocated(&**disk, cluster)?,
                None if preallocated => virtual_size,
                None => 0,
            };
            let header = header.next_multiple_of(cluster);
            let metadata = metadata_size(virtual_size, cluster, refcount_bits, header);
            let full = metadata + virtual_size.next_multiple_of(cluster);
            (metadata + data, full)
        }
        // Every sector of it is data.
        Some(Format::Luks) => {
            let all = header.saturating_add(virtual_size);
            (all, all)
        }
        // A raw image is as long as the disk; what a file system keeps of it is its own affair.
        Some(_) => (virtual_size, virtual_size),
        None => {
            let format = &args.target_format;
            return Err(Failure::new(format!("Unknown file format '{format}'")));
        }
    };
    let version3 = !matches!(options.get("compat"), Some("0.10" | "v2"));
    let bitmaps = match &source {
        Some(disk) if args.target_format == "qcow2" && version3 && bitmaps::supported(&**disk) => {
            let list = disk.extras().bitmaps();
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

/// Bytes of tables of a fully mapped qcow2 image, and of its LUKS header, which takes `header`.
fn metadata_size(virtual_size: u64, cluster: u64, refcount_bits: u64, header: u64) -> u64 {
    let clusters = virtual_size.div_ceil(cluster);
    let entries = cluster / 8;
    let l2_tables = clusters.div_ceil(entries);
    let l1_clusters = (l2_tables * 8).div_ceil(cluster);
    let header = header / cluster;
    let counted = 1 + l1_clusters + l2_tables + header + clusters;
    // Reference counts count the clusters they are kept in, too.
    let per_block = cluster * 8 / refcount_bits;
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
    (1 + l1_clusters + l2_tables + header + blocks + table) * cluster
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_those_of_qemu() {
        assert_eq!(metadata_size(1 << 30, 65536, 16, 0), 393_216);
        assert_eq!(metadata_size(1 << 40, 2 << 20, 64, 0), 16_777_216);
    }
}
