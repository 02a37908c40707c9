//! Readers and writers beside internal snapshots.

use super::*;

/// An image made by QEMU: data in every cluster, and a snapshot that shares all of it.
fn image_with_snapshot(cluster_size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(IMAGE);
    let name = path.to_str().unwrap();
    let options = format!("cluster_size={cluster_size}");
    qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options, name, "256k"],
    );
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 256k", name]);
    qemu("qemu-img", &["snapshot", "-c", "s", name]);
    fs::read(&path).unwrap()
}

/// The disk as it was at the snapshot, as QEMU sees it.
fn snapshot_content(host: &SimHost) -> Vec<u8> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(IMAGE);
    host.file(IMAGE).unwrap().save(&path).unwrap();
    let plain = dir.path().join("plain");
    let (path, plain) = (path.to_str().unwrap(), plain.to_str().unwrap());
    qemu("qemu-img", &["check", "-q", path]);
    qemu(
        "qemu-img",
        &[
            "convert", "-l", "s", "-f", "qcow2", "-O", "raw", path, plain,
        ],
    );
    fs::read(plain).unwrap()
}

#[test]
fn a_reader_that_was_on_its_way_does_not_keep_a_shared_table() {
    let image = image_with_snapshot("4k");
    for seed in 0..400 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create(IMAGE, &image);
        let disk = open(&host);
        let mut reader = disk.create_async_io(8).unwrap();
        let mut writer = disk.create_async_io(8).unwrap();
        submit(&mut *writer, 1, write_op(8192, &[9; 4096], false));
        for _ in 0..seed % 6 {
            let _ = host.step();
            writer.reap(&mut Vec::new());
        }
        submit(&mut *reader, 2, read_op(0, 4096));
        finish(&host, &mut [&mut reader, &mut writer]);
        submit(&mut *reader, 3, read_op(8192, 4096));
        let done = finish(&host, &mut [&mut reader]);
        assert!(done[0].1);
        assert!(done[0].2 == [9; 4096], "seed {seed}: old data");
    }
}

#[test]
fn a_snapshot_keeps_what_it_had() {
    for cluster_size in ["512", "4k", "64k"] {
        let image = image_with_snapshot(cluster_size);
        let host = host();
        host.create(IMAGE, &image);
        let disk = open(&host);
        disk.write_at(&noise(4, 100_000), 5000).unwrap();
        disk.discard(131_072, 65_536).unwrap();
        disk.write_zeroes(200_000, 40_000, false).unwrap();
        for _ in 0..3 {
            disk.flush().unwrap();
        }
        disk.write_at(&noise(5, 100_000), 120_000).unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        assert!(
            snapshot_content(&host) == vec![1; 256 << 10],
            "{cluster_size}: the snapshot changed"
        );
    }
}
