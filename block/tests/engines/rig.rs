//! What the tests of engines share: the table of engines and a loop around one.

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use block::io::{
    AlignedBuf, Buffers, Engine, EngineFile, EngineKind, FileOptions, Host, HostFile, HostOp,
    OsHost, Started, Token, UringOptions,
    sim::{SimConfig, SimHost},
};

pub(crate) const BLOCK: usize = 4096;

/// A host and how its engine is made.
pub(crate) struct Rig {
    pub(crate) name: &'static str,
    pub(crate) host: Box<dyn Host>,
    pub(crate) kind: EngineKind,
    pub(crate) direct: bool,
    /// Ask for the notifier before anything else, as an epoll loop does.
    pub(crate) announce: bool,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn rig(
    name: &'static str,
    host: impl Host + 'static,
    kind: EngineKind,
    direct: bool,
) -> Rig {
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

pub(crate) fn rigs() -> Vec<Rig> {
    let spinning = OsHost {
        uring: UringOptions {
            spin: Duration::from_micros(50),
            ..UringOptions::default()
        },
    };
    let compatible = OsHost {
        uring: UringOptions {
            compatible: true,
            ..UringOptions::default()
        },
    };
    let mut aio_epoll = rig("aio, epoll", OsHost::new(), EngineKind::LinuxAio, true);
    aio_epoll.announce = true;
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
        rig(
            "sim",
            SimHost::new(SimConfig::seeded(1)),
            EngineKind::Sync,
            false,
        ),
        rig(
            "sim, direct",
            SimHost::new(SimConfig::seeded(2)),
            EngineKind::IoUring,
            true,
        ),
        rig("aio", OsHost::new(), EngineKind::LinuxAio, true),
        aio_epoll,
        rig("uring, old kernel", compatible, EngineKind::IoUring, true),
        rig(
            "uring, old kernel, buffered",
            compatible,
            EngineKind::IoUring,
            false,
        ),
        rig("uring, spinning", spinning, EngineKind::IoUring, true),
        epoll,
        epoll_buffered,
    ]
}

impl Rig {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub(crate) fn file(&self) -> Arc<HostFile> {
        let options = FileOptions {
            write: true,
            direct: self.direct,
            create: true,
            truncate: false,
        };
        Arc::new(self.host.open(&self.path(), options).unwrap())
    }

    pub(crate) fn engine(&self, depth: u32) -> Runner {
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
pub(crate) struct Runner {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) next: u64,
    pub(crate) epoll: bool,
    pub(crate) done: Vec<(Token, i32)>,
}

impl Runner {
    pub(crate) fn register(&mut self, file: &Arc<HostFile>) -> EngineFile {
        self.engine.register(file).unwrap()
    }

    pub(crate) fn token(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }

    /// Starts an operation; its buffers outlive it because every test finishes what it starts.
    pub(crate) fn start(&mut self, op: HostOp<'_>) -> (Token, Started) {
        let token = self.token();
        // SAFETY: tests keep buffers until the operation ended or the engine was dropped.
        let started = unsafe { self.engine.start(token, op) };
        if let Started::Done(result) = started {
            self.done.push((token, result));
        }
        (token, started)
    }

    /// Sleeps as the rig sleeps: in the engine, or on the notifier.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) {
        if self.epoll {
            self.engine.submit().unwrap();
            let millis = timeout.map_or(10_000, |t| i32::try_from(t.as_millis()).unwrap());
            assert!(readable(self.engine.notifier(), millis), "nothing woke us");
        } else {
            self.engine.wait(timeout).unwrap();
        }
    }

    pub(crate) fn finish(&mut self, token: Token) -> i32 {
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

    pub(crate) fn run(&mut self, op: HostOp<'_>) -> i32 {
        let (token, started) = self.start(op);
        assert_ne!(started, Started::Full);
        self.finish(token)
    }

    pub(crate) fn read(
        &mut self,
        file: EngineFile,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, i32> {
        let buffers = Buffers::owned(AlignedBuf::zeroed(len));
        let result = self.run(HostOp::Read {
            file,
            offset,
            segments: buffers.segments(),
        });
        let got = usize::try_from(result).map_err(|_| result)?;
        Ok(buffers.as_owned().unwrap()[..got].to_vec())
    }

    pub(crate) fn write(
        &mut self,
        file: EngineFile,
        offset: u64,
        bytes: &[u8],
        dsync: bool,
    ) -> i32 {
        let buffers = Buffers::owned(AlignedBuf::from_slice(bytes));
        self.run(HostOp::Write {
            file,
            offset,
            segments: buffers.segments(),
            dsync,
        })
    }
}

pub(crate) fn readable(fd: BorrowedFd<'_>, millis: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, ours.
    unsafe { libc::poll(&raw mut poll, 1, millis) == 1 }
}

pub(crate) fn write_eventfd(fd: BorrowedFd<'_>) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes of ours.
    let written = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), 8) };
    assert_eq!(written, 8);
}

pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer.into())
}

pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| {
            seed.wrapping_add((i % 251) as u8)
                .wrapping_add((i / BLOCK) as u8)
        })
        .collect()
}

/// The pieces of a buffer in reverse order: a scatter list of `pieces` segments.
pub(crate) fn scattered(buffer: &AlignedBuf, pieces: usize) -> Buffers {
    let size = buffer.len() / pieces;
    let base = buffer.as_ptr().cast_mut();
    let list = (0..pieces)
        .rev()
        .map(|i| (base.wrapping_add(i * size), size));
    // SAFETY: the test keeps the buffer until the operation ended and looks at it afterwards.
    unsafe { Buffers::from_raw(list, Arc::new(())) }
}
