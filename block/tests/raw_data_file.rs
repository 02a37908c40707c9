//! A data file that is a raw disk by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::{fs::OpenOptions as FileOptions, os::unix::fs::FileExt, path::Path};

use block::{DiskFile, OpenOptions};
use qcow2_support::{assert_clean, qemu_create, qemu_io, temp_dir, tool};

fn map(path: &Path) -> String {
    let args = ["map", "--output=json", path.to_str().unwrap()];
    String::from_utf8(tool("qemu-img", &args).stdout).unwrap()
}

/// What the disk gains is mapped at once, as QEMU does it: it reads what the file has.
#[test]
fn a_disk_that_grows_is_mapped_to_its_file() {
    for more in ["", ",cluster_size=512", ",extended_l2=on"] {
        let dir = temp_dir();
        let (data, other) = (dir.path().join("data"), dir.path().join("other"));
        let options = |data: &Path| format!("data_file={},data_file_raw=on{more}", data.display());
        let path = qemu_create(&dir, "a.qcow2", &options(&data), "192k");
        let theirs = qemu_create(&dir, "b.qcow2", &options(&other), "192k");
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        disk.write_at(&[5; 1000], 190_000).unwrap();
        disk.resize(512 << 10).unwrap();
        disk.close().unwrap();
        tool(
            "qemu-img",
            &["resize", "-q", theirs.to_str().unwrap(), "512k"],
        );
        qemu_io(&theirs, &["write -P 5 190000 1000"]);
        assert_clean(&path, more);
        assert_eq!(map(&path), map(&theirs), "{more}");
        assert_eq!(data.metadata().unwrap().len(), 512 << 10, "{more}");
        if more.contains("extended") {
            // Subclusters are mapped when they are written.
            continue;
        }
        let file = FileOptions::new().write(true).open(&data).unwrap();
        file.write_all_at(&[9; 3000], 300_000).unwrap();
        qemu_io(&path, &["read -P 9 300000 3000", "read -P 0 303000 100"]);
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let mut seen = [0; 3000];
        disk.read_at(&mut seen, 300_000).unwrap();
        assert_eq!(seen, [9; 3000], "{more}");
    }
}
