//! An image that a test can change behind the back of who has opened it.

use std::fs::File;

use block::{AsyncDiskFile, Format, OpenOptions};

/// A raw image of that many bytes, its file and the disk in it. It has no name any more.
pub fn raw(bytes: u64) -> (File, Box<dyn AsyncDiskFile>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    let disk = OpenOptions::new().format(Format::Raw).open(&path).unwrap();
    (file, disk)
}
