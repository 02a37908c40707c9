//! What the qcow2 tests share: an `Io` on a file, and QEMU's tools.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part of it"
)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use block::{
    FileId, Locking, Result,
    formats::qcow2::header::Header,
    io::Io,
    offline::{OfflineOptions, with_file},
};
use tempfile::TempDir;

/// Runs `work` on a file, made if it is not there, with the synchronous engine.
pub fn on<T>(path: &Path, work: impl AsyncFnOnce(&Io, FileId) -> Result<T>) -> Result<T> {
    let mut options = OfflineOptions::write();
    options.file.create = true;
    with_file(path, options, work)
}

/// The header of an image.
pub fn header(path: &Path) -> Header {
    let options = OfflineOptions {
        locking: Locking::Off,
        ..OfflineOptions::read()
    };
    with_file(path, options, async |io, file| Header::read(io, file).await).unwrap()
}

pub fn temp_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs a program; panics unless it succeeds.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = try_tool(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub fn try_tool(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// Makes an image with `qemu-img create -f qcow2 -o OPTIONS`.
pub fn qemu_create(dir: &TempDir, name: &str, options: &str, size: &str) -> PathBuf {
    let path = dir.path().join(name);
    let text = path.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text, size]);
    tool("qemu-img", &args);
    path
}

/// Runs qemu-io commands on a qcow2 image.
pub fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    tool("qemu-io", &args);
}

/// `qemu-img check`: exit status and JSON.
pub fn qemu_check(path: &Path) -> (i32, serde_json::Value) {
    let output = try_tool(
        "qemu-img",
        &[
            "check",
            "-f",
            "qcow2",
            "--output=json",
            path.to_str().unwrap(),
        ],
    );
    let json = serde_json::from_slice(&output.stdout).unwrap_or(serde_json::Value::Null);
    (output.status.code().unwrap_or(-1), json)
}

pub fn assert_clean(path: &Path, what: &str) {
    let (status, json) = qemu_check(path);
    assert_eq!(status, 0, "{what}: qemu-img check: {json}");
}

/// A small generator of numbers, the same from the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
