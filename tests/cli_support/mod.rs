//! A folder with the program in it, under its three names.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::{
    ffi::OsStr,
    io::Write,
    os::unix::fs::{MetadataExt, symlink},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

/// A temporary folder to work in.
pub(crate) struct Lab(tempfile::TempDir);

impl Lab {
    /// An empty one.
    pub(crate) fn new() -> Self {
        // On a disk: memory file systems are another thing.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
        for name in ["qemu-img", "qemu-io"] {
            symlink(env!("CARGO_BIN_EXE_platter"), folder.path().join(name)).expect("link");
        }
        Self(folder)
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Bytes that a file takes.
    pub(crate) fn allocated(&self, name: &str) -> u64 {
        let meta = std::fs::metadata(self.path(name)).expect("metadata");
        meta.blocks() * 512
    }

    /// Runs platter.
    pub(crate) fn platter(&self, args: &[&str]) -> Output {
        self.run(env!("CARGO_BIN_EXE_platter"), args, "")
    }

    /// Runs it by the name qemu-img.
    pub(crate) fn qemu_img(&self, args: &[&str]) -> Output {
        self.run(self.path("qemu-img"), args, "")
    }

    /// Runs it by the name qemu-io.
    pub(crate) fn qemu_io(&self, args: &[&str]) -> Output {
        self.run(self.path("qemu-io"), args, "")
    }

    /// Runs a program in the folder, with something on its standard input.
    pub(crate) fn run(&self, program: impl AsRef<OsStr>, args: &[&str], input: &str) -> Output {
        let mut child = Command::new(program)
            .args(args)
            .current_dir(&self.0)
            .env_remove("RUST_LOG")
            .env("TMPDIR", self.0.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut stdin = child.stdin.take().expect("standard input");
        // A program that does not read is no failure of the test.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        child.wait_with_output().expect("ends")
    }
}

/// What a program printed that must have ended well.
#[expect(
    clippy::needless_pass_by_value,
    reason = "reads better where it is called"
)]
pub(crate) fn ok(output: Output) -> String {
    let complaints = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}\n{text}{complaints}",
        output.status
    );
    text
}

/// What a program complained about that must have ended with this status.
#[expect(
    clippy::needless_pass_by_value,
    reason = "reads better where it is called"
)]
pub(crate) fn fails(status: i32, output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{text}");
    text
}
