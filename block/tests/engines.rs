//! One table of tests over every engine.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use block::{
    ErrorKind,
    io::{
        AlignedBuf, Buffers, Engine, EngineFile, EngineKind, FallocateMode, FileOptions, Host,
        HostFile, HostOp, OsHost, Segment, Started, Token, UringOptions,
    },
};

const BLOCK: usize = 4096;

/// A host and how its engine is made.
struct Rig {
    name: &'static str,
    host: Box<dyn Host>,
    kind: EngineKind,
    direct: bool,
    /// Ask for the notifier before anything else, as an epoll loop does.
    announce: bool,
    dir: tempfile::TempDir,
}

fn rig(name: &'static str, host: impl Host + 'static, kind: EngineKind, direct: bool) -> Rig {
    Rig {
        name,
        host: Box::new(host),
        kind,
        direct,
        announce: false,
        // A disk file system: a tmpfs has no direct I/O.
        dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
    }
}

fn rigs() -> Vec<Rig> {
    let spinning = OsHost {
        uring: UringOptions {
            spin: Duration::from_micros(50),
            ..UringOptions::default()
        },
    };
    let mut epoll = rig("uring, epoll", OsHost::new(), EngineKind::IoUring, true);
    epoll.announce = true;
    let mut epoll_buffered = rig(
        "uring, epoll, buffered",
        OsHost::new(),
        EngineKind::IoUring,
        false,
    );
    epoll_buffered.announce = true;
    vec![
        rig("sync", OsHost::new(), EngineKind::Sync, false),
        rig("sync, direct", OsHost::new(), EngineKind::Sync, true),
        rig("uring", OsHost::new(), EngineKind::IoUring, false),
        rig("uring, direct", OsHost::new(), EngineKind::IoUring, true),
        rig("uring, spinning", spinning, EngineKind::IoUring, true),
        epoll,
        epoll_buffered,
    ]
}

impl Rig {
    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn file(&self) -> Arc<HostFile> {
        let options = FileOptions {
            write: true,
            direct: self.direct,
            create: true,
            truncate: false,
        };
        Arc::new(self.host.open(&self.path(), options).unwrap())
    }

    fn engine(&self, depth: u32) -> Runner {
        let engine = self.host.engine(self.kind, depth).unwrap();
        if self.announce {
            engine.notifier();
        }
        Runner {
            engine,
            next: 0,
            epoll: self.announce,
            done: Vec::new(),
        }
    }
}

/// An engine with what a driver adds: tokens and a loop.
struct Runner {
    engine: Box<dyn Engine>,
    next: u64,
    epoll: bool,
    done: Vec<(Token, i32)>,
}

impl Runner {
    fn register(&mut self, file: &Arc<HostFile>) -> EngineFile {
        self.engine.register(file).unwrap()
    }

    fn token(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }

    /// Starts an operation; its buffers outlive it because every test finishes what it starts.
    fn start(&mut self, op: HostOp<'_>) -> (Token, Started) {
        let token = self.token();
        // SAFETY: tests keep buffers until the operation ended or the engine was dropped.
        let started = unsafe { self.engine.start(token, op) };
        if let Started::Done(result) = started {
            self.done.push((token, result));
        }
        (token, started)
    }

    /// Sleeps as the rig sleeps: in the engine, or on the notifier.
    fn sleep(&mut self, timeout: Option<Duration>) {
        if self.epoll {
            self.engine.submit().unwrap();
            let millis = timeout.map_or(10_000, |t| i32::try_from(t.as_millis()).unwrap());
            assert!(readable(self.engine.notifier(), millis), "nothing woke us");
        } else {
            self.engine.wait(timeout).unwrap();
        }
    }

    fn finish(&mut self, token: Token) -> i32 {
        self.engine.submit().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            self.engine.reap(&mut self.done);
            if let Some(at) = self.done.iter().position(|(done, _)| *done == token) {
                return self.done.swap_remove(at).1;
            }
            assert!(Instant::now() < end, "{token:?} does not end");
            self.sleep(None);
        }
    }

    fn run(&mut self, op: HostOp<'_>) -> i32 {
        let (token, started) = self.start(op);
        assert_ne!(started, Started::Full);
        self.finish(token)
    }

    fn read(&mut self, file: EngineFile, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        let buffers = Buffers::owned(AlignedBuf::zeroed(len));
        let result = self.run(HostOp::Read {
            file,
            offset,
            segments: buffers.segments(),
        });
        let got = usize::try_from(result).map_err(|_| result)?;
        Ok(buffers.as_owned().unwrap()[..got].to_vec())
    }

    fn write(&mut self, file: EngineFile, offset: u64, bytes: &[u8], dsync: bool) -> i32 {
        let buffers = Buffers::owned(AlignedBuf::from_slice(bytes));
        self.run(HostOp::Write {
            file,
            offset,
            segments: buffers.segments(),
            dsync,
        })
    }
}

fn readable(fd: BorrowedFd<'_>, millis: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, ours.
    unsafe { libc::poll(&raw mut poll, 1, millis) == 1 }
}

fn write_eventfd(fd: BorrowedFd<'_>) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of ours.
    let written = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), 8) };
    assert_eq!(written, 8);
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer.into())
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| {
            seed.wrapping_add((i % 251) as u8)
                .wrapping_add((i / BLOCK) as u8)
        })
        .collect()
}

/// The pieces of a buffer in reverse order: a scatter list of `pieces` segments.
fn scattered(buffer: &AlignedBuf, pieces: usize) -> Buffers {
    let size = buffer.len() / pieces;
    let base = buffer.as_ptr().cast_mut();
    let list = (0..pieces)
        .rev()
        .map(|i| (base.wrapping_add(i * size), size));
    // SAFETY: the test keeps the buffer until the operation ended and looks at it afterwards.
    unsafe { Buffers::from_raw(list, Arc::new(())) }
}

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
fn timers_end_in_order() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        let begin = Instant::now();
        let ms = Duration::from_millis;
        let (long, _) = engine.start(HostOp::Timer { after: ms(40) });
        let (short, _) = engine.start(HostOp::Timer { after: ms(10) });
        assert_eq!(engine.finish(short), 0, "{}", rig.name);
        let simulated = engine.engine.is_simulated();
        assert!(simulated || begin.elapsed() >= ms(10), "{}", rig.name);
        assert_eq!(engine.finish(long), 0, "{}", rig.name);
        assert!(simulated || begin.elapsed() >= ms(40), "{}", rig.name);
    }
}

#[test]
fn a_watch_fires_once() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        let (reader, writer) = pipe();
        let (token, started) = engine.start(HostOp::PollReadable {
            fd: reader.as_raw_fd(),
        });
        assert_eq!(started, Started::Pending, "{}", rig.name);
        engine.engine.submit().unwrap();
        engine.engine.reap(&mut engine.done);
        assert!(engine.done.is_empty(), "{}", rig.name);
        write_eventfd(writer.as_fd());
        assert_eq!(engine.finish(token), 0, "{}", rig.name);
        engine.engine.reap(&mut engine.done);
        assert!(engine.done.is_empty(), "{}", rig.name);
        let bad = engine.run(HostOp::PollReadable { fd: 987_654 });
        assert_eq!(bad, -libc::EBADF, "{}", rig.name);
    }
}

#[test]
fn a_watch_fires_while_waiting() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        if engine.engine.is_simulated() {
            continue;
        }
        let (reader, writer) = pipe();
        let (token, _) = engine.start(HostOp::PollReadable {
            fd: reader.as_raw_fd(),
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                write_eventfd(writer.as_fd());
            });
            assert_eq!(engine.finish(token), 0, "{}", rig.name);
        });
    }
}

#[test]
fn another_thread_ends_a_wait() {
    for rig in rigs() {
        let mut engine = rig.engine(8);
        if engine.engine.is_simulated() {
            continue;
        }
        let waker = engine.engine.waker().try_clone_to_owned().unwrap();
        for round in 0..5 {
            let begin = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(10));
                    write_eventfd(waker.as_fd());
                });
                engine.sleep(Some(Duration::from_secs(5)));
                // Waking early is allowed, but never for nothing for long.
                while begin.elapsed() < Duration::from_millis(10) {
                    engine.engine.reap(&mut engine.done);
                    engine.sleep(Some(Duration::from_secs(5)));
                }
            });
            let took = begin.elapsed();
            assert!(
                took < Duration::from_secs(2),
                "{} {round}: {took:?}",
                rig.name
            );
            engine.engine.reap(&mut engine.done);
            assert!(engine.done.is_empty());
        }
        // A write before the wait counts too, once.
        write_eventfd(waker.as_fd());
        let begin = Instant::now();
        engine.engine.wait(Some(Duration::from_secs(5))).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2), "{}", rig.name);
        engine.engine.reap(&mut engine.done);
        engine.engine.wait(Some(Duration::from_millis(30))).unwrap();
        engine.engine.reap(&mut engine.done);
        let begin = Instant::now();
        engine.engine.wait(Some(Duration::from_millis(30))).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(29), "{}", rig.name);
    }
}

#[test]
fn the_notifier_is_readable_exactly_while_there_is_something() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        if engine.engine.is_synchronous() {
            continue;
        }
        let id = engine.register(&file);
        let quiet = |engine: &mut Runner| {
            // Reaping until nothing comes leaves the notifier clear.
            loop {
                let before = engine.done.len();
                engine.engine.reap(&mut engine.done);
                if engine.done.len() == before {
                    break;
                }
            }
        };
        engine.engine.notifier();
        quiet(&mut engine);
        assert!(!readable(engine.engine.notifier(), 0), "{}", rig.name);
        let buffers = Buffers::owned(AlignedBuf::zeroed(BLOCK));
        for round in 0..20 {
            engine.start(HostOp::Write {
                file: id,
                offset: 0,
                segments: buffers.segments(),
                dsync: round % 4 == 0,
            });
            engine.engine.submit().unwrap();
            if engine.engine.is_simulated() {
                engine.engine.wait(None).unwrap();
            }
            assert!(
                readable(engine.engine.notifier(), 5000),
                "{} {round}",
                rig.name
            );
            quiet(&mut engine);
            assert_eq!(engine.done.len(), 1, "{} {round}", rig.name);
            engine.done.clear();
            assert!(
                !readable(engine.engine.notifier(), 0),
                "{} {round}",
                rig.name
            );
        }
    }
}

#[test]
fn a_full_engine_says_so_and_goes_on() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(4);
        if engine.engine.is_synchronous() {
            continue;
        }
        let id = engine.register(&file);
        engine.write(id, 0, &pattern(64 * BLOCK, 7), false);
        let buffers: Vec<_> = (0..64)
            .map(|_| Buffers::owned(AlignedBuf::zeroed(BLOCK)))
            .collect();
        let mut next = 0;
        let mut full = 0;
        let mut ended = 0;
        while ended < 64 {
            while next < 64 {
                let (_, started) = engine.start(HostOp::Read {
                    file: id,
                    offset: next as u64 * 4096,
                    segments: buffers[next].segments(),
                });
                if started == Started::Full {
                    full += 1;
                    break;
                }
                next += 1;
            }
            engine.engine.submit().unwrap();
            engine.engine.wait(None).unwrap();
            engine.engine.reap(&mut engine.done);
            for (_, result) in engine.done.drain(..) {
                assert_eq!(result, 4096, "{}", rig.name);
                ended += 1;
            }
        }
        assert!(full >= 10, "{}: {full}", rig.name);
        let data = pattern(64 * BLOCK, 7);
        for (index, buffer) in buffers.iter().enumerate() {
            assert_eq!(
                buffer.as_owned().unwrap()[..],
                data[index * BLOCK..(index + 1) * BLOCK],
                "{}",
                rig.name
            );
        }
    }
}

#[test]
fn a_large_batch_completes() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(256);
        let id = engine.register(&file);
        engine.write(id, 0, &pattern(256 * BLOCK, 7), false);
        let buffers: Vec<_> = (0..256)
            .map(|_| Buffers::owned(AlignedBuf::zeroed(BLOCK)))
            .collect();
        let tokens: Vec<_> = (0..256)
            .map(|index| {
                let (token, started) = engine.start(HostOp::Read {
                    file: id,
                    offset: index as u64 * 4096,
                    segments: buffers[index].segments(),
                });
                assert_ne!(started, Started::Full, "{}", rig.name);
                token
            })
            .collect();
        for token in tokens {
            assert_eq!(engine.finish(token), 4096, "{}", rig.name);
        }
        let data = pattern(256 * BLOCK, 7);
        for (index, buffer) in buffers.iter().enumerate() {
            assert_eq!(
                buffer.as_owned().unwrap()[..],
                data[index * BLOCK..][..BLOCK]
            );
        }
    }
}

#[test]
fn dropping_an_engine_waits_for_its_operations() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(64);
        let id = engine.register(&file);
        let data = pattern(BLOCK, 7);
        let buffers: Vec<_> = (0..32)
            .map(|_| Buffers::owned(AlignedBuf::from_slice(&data)))
            .collect();
        for (index, buffer) in buffers.iter().enumerate() {
            engine.start(HostOp::Write {
                file: id,
                offset: index as u64 * 4096,
                segments: buffer.segments(),
                dsync: false,
            });
            if index == 15 {
                engine.engine.submit().unwrap();
            }
        }
        let (reader, _writer) = pipe();
        engine.start(HostOp::PollReadable {
            fd: reader.as_raw_fd(),
        });
        if !engine.engine.is_synchronous() {
            engine.start(HostOp::Timer {
                after: Duration::from_secs(1000),
            });
        }
        let begin = Instant::now();
        drop(engine);
        assert!(begin.elapsed() < Duration::from_secs(20), "{}", rig.name);
        drop(buffers);
        if file.raw_fd().is_some() {
            let written = std::fs::read(rig.path()).unwrap();
            assert_eq!(written.len(), 32 * BLOCK, "{}", rig.name);
            assert!(
                written.chunks(BLOCK).all(|chunk| chunk == data),
                "{}",
                rig.name
            );
        }
    }
}

#[test]
fn registered_memory_is_used_or_refused_silently() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        let id = engine.register(&file);
        let memory = AlignedBuf::zeroed(64 * BLOCK);
        let base = memory.as_ptr().cast_mut();
        let outside = AlignedBuf::zeroed(2 * BLOCK);
        // SAFETY: the memory lives until the engine is dropped.
        let accepted = unsafe {
            engine.engine.register_memory(&[
                (base.wrapping_add(32 * BLOCK), 32 * BLOCK),
                (base, 16 * BLOCK),
            ])
        };
        println!("{}: registered memory: {accepted}", rig.name);
        let data = pattern(4 * BLOCK, 3);
        engine.write(id, 0, &data, false);
        // Inside either region, in the gap, across an edge, and elsewhere.
        for at in [0, 12, 13, 14, 15, 20, 30, 31, 32, 60] {
            let target = base.wrapping_add(at * BLOCK);
            // SAFETY: part of the memory above.
            let buffers = unsafe { Buffers::from_raw([(target, 4 * BLOCK)], Arc::new(())) };
            let result = engine.run(HostOp::Read {
                file: id,
                offset: 0,
                segments: buffers.segments(),
            });
            assert_eq!(result, 4 * 4096, "{} {at}", rig.name);
            let mut got = vec![0; 4 * BLOCK];
            buffers.copy_out(0, &mut got);
            assert_eq!(got, data, "{} {at}", rig.name);
            let result = engine.run(HostOp::Write {
                file: id,
                offset: 8192,
                segments: buffers.segments(),
                dsync: at % 2 == 0,
            });
            assert_eq!(result, 4 * 4096, "{} {at}", rig.name);
            assert_eq!(engine.read(id, 8192, 4 * BLOCK).unwrap(), data);
            engine.write(id, 0, &data, false);
        }
        // SAFETY: registers nothing.
        assert!(!unsafe { engine.engine.register_memory(&[]) });
        let buffers = scattered(&outside, 2);
        let result = engine.run(HostOp::Read {
            file: id,
            offset: 0,
            segments: buffers.segments(),
        });
        assert_eq!(result, 2 * 4096, "{}", rig.name);
        drop(engine);
    }
}

#[test]
fn a_file_system_without_asynchronous_reads_is_driven_too() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return;
    };
    for kind in [EngineKind::Sync, EngineKind::IoUring] {
        let path: &Path = &dir.path().join("disk");
        let options = FileOptions {
            write: true,
            create: true,
            ..FileOptions::default()
        };
        let host = OsHost::new();
        let file = Arc::new(host.open(path, options).unwrap());
        let mut engine = Runner {
            engine: host.engine(kind, 8).unwrap(),
            next: 0,
            epoll: false,
            done: Vec::new(),
        };
        let id = engine.register(&file);
        let data = pattern(BLOCK, 3);
        assert_eq!(engine.write(id, 0, &data, true), 4096, "{kind}");
        assert_eq!(engine.read(id, 0, BLOCK).unwrap(), data, "{kind}");
    }
}

#[test]
fn polled_completions_are_refused_with_a_reason() {
    let host = OsHost {
        uring: UringOptions {
            polled: true,
            ..UringOptions::default()
        },
    };
    let error = host.engine(EngineKind::IoUring, 8).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}
