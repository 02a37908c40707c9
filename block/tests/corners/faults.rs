//! What fails, and what holds afterwards.

use super::*;

#[test]
fn a_corrupt_entry_does_not_hide_changes_beside_it() {
    let host = host();
    let size = 65536u64;
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_at(&noise(7, 8 * size as usize), 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let file = host.file(IMAGE).unwrap();
    let content = file.content();
    let at = |offset: usize| {
        u64::from_be_bytes(content[offset..offset + 8].try_into().unwrap()) as usize
    };
    let l2 = at(at(40)) & 0x00ff_ffff_ffff_fe00;
    // The entry of cluster 3 names no cluster boundary.
    file.poke(l2 as u64 + 3 * 8 + 6, &[0x02]);
    let disk = open(&host);
    let error = disk.discard(size, 5 * size).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // The image is marked; what was changed before the entry is kept all the same.
    assert!(disk.write_at(&[8; 4096], 20 * size).is_err());
    disk.flush().unwrap();
    let after = host.power_cut();
    drop(disk);
    let options = OpenOptions::new().read_only(true);
    let disk = options
        .open_on(IMAGE, std::sync::Arc::new(after.clone()))
        .unwrap();
    assert_eq!(read(&disk, size, 4096), [0; 4096]);
    assert!(disk.info().corrupt);
}

#[test]
fn a_failed_sync_is_not_forgotten() {
    use block::io::sim::SimFault;
    let host = host();
    make(&host, &small_clusters(1 << 20, 16));
    let disk = open(&host);
    disk.write_at(&[1; 4096], 0).unwrap();
    host.inject(SimFault {
        path: None,
        op: SimOp::Sync,
        skip: 0,
        count: 1,
        errno: libc::EIO,
    });
    assert!(disk.flush().is_err());
    for _ in 0..3 {
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::SyncFailed);
    }
    // Reading goes on.
    assert_eq!(read(&disk, 0, 4096), [1; 4096]);
    assert!(disk.close().is_err());
}

#[test]
fn a_flush_that_waited_for_a_failed_sync_fails_too() {
    use block::io::sim::SimFault;
    for format in [Format::Raw, Format::Qcow2] {
        let host = host();
        match format {
            Format::Raw => drop(host.create(IMAGE, &vec![0; 1 << 20])),
            _ => make(&host, &small_clusters(1 << 20, 16)),
        }
        let disk = OpenOptions::new()
            .format(format)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        host.inject(SimFault {
            path: None,
            op: SimOp::Sync,
            skip: 0,
            count: 1,
            errno: libc::EIO,
        });
        let mut first = disk.create_async_io(8).unwrap();
        let mut second = disk.create_async_io(8).unwrap();
        submit(&mut *first, 1, write_op(0, &[1; 4096], false));
        assert!(finish(&host, &mut [&mut first])[0].1);
        submit(&mut *first, 2, RequestOp::Flush);
        submit(&mut *second, 3, RequestOp::Flush);
        submit(&mut *second, 4, RequestOp::Flush);
        for (id, succeeded, _) in finish(&host, &mut [&mut first, &mut second]) {
            assert!(!succeeded, "{format}: flush {id} succeeded");
        }
    }
}

#[test]
fn a_raw_disk_that_ends_inside_a_host_block_keeps_its_length() {
    use block::io::IoAlignment;
    for unit in [512u32, 4096] {
        let mut config = SimConfig::seeded(1);
        config.alignment = IoAlignment {
            memory: unit,
            offset: unit,
        };
        let host = SimHost::new(config);
        let len = 20_480 + 1000;
        host.create(IMAGE, &vec![7; len]);
        let disk = OpenOptions::new()
            .format(Format::Raw)
            .direct(true)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        assert_eq!(disk.size(), 20_480 + 1024);
        let tail = read(&disk, 20_480, 1024);
        assert!(tail[..1000] == [7; 1000] && tail[1000..] == [0; 24]);
        disk.write_at(&[8; 100], 20_480 + 600).unwrap();
        assert_eq!(host.file(IMAGE).unwrap().content().len(), len);
        disk.write_at(&[9; 24], 20_480 + 1000).unwrap();
        assert_eq!(host.file(IMAGE).unwrap().content().len(), 20_480 + 1024);
        let tail = read(&disk, 20_480, 1024);
        assert!(tail[..600] == [7; 600] && tail[600..700] == [8; 100]);
        assert!(tail[700..1000] == [7; 300] && tail[1000..] == [9; 24]);
        disk.write_zeroes(20_480, 1024, true).unwrap();
        disk.discard(0, 20_480 + 1024).unwrap();
        assert!(read(&disk, 0, len).iter().all(|byte| *byte == 0));
        disk.close().unwrap();
    }
}

#[test]
fn a_truncated_image_fails_and_does_not_panic() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    for len in [
        0, 100, 512, 65_536, 65_537, 131_072, 196_608, 262_144, 300_000,
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"]);
        qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 2M", name]);
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        let mut bytes = vec![0; 65536];
        for at in (0..4 << 20).step_by(65536) {
            let _ = disk.read_at(&mut bytes, at);
            let _ = disk.write_at(&bytes, at);
        }
        let _ = disk.discard(0, 4 << 20);
        let _ = disk.flush();
        let _ = disk.close();
        let _ = file.write_at(&[0], 0);
    }
}

#[test]
fn unsafe_syncs_nothing_and_keeps_everything() {
    for format in [Format::Raw, Format::Qcow2] {
        let host = SimHost::new(SimConfig::seeded(5));
        let path = Path::new("disk.img");
        if format == Format::Raw {
            host.create(path, &[0; 1 << 20]);
        } else {
            let image = CreateOptions {
                size: 1 << 20,
                ..CreateOptions::default()
            };
            let shared: Arc<dyn Host> = Arc::new(host.clone());
            with_file_on(shared, path, OfflineOptions::create(), async |io, file| {
                create(io, file, &image).await
            })
            .unwrap();
        }
        let open = |mode| {
            OpenOptions::new()
                .format(format)
                .cache_mode(mode)
                .open_on(path, Arc::new(host.clone()))
                .unwrap()
        };
        let before = host.stats().syncs;
        let disk = open(CacheMode::Unsafe);
        let data = vec![7; 100_000];
        disk.write_at(&data, 5_000).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(60_000, 10_000, true).unwrap();
        disk.close().unwrap();
        assert_eq!(host.stats().syncs, before, "{format}");
        let disk = open(CacheMode::WriteBack);
        let mut got = vec![0; data.len()];
        disk.read_at(&mut got, 5_000).unwrap();
        let mut expected = data;
        expected[55_000..65_000].fill(0);
        assert!(got == expected, "{format}");
    }
}
