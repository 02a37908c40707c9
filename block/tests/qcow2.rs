//! qcow2 against qemu-img and qemu-io.

#![allow(clippy::unwrap_used)]

use block::{DiskFile, Format, OpenOptions, Qcow2Sync};
use std::{path::Path, process::Command};

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn check(path: &Path) {
    run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn writes_and_reads_back() {
    let dir = scratch();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "64M"]);
    let disk = OpenOptions::new().open(&path).unwrap();
    assert_eq!(disk.format(), Format::Qcow2);
    assert_eq!(disk.size(), 64 << 20);
    disk.write_at(&[0x11; 5000], 1000).unwrap();
    disk.write_at(&[0x22; 200_000], 10 << 20).unwrap();
    disk.write_at(&[0x33; 512], (64 << 20) - 512).unwrap();
    disk.discard(10 << 20, 65536).unwrap();
    disk.write_zeroes((10 << 20) + 65536, 100, false).unwrap();
    let mut buf = vec![0xff; 8192];
    disk.read_at(&mut buf, 0).unwrap();
    assert!(buf[..1000].iter().all(|b| *b == 0));
    assert!(buf[1000..6000].iter().all(|b| *b == 0x11));
    assert!(buf[6000..].iter().all(|b| *b == 0));
    disk.close().unwrap();
    check(&path);
    run(
        "qemu-io",
        &[
            "-r",
            "-f",
            "qcow2",
            "-c",
            "read -P 0x11 1000 5000",
            "-c",
            "read -P 0 0 1000",
            "-c",
            "read -P 0 10M 64k",
            "-c",
            "read -P 0 10551296 100",
            "-c",
            "read -P 0x22 10551396 134364",
            "-c",
            "read -P 0x33 67108352 512",
            name,
        ],
    );
}

#[test]
fn reads_compressed_clusters() {
    let dir = scratch();
    let raw = dir.path().join("a.raw");
    let data: Vec<u8> = (0..3_000_000u32)
        .flat_map(|n| (n / 9).to_le_bytes())
        .collect();
    std::fs::write(&raw, &data).unwrap();
    for (kind, cluster) in [
        ("zlib", "64k"),
        ("zstd", "64k"),
        ("zlib", "2M"),
        ("zstd", "2M"),
        ("zlib", "512"),
    ] {
        let path = dir.path().join(format!("{kind}-{cluster}.qcow2"));
        let options = format!("compression_type={kind},cluster_size={cluster}");
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-O",
                "qcow2",
                "-o",
                &options,
                raw.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        );
        let disk = Qcow2Sync::open(&path, &OpenOptions::new()).unwrap();
        let mut buf = vec![0; data.len()];
        disk.read_at(&mut buf, 0).unwrap();
        assert!(buf == data, "{kind} {cluster}");
        disk.write_at(&[7; 3000], 100_000).unwrap();
        disk.close().unwrap();
        check(&path);
    }
}
