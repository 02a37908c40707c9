//! Waiting, waking, limits and the end of an engine.

use std::{
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use block::{
    ErrorKind,
    io::{
        AlignedBuf, Buffers, EngineKind, FileOptions, Host, HostOp, OsHost, Started, UringOptions,
    },
};

use crate::rig::*;

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

#[test]
fn the_notifier_can_be_asked_for_at_any_time() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        if engine.engine.is_synchronous() || engine.engine.is_simulated() {
            continue;
        }
        let id = engine.register(&file);
        engine.write(id, 0, &pattern(BLOCK, 1), false);
        // Sleeping in the engine leaves its own watch behind.
        engine.engine.wait(Some(Duration::from_millis(1))).unwrap();
        let buffers = Buffers::owned(AlignedBuf::zeroed(BLOCK));
        let read = HostOp::Read {
            file: id,
            offset: 0,
            segments: buffers.segments(),
        };
        let (before, _) = engine.start(read);
        engine.engine.submit().unwrap();
        engine.epoll = true;
        assert_eq!(engine.finish(before), 4096, "{}", rig.name);
        for _ in 0..20 {
            assert_eq!(engine.run(read), 4096, "{}", rig.name);
        }
        // And then sleeping in the engine still works.
        engine.epoll = false;
        for _ in 0..20 {
            assert_eq!(engine.run(read), 4096, "{}", rig.name);
        }
    }
}

#[test]
fn no_wake_up_is_lost_among_completions() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(8);
        if engine.engine.is_simulated() {
            continue;
        }
        let id = engine.register(&file);
        engine.write(id, 0, &pattern(BLOCK, 1), false);
        let buffers = Buffers::owned(AlignedBuf::zeroed(BLOCK));
        let waker = engine.engine.waker().try_clone_to_owned().unwrap();
        let (asked, answered) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=300 {
                    asked.store(round, Ordering::SeqCst);
                    write_eventfd(waker.as_fd());
                    while answered.load(Ordering::SeqCst) < round {
                        std::thread::yield_now();
                    }
                }
            });
            let mut turn = 0u64;
            while answered.load(Ordering::SeqCst) < 300 {
                // Sometimes with an operation in flight, sometimes with nothing but the waker.
                turn += 1;
                let (token, _) = engine.start(HostOp::Read {
                    file: id,
                    offset: 0,
                    segments: buffers.segments(),
                });
                if turn.is_multiple_of(3) {
                    engine.finish(token);
                }
                // A lost wake-up shows as a wait of ten seconds.
                let begin = Instant::now();
                while !turn.is_multiple_of(3) && engine.done.is_empty() {
                    engine.sleep(Some(Duration::from_secs(10)));
                    engine.engine.reap(&mut engine.done);
                }
                engine.done.clear();
                while asked.load(Ordering::SeqCst) == answered.load(Ordering::SeqCst)
                    && answered.load(Ordering::SeqCst) < 300
                {
                    engine.sleep(Some(Duration::from_secs(10)));
                    engine.engine.reap(&mut engine.done);
                }
                assert!(begin.elapsed() < Duration::from_secs(9), "{}", rig.name);
                answered.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        });
    }
}

#[test]
fn no_end_of_a_write_is_lost() {
    for rig in rigs() {
        let file = rig.file();
        let mut engine = rig.engine(32);
        let id = engine.register(&file);
        let data = Buffers::owned(AlignedBuf::from_slice(&pattern(BLOCK, 3)));
        let begin = Instant::now();
        // One more is always started while others are on their way.
        let (mut started, mut ended) = (0u64, 0);
        while ended < 2000 {
            let batch = started % 7 + 1;
            while started < 2000 && started - ended < batch {
                let (_, state) = engine.start(HostOp::Write {
                    file: id,
                    offset: started % 64 * 4096,
                    segments: data.segments(),
                    dsync: started.is_multiple_of(100),
                });
                assert_ne!(state, Started::Full, "{}", rig.name);
                started += 1;
            }
            if engine.done.is_empty() {
                engine.sleep(Some(Duration::from_secs(10)));
            }
            engine.engine.reap(&mut engine.done);
            for (_, result) in engine.done.drain(..) {
                assert_eq!(result, 4096, "{}", rig.name);
                ended += 1;
            }
            // An end that is not told shows as a wait of ten seconds.
            let took = begin.elapsed();
            assert!(
                took < Duration::from_secs(9),
                "{} {ended}: {took:?}",
                rig.name
            );
        }
    }
}
