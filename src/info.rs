//! `platter info`: what an image says about itself.

use std::path::Path;

use block::{DiskFile, Format, image::ImageInfo};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::{
    image::{
        chain,
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        json,
        persona::Persona,
        size, snapshots,
    },
};

/// Show what an image says about itself
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  What is this file?
    platter info disk.qcow2

  The same for a program, with everything it is stacked on:
    platter info --backing-chain --output json disk.qcow2

Only the image itself is opened; with --backing-chain the headers of the files below it, too.")]
pub(crate) struct InfoArgs {
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// Show the images below it, too
    #[arg(short, long)]
    backing_chain: bool,
    #[command(flatten)]
    share: ShareArgs,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &InfoArgs, persona: Persona) -> Outcome {
    let [file] = args.files.as_slice() else {
        return Err(Failure::usage("info", "Expecting one image file name"));
    };
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.share.image_opts, format, persona)?;
    let how = OpenHow {
        force_share: args.share.force_share,
        no_backing: true,
        locked: true,
        ..OpenHow::reading()
    };
    let disks = if args.backing_chain {
        chain::open_all(&spec, &how, persona)?
    } else {
        vec![open::open(&spec, &how, persona)?]
    };
    let name_of = |at: usize, disk: &dyn DiskFile| match spec.json_name() {
        Some(name) if at == 0 && persona.is_qemu() => name,
        _ => disk.path().display().to_string(),
    };
    if args.output == "json" {
        let list: Vec<_> = disks
            .iter()
            .enumerate()
            .map(|(at, disk)| describe(&**disk, &name_of(at, &**disk)))
            .collect();
        match list.as_slice() {
            [one] if !args.backing_chain => json::print(one),
            list => json::print(&list),
        }
    } else {
        for (at, disk) in disks.iter().enumerate() {
            if at > 0 {
                say!("");
            }
            print(&**disk, &name_of(at, &**disk));
        }
    }
    Ok(0)
}

/// The host file itself: its length and the space it takes.
fn host_file(path: &Path) -> (u64, Option<u64>) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => (0, None),
        Ok(meta) => (meta.len(), Some(meta.blocks() * 512)),
        Err(_) => (0, None),
    }
}

/// The keys in QEMU's order.
const ORDER: &[&str] = &[
    "children",
    "backing-filename-format",
    "snapshots",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "encrypted",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "dirty-flag",
];

fn describe(disk: &dyn DiskFile, shown: &str) -> json::InOrder {
    let info = disk.info();
    let name = disk.path().display().to_string();
    let (length, used) = host_file(disk.path());
    let length = if disk.format() == Format::Raw {
        disk.size()
    } else {
        length
    };
    let mut map = Map::new();
    map.insert(
        "children".into(),
        json!([{"name": "file", "info": {
            "children": [],
            "virtual-size": length,
            "filename": name,
            "format": "file",
            "actual-size": used.unwrap_or(0),
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false,
        }}]),
    );
    map.insert("virtual-size".into(), disk.size().into());
    map.insert("filename".into(), shown.into());
    map.insert("format".into(), disk.format().name().into());
    map.insert("dirty-flag".into(), info.dirty.into());
    if let Ok(used) = disk.physical_size() {
        map.insert("actual-size".into(), used.into());
    }
    if let Some(cluster) = info.cluster_size {
        map.insert("cluster-size".into(), cluster.into());
    }
    if info.encrypted {
        map.insert("encrypted".into(), true.into());
    }
    if let Some(backing) = &info.backing_file {
        let full = chain::resolve(disk.path(), backing);
        map.insert("backing-filename".into(), backing.as_str().into());
        let full = full.display().to_string();
        map.insert("full-backing-filename".into(), full.into());
        if let Some(format) = &info.backing_format {
            map.insert("backing-filename-format".into(), format.as_str().into());
        }
    }
    if !info.snapshots.is_empty() {
        let list = info.snapshots.iter().map(|snapshot| {
            let mut one = json!({
                "id": snapshot.id,
                "name": snapshot.name,
                "vm-state-size": snapshot.vm_state_size,
                "date-sec": snapshot.date_sec,
                "date-nsec": snapshot.date_nsec,
                "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
                "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
            });
            if let (Some(count), Some(map)) = (snapshot.icount, one.as_object_mut()) {
                map.insert("icount".into(), count.into());
            }
            one
        });
        map.insert("snapshots".into(), list.collect());
    }
    if !info.format_specific.is_empty() {
        let specific = json!({
            "type": disk.format().name(),
            "data": info.format_specific,
        });
        map.insert("format-specific".into(), specific);
    }
    json::InOrder { map, order: ORDER }
}

fn print(disk: &dyn DiskFile, shown: &str) {
    let info = disk.info();
    let name = disk.path().display();
    let size = disk.size();
    say!("image: {shown}");
    say!("file format: {}", disk.format());
    say!("virtual size: {} ({size} bytes)", size::human(size));
    if let Ok(used) = disk.physical_size() {
        say!("disk size: {}", size::human(used));
    }
    if info.encrypted {
        say!("encrypted: yes");
    }
    if let Some(cluster) = info.cluster_size {
        say!("cluster_size: {cluster}");
    }
    if info.dirty {
        say!("cleanly shut down: no");
    }
    if let Some(backing) = &info.backing_file {
        let full = chain::resolve(disk.path(), backing);
        if full == Path::new(backing) {
            say!("backing file: {backing}");
        } else {
            say!("backing file: {backing} (actual path: {})", full.display());
        }
        if let Some(format) = &info.backing_format {
            say!("backing file format: {format}");
        }
    }
    snapshots::print(&info.snapshots);
    print_specific(&info, 0);
    let (length, used) = host_file(disk.path());
    let length = if disk.format() == Format::Raw {
        size
    } else {
        length
    };
    say!("Child node '/file':");
    say!("    filename: {name}");
    say!(
        "    protocol type: {}",
        if used.is_some() {
            "file"
        } else {
            "host_device"
        }
    );
    say!("    file length: {} ({length} bytes)", size::human(length));
    if let Some(used) = used {
        say!("    disk size: {}", size::human(used));
    }
}

/// Prints what only this format has.
pub(crate) fn print_specific(info: &ImageInfo, indent: usize) {
    if info.format_specific.is_empty() {
        return;
    }
    say!("{:indent$}Format specific information:", "");
    for (key, value) in in_order(&info.format_specific) {
        print_value(&key.replace('-', " "), value, indent + 4);
    }
}

/// Fields in the order of QEMU, then whatever else there is.
fn in_order(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let order = [
        "compat",
        "compression-type",
        "lazy-refcounts",
        "bitmaps",
        "refcount-bits",
        "data-file",
        "data-file-raw",
        "corrupt",
        "encrypt",
        "extended-l2",
        "ivgen-alg",
        "detached-header",
        "ivgen-hash-alg",
        "hash-alg",
        "cipher-alg",
        "uuid",
        "format",
        "cipher-mode",
        "slots",
        "payload-offset",
        "master-key-iters",
        "flags",
        "name",
        "granularity",
        "active",
        "iters",
        "key-offset",
        "stripes",
    ];
    let rank = |key: &str| {
        order
            .iter()
            .position(|name| *name == key)
            .unwrap_or(order.len())
    };
    let mut list: Vec<_> = map.iter().collect();
    list.sort_by_key(|(key, _)| rank(key));
    list
}

fn print_value(key: &str, value: &Value, indent: usize) {
    match value {
        Value::Object(map) => {
            say!("{:indent$}{key}:", "");
            for (key, value) in in_order(map) {
                print_value(&key.replace('-', " "), value, indent + 4);
            }
        }
        Value::Array(list) => {
            say!("{:indent$}{key}:", "");
            for (at, value) in list.iter().enumerate() {
                print_value(&format!("[{at}]"), value, indent + 4);
            }
        }
        Value::String(text) => say!("{:indent$}{key}: {text}", ""),
        value => say!("{:indent$}{key}: {value}", ""),
    }
}
