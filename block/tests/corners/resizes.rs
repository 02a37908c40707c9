//! A disk that grows, shrinks or closes while others use it.

use super::*;

#[test]
fn a_call_that_waited_for_a_drain_is_checked_against_the_new_size() {
    for format in [Format::Raw, Format::Qcow2] {
        within(60, move || {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = dir.path().join("a.img");
            let name = path.to_str().unwrap();
            qemu(
                "qemu-img",
                &["create", "-q", "-f", format.name(), name, "1M"],
            );
            let disk = OpenOptions::new().format(format).open_disk(&path).unwrap();
            let guard = disk.drain().unwrap();
            let other = disk.clone();
            let caller = thread::spawn(move || {
                let write = other.write_at(&[1; 4096], (1 << 20) - 4096);
                let read = other.read_at(&mut [0; 4096], (1 << 20) - 4096);
                (write, read)
            });
            thread::sleep(Duration::from_millis(300));
            disk.resize(512 << 10).unwrap();
            drop(guard);
            let (write, read) = caller.join().unwrap();
            assert_eq!(write.unwrap_err().kind(), ErrorKind::OutOfRange, "{format}");
            assert_eq!(read.unwrap_err().kind(), ErrorKind::OutOfRange, "{format}");
        });
    }
}

#[test]
fn a_call_that_waited_for_a_close_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("a.img");
    fs::write(&path, vec![0; 8192]).unwrap();
    let disk = OpenOptions::new()
        .format(Format::Raw)
        .open_disk(&path)
        .unwrap();
    let guard = disk.drain().unwrap();
    let other = disk.clone();
    let caller = thread::spawn(move || other.write_at(&[1; 512], 0));
    thread::sleep(Duration::from_millis(300));
    disk.close().unwrap();
    drop(guard);
    assert!(caller.join().unwrap().is_err());
    assert_eq!(fs::read(&path).unwrap(), vec![0; 8192]);
}

#[test]
fn resizes_at_the_same_time_take_turns() {
    within(120, || {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=512",
                name,
                "1M",
            ],
        );
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let workers: Vec<_> = (0..2u64)
            .map(|number| {
                let disk = disk.clone();
                thread::spawn(move || {
                    for round in 0..60 {
                        disk.resize((1 + (round * 7 + number * 3) % 50) << 20)
                            .unwrap();
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        let size = disk.size();
        disk.write_at(&[1; 512], size - 512).unwrap();
        disk.close().unwrap();
        drop(disk);
        qemu("qemu-img", &["check", "-q", name]);
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        assert_eq!(disk.size(), size);
        assert_eq!(read(&disk, size - 512, 512), [1; 512]);
    });
}

#[test]
fn growing_again_shows_no_old_data() {
    for cluster_size in [512, 65536] {
        let host = host();
        make(
            &host,
            &CreateOptions {
                size: 256 << 10,
                cluster_size,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        disk.write_at(&[5; 256 << 10], 0).unwrap();
        disk.write_compressed(&vec![6; cluster_size as usize], 131_072)
            .unwrap();
        for (small, large) in [(200_192, 256 << 10), (131_584, 256 << 10)] {
            disk.resize(small).unwrap();
            disk.resize(large).unwrap();
            let tail = read(&disk, small, (large - small) as usize);
            assert!(
                tail.iter().all(|byte| *byte == 0),
                "{cluster_size}: from {small}"
            );
        }
        assert_eq!(read(&disk, 131_072, 512), [6; 512]);
        disk.close().unwrap();
        assert_clean(&host);
    }
}

#[test]
fn growing_over_a_longer_backing_file_shows_zeroes() {
    for (version, small) in [(3, 100_352), (3, 131_072), (2, 100_352), (2, 131_072)] {
        let host = host();
        host.create("base.raw", &vec![3; 1 << 20]);
        make(
            &host,
            &CreateOptions {
                size: small,
                version,
                backing_file: Some(b"base.raw".to_vec()),
                backing_format: Some("raw".into()),
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        let grown = disk.resize(512 << 10);
        if version == 2 {
            // There is no way to say zero without writing it.
            assert_eq!(grown.unwrap_err().kind(), ErrorKind::Unsupported);
            continue;
        }
        grown.unwrap();
        assert!(read(&disk, 0, small as usize) == vec![3; small as usize]);
        let grown = read(&disk, small, (512 << 10) - small as usize);
        assert!(grown.iter().all(|byte| *byte == 0), "{version} {small}");
        disk.close().unwrap();
        assert_clean(&host);
    }
}
