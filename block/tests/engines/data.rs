//! Moving bytes.

use std::{
    fs::{File, FileTimes},
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use block::{
    ErrorKind,
    io::{
        AlignedBuf, Buffers, EngineKind, FallocateMode, FileOptions, Host, HostOp, OsHost, Segment,
    },
};

use crate::rig::*;

#[test]
fn reads_what_was_written() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let data = pattern(4 * BLOCK, 3);
        assert_eq!(engine.write(id, 0, &data, false), 16384, "{}", rig.name);
        assert_eq!(engine.write(id, 16384, &data, true), 16384, "{}", rig.name);
        assert_eq!(engine.run(HostOp::Sync { file: id }), 0, "{}", rig.name);
        assert_eq!(engine.read(id, 0, 4 * BLOCK).unwrap(), data, "{}", rig.name);
        assert_eq!(
            engine.read(id, 16384 + 4096, BLOCK).unwrap(),
            data[BLOCK..2 * BLOCK],
            "{}",
            rig.name
        );
        assert_eq!(file.len().unwrap(), 32768);
    }
}

/// The first read after a change would set it, as file systems are usually mounted.
#[test]
fn reads_leave_the_access_time_alone() {
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        if engine.engine.is_simulated() {
            continue;
        }
        let id = engine.register(&file);
        let data = pattern(2 * BLOCK, 5);
        assert_eq!(engine.write(id, 0, &data, true), 8192, "{}", rig.name);
        let times = FileTimes::new().set_accessed(long_ago);
        let other = File::options().write(true).open(rig.path()).unwrap();
        other.set_times(times).unwrap();
        assert_eq!(engine.read(id, 0, 2 * BLOCK).unwrap(), data, "{}", rig.name);
        let accessed = other.metadata().unwrap().accessed().unwrap();
        assert_eq!(accessed, long_ago, "{}", rig.name);
    }
}

/// A page-cached read that is alone may be done beside the engine's ring: from memory or, after a try, from
/// the disk; with one that follows it goes the usual way.
#[test]
fn a_read_that_is_alone_finds_its_data() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let data = pattern(2 * BLOCK, 7);
        assert_eq!(engine.write(id, 0, &data, true), 8192, "{}", rig.name);
        for cold in [false, true, true, true, false, true] {
            if cold && !engine.engine.is_simulated() {
                let file = File::open(rig.path()).unwrap();
                let advice = libc::POSIX_FADV_DONTNEED;
                // SAFETY: the call takes a descriptor and numbers.
                let dropped = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
                assert_eq!(dropped, 0);
            }
            let read = engine.read(id, 4096, BLOCK).unwrap();
            assert_eq!(read, data[BLOCK..], "{}", rig.name);
        }
        let buffers = [(); 2].map(|()| Buffers::owned(AlignedBuf::zeroed(BLOCK)));
        let tokens = [0, 1].map(|at| {
            let (token, _) = engine.start(HostOp::Read {
                file: id,
                offset: 4096 * at as u64,
                segments: buffers[at].segments(),
            });
            token
        });
        for (token, (at, buffers)) in tokens.into_iter().zip((0..).zip(&buffers)) {
            assert_eq!(engine.finish(token), 4096, "{}", rig.name);
            let read = buffers.as_owned().unwrap();
            assert_eq!(read[..], data[at * BLOCK..][..BLOCK], "{}", rig.name);
        }
        // Dropped with a read that nobody handed over.
        engine.start(HostOp::Read {
            file: id,
            offset: 0,
            segments: buffers[0].segments(),
        });
        drop(engine);
    }
}

#[test]
fn scatter_lists_move_in_order() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let source = AlignedBuf::from_slice(&pattern(8 * BLOCK, 9));
        let result = engine.run(HostOp::Write {
            file: id,
            offset: 4096,
            segments: scattered(&source, 8).segments(),
            dsync: true,
        });
        assert_eq!(result, 8 * 4096, "{}", rig.name);
        let mut expected = Vec::new();
        for piece in source.chunks(BLOCK).rev() {
            expected.extend_from_slice(piece);
        }
        assert_eq!(engine.read(id, 4096, 8 * BLOCK).unwrap(), expected);
        let target = AlignedBuf::zeroed(8 * BLOCK);
        let result = engine.run(HostOp::Read {
            file: id,
            offset: 4096,
            segments: scattered(&target, 8).segments(),
        });
        assert_eq!(result, 8 * 4096, "{}", rig.name);
        assert_eq!(target[..], source[..], "{}", rig.name);
    }
}

#[test]
fn more_segments_than_the_host_takes_end_short() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let source = AlignedBuf::from_slice(&pattern(1500 * 512, 1));
        let result = engine.run(HostOp::Write {
            file: id,
            offset: 0,
            segments: scattered(&source, 1500).segments(),
            dsync: false,
        });
        assert!(
            result == 1024 * 512 || result == 1500 * 512,
            "{}: {result}",
            rig.name
        );
        assert_eq!(
            engine.read(id, 0, 4096).unwrap()[..512],
            source[1499 * 512..],
            "{}",
            rig.name
        );
    }
}

#[test]
fn no_segments_are_no_bytes() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let segments: &[Segment] = &[];
        let result = engine.run(HostOp::Read {
            file: id,
            offset: 0,
            segments,
        });
        assert_eq!(result, 0, "{}", rig.name);
    }
}

#[test]
fn the_end_of_the_file_is_zero_bytes() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        assert_eq!(engine.write(id, 0, &pattern(BLOCK, 5), false), 4096);
        assert_eq!(
            engine.read(id, 4096, BLOCK).unwrap().len(),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            engine.read(id, 0, 2 * BLOCK).unwrap().len(),
            BLOCK,
            "{}",
            rig.name
        );
        assert_eq!(
            engine.read(id, 1 << 40, BLOCK).unwrap().len(),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            engine.read(id, u64::MAX - 4095, BLOCK),
            Err(-libc::EINVAL),
            "{}",
            rig.name
        );
    }
}

#[test]
fn ranges_are_zeroed_punched_and_allocated() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let data = pattern(8 * BLOCK, 5);
        engine.write(id, 0, &data, false);
        let mut fallocate = |mode, offset, len| {
            engine.run(HostOp::Fallocate {
                file: id,
                mode,
                offset,
                len,
            })
        };
        assert_eq!(
            fallocate(FallocateMode::PunchHole, 4096, 4096),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            fallocate(FallocateMode::ZeroRange, 12288, 4096),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            fallocate(FallocateMode::PunchHole, 28672, 1 << 20),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            fallocate(FallocateMode::Allocate, 0, 65536),
            0,
            "{}",
            rig.name
        );
        assert_eq!(
            fallocate(FallocateMode::PunchHole, u64::MAX, 1),
            -libc::EINVAL
        );
        assert_eq!(
            fallocate(FallocateMode::PunchHole, 0, u64::MAX),
            -libc::EINVAL
        );
        let mut expected = data;
        for block in [1, 3, 7] {
            expected[block * BLOCK..(block + 1) * BLOCK].fill(0);
        }
        expected.resize(65536, 0);
        assert_eq!(
            engine.read(id, 0, 2 * 65536).unwrap(),
            expected,
            "{}",
            rig.name
        );
    }
}

#[test]
fn a_read_only_file_is_not_written() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        let writable = rig.file();
        let id = engine.register(&writable);
        engine.write(id, 0, &pattern(BLOCK, 5), false);
        let options = FileOptions {
            direct: rig.direct,
            ..FileOptions::default()
        };
        let file = Arc::new(rig.host.open(&rig.path(), options).unwrap());
        let id = engine.register(&file);
        assert_eq!(
            engine.write(id, 0, &pattern(BLOCK, 6), false),
            -libc::EBADF,
            "{}",
            rig.name
        );
        let punched = engine.run(HostOp::Fallocate {
            file: id,
            mode: FallocateMode::PunchHole,
            offset: 0,
            len: 4096,
        });
        assert_eq!(punched, -libc::EBADF, "{}", rig.name);
        assert_eq!(
            engine.read(id, 0, BLOCK).unwrap(),
            pattern(BLOCK, 5),
            "{}",
            rig.name
        );
    }
}

#[test]
fn files_come_and_go() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        let first = engine.register(&rig.file());
        let second = engine.register(&rig.file());
        assert_ne!(first, second);
        assert_eq!(engine.write(second, 0, &pattern(BLOCK, 1), false), 4096);
        engine.engine.unregister(first);
        assert_eq!(
            engine.read(first, 0, BLOCK),
            Err(-libc::EBADF),
            "{}",
            rig.name
        );
        let third = engine.register(&rig.file());
        assert_eq!(third, first, "{}", rig.name);
        assert_eq!(
            engine.read(third, 0, BLOCK).unwrap(),
            pattern(BLOCK, 1),
            "{}",
            rig.name
        );
        // More files than any table of the kernel has room for.
        let many: Vec<_> = (0..300).map(|_| engine.register(&rig.file())).collect();
        assert_eq!(
            engine.read(many[299], 0, BLOCK).unwrap(),
            pattern(BLOCK, 1),
            "{}",
            rig.name
        );
        for file in many {
            engine.engine.unregister(file);
        }
        assert_eq!(
            engine.read(second, 0, BLOCK).unwrap(),
            pattern(BLOCK, 1),
            "{}",
            rig.name
        );
    }
}

#[test]
fn an_unregistered_file_is_closed() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        assert_eq!(engine.write(id, 0, &pattern(BLOCK, 1), false), 4096);
        file.lock(1, 2).unwrap();
        let again = rig.file();
        if file.raw_fd().is_some() {
            assert!(again.lock(2, 0).is_err(), "{}", rig.name);
        }
        drop(file);
        engine.engine.unregister(id);
        // The lock goes with the last reference to the open file, the kernel's included.
        assert!(again.lock(2, 0).is_ok(), "{}", rig.name);
        again.unlock();
        // And an engine that is dropped gives its files back before drop returns.
        let locked = rig.file();
        let id = engine.register(&locked);
        assert_eq!(engine.write(id, 0, &pattern(BLOCK, 1), false), 4096);
        locked.lock(1, 2).unwrap();
        drop(locked);
        drop(engine);
        assert!(again.lock(2, 0).is_ok(), "{}", rig.name);
    }
}

#[test]
fn linux_aio_refuses_files_without_direct_io() {
    let host = OsHost::new();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("buffered");
    let options = FileOptions {
        write: true,
        create: true,
        ..FileOptions::default()
    };
    let file = Arc::new(host.open(&path, options).unwrap());
    let mut engine = host.engine(EngineKind::LinuxAio, 8).unwrap();
    let error = engine.register(&file).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(
        text.contains("buffered") && text.contains("direct I/O"),
        "{text}"
    );
}
