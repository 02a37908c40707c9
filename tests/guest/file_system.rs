//! File systems: how the guest makes and checks them, and how the host reads them without a kernel's help.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::lab::{run, tool};

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileSystem {
    /// Linux's usual one: the classic layout, ordered journal.
    Ext4,
    /// Large, aligned, delayed writes and a log that needs its flushes.
    Xfs,
}

impl FileSystem {
    /// A shell command for the guest that makes the file system on a device.
    ///
    /// Full paths, because the guest's shell prefers its own smaller versions of the tools.
    pub(crate) fn make(self, device: &str) -> String {
        match self {
            Self::Ext4 => format!("/usr/sbin/mke2fs -q -F -t ext4 {device}"),
            Self::Xfs => format!("/usr/sbin/mkfs.xfs -q -f {device}"),
        }
    }

    /// A shell command for the guest that mounts it on a folder.
    pub(crate) fn mount(self, device: &str, folder: &str) -> String {
        match self {
            Self::Ext4 => format!("mount -t ext4 -o errors=panic {device} {folder}"),
            Self::Xfs => format!("mount -t xfs {device} {folder}"),
        }
    }

    /// A shell command for the guest that fails unless the unmounted file system is in perfect order.
    pub(crate) fn check(self, device: &str) -> String {
        match self {
            Self::Ext4 => format!("/usr/sbin/e2fsck -f -n {device}"),
            Self::Xfs => format!("/usr/sbin/xfs_repair -n {device}"),
        }
    }

    /// Checks a raw image of the file system on the host and copies the files of `manifest` out of it, with
    /// programs that know nothing of a kernel.
    #[track_caller]
    pub(crate) fn read_out(self, image: &Path, manifest: &str, into: &Path) {
        fs::create_dir(into).expect("a folder for the files");
        match self {
            Self::Ext4 => {
                run(tool("e2fsck").args(["-f", "-n"]).arg(image));
                let request = format!("rdump / {}", into.display());
                run(tool("debugfs").args(["-R", &request]).arg(image));
            }
            Self::Xfs => {
                run(tool("xfs_repair").args(["-n", "-f"]).arg(image));
                read_out_xfs(image, manifest, into);
            }
        }
    }
}

/// A shell command that prints the checksum of every file below a folder, in one order everywhere.
pub(crate) fn manifest_command(folder: &str) -> String {
    format!("cd {folder} && find . -type f | LC_ALL=C sort | xargs sha256sum")
}

/// The manifest of a folder on the host.
#[track_caller]
pub(crate) fn manifest(folder: &Path) -> String {
    let command = manifest_command(folder.to_str().expect("a plain path"));
    run(Command::new("sh").args(["-c", &command]))
        .trim_end()
        .to_owned()
}

/// The paths in a manifest.
fn paths(manifest: &str) -> impl Iterator<Item = &str> {
    manifest.lines().map(|line| {
        let (_, path) = line.split_once("  ").expect("a checksum and a path");
        path.strip_prefix("./").expect("a path below the folder")
    })
}

/// A run of blocks of a file.
struct Run {
    /// Offset in the file, in blocks.
    offset: u64,
    /// Offset in the image, in blocks.
    start: u64,
    /// Length in blocks.
    count: u64,
}

/// Copies files out of a raw image of an XFS: the debugger says where their blocks are.
#[track_caller]
fn read_out_xfs(image: &Path, manifest: &str, into: &Path) {
    let debugger = |commands: &[String]| {
        let mut debugger = tool("xfs_db");
        debugger.args(["-r", "-f"]);
        for command in commands {
            debugger.args(["-c", command]);
        }
        run(debugger.arg(image))
    };
    let geometry = debugger(&["sb 0".to_owned(), "print blocksize agblocks".to_owned()]);
    let field = |name: &str| {
        let line = geometry
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
        let value = line.unwrap_or_else(|| panic!("no {name} in {geometry}"));
        value.parse::<u64>().expect("a number")
    };
    let (block_size, group_blocks) = (field("blocksize"), field("agblocks"));

    let image = File::open(image).expect("the image");
    for path in paths(manifest) {
        let text = debugger(&[
            format!("path /{path}"),
            "print core.size".to_owned(),
            "bmap".to_owned(),
        ]);
        let size = text
            .lines()
            .find_map(|line| line.strip_prefix("core.size = "));
        let size: u64 = size
            .unwrap_or_else(|| panic!("no size of {path}: {text}"))
            .parse()
            .expect("a number");
        let target = into.join(path);
        fs::create_dir_all(target.parent().expect("a folder")).expect("a folder");
        let target = File::create(target).expect("a file");
        for run in text
            .lines()
            .filter_map(|line| parse_run(line, group_blocks))
        {
            let start = run.offset * block_size;
            // The last block of a file is not full, and blocks may be reserved behind it.
            let length = (run.count * block_size).min(size.saturating_sub(start));
            let mut bytes = vec![0; usize::try_from(length).expect("files are small")];
            image
                .read_exact_at(&mut bytes, run.start * block_size)
                .expect("blocks of the image");
            target.write_all_at(&bytes, start).expect("a file");
        }
        target.set_len(size).expect("a file");
        (&target).flush().expect("a file");
    }
}

/// Parses `data offset 0 startblock 12 (0/12) count 16 flag 0`; other lines, and runs reserved but never written
/// (flag 1), give nothing.
fn parse_run(line: &str, group_blocks: u64) -> Option<Run> {
    let fields: Vec<&str> = line.strip_prefix("data ")?.split_whitespace().collect();
    let after = |name: &str, places: usize| {
        let at = fields.iter().position(|&field| field == name)?;
        fields.get(at + places).copied()
    };
    if after("flag", 1)? != "0" {
        return None;
    }
    let place = after("startblock", 2)?.trim_matches(['(', ')']);
    let (group, block) = place.split_once('/')?;
    Some(Run {
        offset: after("offset", 1)?.parse().ok()?,
        start: group.parse::<u64>().ok()? * group_blocks + block.parse::<u64>().ok()?,
        count: after("count", 1)?.parse().ok()?,
    })
}

#[test]
fn xfs_runs_are_understood() {
    let run = parse_run(
        "data offset 4 startblock 131084 (1/12) count 16 flag 0",
        1000,
    )
    .expect("a run");
    assert_eq!((run.offset, run.start, run.count), (4, 1012, 16));
    assert!(
        parse_run(
            "data offset 4 startblock 131084 (1/12) count 16 flag 1",
            1000
        )
        .is_none()
    );
    assert!(parse_run("core.size = 12", 1000).is_none());
}
