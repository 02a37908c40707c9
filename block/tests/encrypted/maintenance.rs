//! Snapshots, checks and resizes of encrypted images.

use super::{turns::Pair, *};

#[test]
fn snapshots_stay_readable() {
    for kind in [Kind::Qcow2Luks, Kind::Qcow2Aes] {
        let mut pair = Pair::new(kind, 3, "with a snapshot");
        kind.qemu_create(&pair.path, "");
        pair.our_turn();
        let then = pair.model.clone();
        let object = object();
        let spec = kind.spec(&pair.path);
        tool(
            "qemu-img",
            &[
                "snapshot",
                "--object",
                &object,
                "--image-opts",
                "-c",
                "s1",
                &spec,
            ],
        );
        pair.our_turn();
        pair.compare("after the snapshot");
        let old = OpenOptions::new()
            .key(secret())
            .read_only(true)
            .snapshot("s1")
            .open_disk(&pair.path)
            .unwrap();
        assert_same(&read_all(&old), &then, "the snapshot");
    }
}

#[test]
fn the_luks_header_is_counted_by_a_check_and_by_a_rebuild() {
    let dir = temp_dir();
    let path = dir.path().join("image");
    Kind::Qcow2Luks.create(&path, 4096);
    let disk = open(&path);
    disk.write_at(&[5; 100_000], 0).unwrap();
    disk.close().unwrap();
    let check_here = |repair| {
        let options = match repair {
            Repair::None => OfflineOptions::read(),
            _ => OfflineOptions::write(),
        };
        with_file(&path, options, async |io, file| {
            let mut header = Header::read_for_check(io, file).await?;
            check(io, file, &mut header, repair, &mut |_| {}).await
        })
        .unwrap()
    };
    assert!(check_here(Repair::None).is_clean());
    Kind::Qcow2Luks.check(&path, "as it was written");
    // Without its reference counts, a whole table of them.
    let mut image = fs::read(&path).unwrap();
    image[4096..2 * 4096].fill(0);
    fs::write(&path, &image).unwrap();
    assert!(!check_here(Repair::None).is_clean());
    check_here(Repair::All);
    assert!(check_here(Repair::None).is_clean());
    Kind::Qcow2Luks.check(&path, "rebuilt");
    let mut seen = [0; 100_000];
    open(&path).read_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|byte| *byte == 5));
}

#[test]
fn compressed_writes_are_refused() {
    for kind in [Kind::Qcow2Luks, Kind::Qcow2Aes] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        let error = disk.write_compressed(&[0; 65536], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn preallocated_clusters_read_as_zeroes() {
    for preallocation in [Preallocation::Metadata, Preallocation::Full] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        create_qcow2(
            &path,
            &CreateOptions {
                size: SIZE,
                preallocation,
                encrypt: Some(Encrypt::Luks {
                    options: quick(),
                    secret: secret(),
                }),
                ..CreateOptions::default()
            },
        );
        Kind::Qcow2Luks.check(&path, "preallocated");
        let mut model = vec![0; SIZE as usize];
        let disk = open(&path);
        assert_same(&read_all(&disk), &model, "preallocated");
        let before = fs::metadata(&path).unwrap().len();
        disk.write_at(&[9; 1000], 70_000).unwrap();
        model[70_000..71_000].fill(9);
        disk.close().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), before);
        let spec = Kind::Qcow2Luks.spec(&path);
        assert_same(&qemu_reads(&dir, &spec), &model, "preallocated: QEMU reads");
    }
}

#[test]
fn sizes_change() {
    for kind in Kind::ALL {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        disk.write_at(&[3; 70_000], SIZE - 70_000).unwrap();
        disk.resize(SIZE - 1024).unwrap();
        disk.resize(SIZE * 2).unwrap();
        let mut seen = vec![0; 70_000];
        disk.read_at(&mut seen, SIZE - 70_000).unwrap();
        assert!(
            seen[..70_000 - 1024].iter().all(|byte| *byte == 3),
            "{kind:?}"
        );
        if kind != Kind::Luks {
            assert!(
                seen[70_000 - 1024..].iter().all(|byte| *byte == 0),
                "{kind:?}"
            );
        }
        disk.write_at(&[4; 512], SIZE * 2 - 512).unwrap();
        disk.close().unwrap();
        let seen = qemu_reads(&dir, &kind.spec(&path));
        assert_eq!(seen.len() as u64, SIZE * 2, "{kind:?}");
        assert!(
            seen[seen.len() - 512..].iter().all(|byte| *byte == 4),
            "{kind:?}"
        );
    }
}
