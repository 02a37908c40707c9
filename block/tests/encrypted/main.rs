//! Encrypted images, made by QEMU and here, read and written by both in turns.

#![allow(clippy::unwrap_used)]

#[path = "../qcow2_support/mod.rs"]
mod qcow2_support;

mod ciphers;
mod engines;
mod keys;
mod maintenance;
mod turns;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use block::{
    AsyncDiskFile, Disk, DiskFile, ErrorKind, Format, OpenOptions,
    crypto::{
        KeyChange, Secret,
        cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator},
        hash::HashAlgorithm,
        luks::LuksOptions,
    },
    formats::{
        luks,
        qcow2::{
            check::{Repair, check},
            create::{CreateOptions, Encrypt, Preallocation, create},
            header::Header,
        },
    },
    io::{AlignedBuf, Buffers, Completion, EngineKind, Request, RequestOp},
    offline::{OfflineOptions, with_file},
};
use qcow2_support::{Random, temp_dir, tool, try_tool};
use tempfile::TempDir;

const PASSWORD: &str = "open sesame";
const SIZE: u64 = 3 << 20;

fn secret() -> Secret {
    Secret::new(PASSWORD.into())
}

fn quick() -> LuksOptions {
    LuksOptions {
        iter_time: Duration::from_millis(1),
        ..LuksOptions::default()
    }
}

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Luks,
    Qcow2Luks,
    Qcow2Aes,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Luks, Self::Qcow2Luks, Self::Qcow2Aes];

    fn format(self) -> Format {
        match self {
            Kind::Luks => Format::Luks,
            Kind::Qcow2Luks | Kind::Qcow2Aes => Format::Qcow2,
        }
    }

    fn prefix(self) -> &'static str {
        if self == Kind::Luks { "" } else { "encrypt." }
    }

    /// QEMU's name of an image whose secret is `s`.
    fn spec(self, path: &Path) -> String {
        let (format, prefix) = (self.format(), self.prefix());
        let path = path.to_str().unwrap();
        format!("driver={format},file.filename={path},{prefix}key-secret=s")
    }

    fn qemu_create(self, path: &Path, more: &str) {
        let prefix = self.prefix();
        let options = match self {
            Kind::Luks => format!("key-secret=s,iter-time=10{more}"),
            Kind::Qcow2Luks => {
                format!("{prefix}format=luks,{prefix}key-secret=s,{prefix}iter-time=10{more}")
            }
            Kind::Qcow2Aes => format!("{prefix}format=aes,{prefix}key-secret=s{more}"),
        };
        let size = SIZE.to_string();
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                self.format().name(),
                "--object",
                &object(),
                "-o",
                &options,
                path.to_str().unwrap(),
                &size,
            ],
        );
    }

    fn create(self, path: &Path, cluster_size: u64) {
        let encrypt = match self {
            Kind::Luks => return create_luks(path, quick(), SIZE),
            Kind::Qcow2Luks => Encrypt::Luks {
                options: quick(),
                secret: secret(),
            },
            Kind::Qcow2Aes => Encrypt::Aes,
        };
        create_qcow2(
            path,
            &CreateOptions {
                size: SIZE,
                cluster_size,
                encrypt: Some(encrypt),
                ..CreateOptions::default()
            },
        );
    }

    fn check(self, path: &Path, what: &str) {
        if self != Kind::Luks {
            let output = tool(
                "qemu-img",
                &[
                    "check",
                    "--object",
                    &object(),
                    "--image-opts",
                    &self.spec(path),
                ],
            );
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("No errors were found"), "{what}: {text}");
        }
    }
}

fn object() -> String {
    format!("secret,id=s,data={PASSWORD}")
}

fn create_luks(path: &Path, luks: LuksOptions, size: u64) {
    let options = luks::create::CreateOptions {
        size,
        luks,
        secret: secret(),
        preallocation: luks::create::Preallocation::Off,
    };
    with_file(path, OfflineOptions::create(), async |io, file| {
        luks::create::create(io, file, &options).await
    })
    .unwrap();
}

fn create_qcow2(path: &Path, options: &CreateOptions) {
    with_file(path, OfflineOptions::create(), async |io, file| {
        create(io, file, options).await
    })
    .unwrap();
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().key(secret()).open_disk(path).unwrap()
}

fn read_all(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What QEMU reads.
fn qemu_reads(dir: &TempDir, spec: &str) -> Vec<u8> {
    let plain = dir.path().join("plain");
    tool(
        "qemu-img",
        &[
            "convert",
            "--object",
            &object(),
            "--image-opts",
            spec,
            "-O",
            "raw",
            plain.to_str().unwrap(),
        ],
    );
    fs::read(plain).unwrap()
}

fn qemu_io(spec: &str, commands: &[String]) {
    let object = object();
    let mut args = vec!["--object", &object, "--image-opts"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(spec);
    let output = tool("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

fn assert_same(seen: &[u8], model: &[u8], what: &str) {
    assert_eq!(seen.len(), model.len(), "{what}: length");
    let differs = seen.iter().zip(model).position(|(seen, is)| seen != is);
    assert_eq!(differs, None, "{what}: first difference");
}
