//! Encrypted requests through every engine.

use super::*;

/// Guest memory as a device would give it.
fn request(id: u64, op: RequestOp) -> Request {
    Request { id, op }
}

#[test]
fn every_engine_decrypts_and_leaves_what_it_writes_alone() {
    for kind in Kind::ALL {
        for (engine, direct) in [
            (EngineKind::Sync, false),
            (EngineKind::IoUring, false),
            (EngineKind::IoUring, true),
            (EngineKind::LinuxAio, true),
        ] {
            let what = format!("{kind:?} {engine} direct {direct}");
            let dir = temp_dir();
            let path = dir.path().join("image");
            kind.create(&path, 65536);
            let options = OpenOptions::new()
                .key(secret())
                .engine(engine)
                .direct(direct);
            let disk = options.open_disk(&path).unwrap();
            let mut io = disk.create_async_io(8).unwrap();
            let mut rng = Random(5);
            let mut run = |op: RequestOp| -> Completion {
                let mut batch = vec![request(1, op)];
                assert_eq!(io.submit(&mut batch), 1);
                let mut done = Vec::new();
                while io.reap(&mut done) == 0 {
                    io.wait(None).unwrap();
                }
                let completion = done.pop().unwrap();
                assert_eq!(completion.result, Ok(()), "{what}");
                completion
            };
            // Small ones inline, large ones on the pool, odd ones with parts of sectors.
            for (offset, len) in [(0, 4096), (512, 1 << 20), (70_001, 131), (1 << 20, 300_000)] {
                let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                let buffers = Buffers::owned(AlignedBuf::from_slice(&bytes));
                let done = run(RequestOp::Write {
                    offset,
                    buffers,
                    fua: len == 131,
                });
                let kept = done.buffers.unwrap().into_owned().unwrap();
                assert!(kept[..] == bytes[..], "{what}: the source changed");
                let buffers = Buffers::owned(AlignedBuf::zeroed(len));
                let done = run(RequestOp::Read { offset, buffers });
                let seen = done.buffers.unwrap().into_owned().unwrap();
                assert_same(&seen, &bytes, &format!("{what} {offset}+{len}"));
            }
            run(RequestOp::Flush);
            drop(io);
            let model = read_all(&disk);
            disk.close().unwrap();
            assert_same(&qemu_reads(&dir, &kind.spec(&path)), &model, &what);
            kind.check(&path, &what);
        }
    }
}

#[test]
fn sectors_written_by_halves_at_once_keep_both() {
    let dir = temp_dir();
    let path = dir.path().join("image");
    create_luks(&path, quick(), SIZE);
    let disk = open(&path);
    disk.write_at(&vec![0; 8192], 0).unwrap();
    std::thread::scope(|scope| {
        for half in 0..4u64 {
            let disk = disk.clone();
            scope.spawn(move || {
                for round in 0..200u64 {
                    let offset = (round % 16) * 512 + half * 128;
                    disk.write_at(&[half as u8 + 1; 128], offset).unwrap();
                }
            });
        }
    });
    let mut seen = vec![0; 8192];
    disk.read_at(&mut seen, 0).unwrap();
    for (at, byte) in seen.iter().enumerate() {
        assert_eq!(usize::from(*byte), at % 512 / 128 + 1, "at {at}");
    }
}
