//! Engines: what performs host I/O operations.
//!
//! An engine starts operations and reports their raw results, nothing more. Continuing short
//! transfers, retrying `EINTR` and `EAGAIN`, alignment, waking tasks and accounting are done once,
//! above all engines, by the [`Driver`](super::driver::Driver).

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc, time::Duration};

use super::{HostFile, Segment};

/// The engines that can be asked for by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// `preadv2`/`pwritev2` on the calling thread.
    Sync,
    /// io_uring.
    #[default]
    IoUring,
    /// Linux AIO; needs direct I/O.
    LinuxAio,
}

impl EngineKind {
    /// Every engine.
    pub const ALL: [EngineKind; 3] = [EngineKind::Sync, EngineKind::IoUring, EngineKind::LinuxAio];

    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Sync => "sync",
            EngineKind::IoUring => "io_uring",
            EngineKind::LinuxAio => "linux-aio",
        }
    }

    /// The engine of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A file as an engine knows it: the index that [`Engine::register`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineFile(pub u32);

/// The caller's name for an operation; comes back with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What `fallocate` should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallocateMode {
    /// Give the space back; the range reads as zeroes (`PUNCH_HOLE | KEEP_SIZE`).
    PunchHole,
    /// Make the range read as zeroes, keeping space allocated (`ZERO_RANGE | KEEP_SIZE`).
    ZeroRange,
    /// Allocate space without changing content; extends the file.
    Allocate,
}

/// One host operation. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum HostOp<'a> {
    /// Read into segments.
    Read {
        /// The file.
        file: EngineFile,
        /// Where in the file.
        offset: u64,
        /// Where the bytes go.
        segments: &'a [Segment],
    },
    /// Write segments.
    Write {
        /// The file.
        file: EngineFile,
        /// Where in the file.
        offset: u64,
        /// Where the bytes come from.
        segments: &'a [Segment],
        /// Complete only when the data is durable (`RWF_DSYNC`).
        dsync: bool,
    },
    /// `fdatasync`: data, and the metadata needed to find it, become durable.
    Sync {
        /// The file.
        file: EngineFile,
    },
    /// Change the allocation of a range.
    Fallocate {
        /// The file.
        file: EngineFile,
        /// What to do.
        mode: FallocateMode,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Complete after this time.
    Timer {
        /// How long.
        after: Duration,
    },
    /// Complete when the descriptor is readable; `fd` stays open until then.
    PollReadable {
        /// The descriptor.
        fd: std::os::fd::RawFd,
    },
}

/// What became of an operation given to [`Engine::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// It is done: bytes transferred (0 for others), or a negative `errno`.
    Done(i32),
    /// It will be reported by [`Engine::reap`].
    Pending,
    /// There is no room. Nothing was started; try again after the next completion or submission.
    Full,
}

/// Something that performs host I/O operations for one driving thread.
///
/// The engine is made on that thread and never leaves it. Results are those of the system calls: a
/// transfer may be short, and `-EINTR` and `-EAGAIN` may be reported; the caller goes on from there.
pub trait Engine {
    /// The engine's name, for messages and statistics.
    fn name(&self) -> &'static str;

    /// Makes a file known to the engine. The engine keeps it open until
    /// [`unregister`](Self::unregister).
    ///
    /// # Errors
    /// When the engine cannot drive this file (Linux AIO without direct I/O, a foreign file).
    fn register(&mut self, file: &Arc<HostFile>) -> crate::Result<EngineFile>;

    /// Forgets a file; no operation on it is in flight. Its index may be used again.
    fn unregister(&mut self, file: EngineFile);

    /// Starts one operation. An asynchronous engine may hold it back until
    /// [`submit`](Self::submit).
    ///
    /// # Safety
    /// After `Pending`, the memory behind the segments (the bytes, and the segment array itself)
    /// must stay valid and at its place until [`reap`](Self::reap) returned `token`. Nobody else may
    /// touch the target of a read meanwhile, except a guest through its own mapping.
    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started;

    /// Hands what was started to the host, in one system call where the engine can, and lets the
    /// host post completions. Called with nothing started too.
    ///
    /// # Errors
    /// The host's error; operations stay queued and the next call tries again.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends finished operations to `out`: token and result as in [`Started::Done`]. Never blocks.
    fn reap(&mut self, out: &mut Vec<(Token, i32)>);

    /// Blocks until an operation may have finished, [`notifier`](Self::notifier) was written, or
    /// `timeout` has passed. Submits what is held back first.
    ///
    /// # Errors
    /// The host's error.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;

    /// The eventfd of the driving thread. The engine writes it when operations finish (an
    /// asynchronous one lets the kernel do it), anybody may write it to end
    /// [`wait`](Self::wait); [`reap`](Self::reap) clears it.
    fn notifier(&self) -> BorrowedFd<'_>;

    /// The same eventfd, for those who only write it to end [`wait`](Self::wait). Asking for
    /// [`notifier`](Self::notifier) instead says that somebody may sleep on it, and then a ring has
    /// to write it for every completion and cannot be slept in: `wait` costs two system calls more.
    fn waker(&self) -> BorrowedFd<'_> {
        self.notifier()
    }

    /// Registers memory, so that operations on a segment inside one of these regions save the
    /// host's work of pinning it; replaces what was registered before. Returns whether the host did
    /// it: refusal (a limit on locked memory, an engine without registration) changes nothing but
    /// the speed. Operations in flight go on; the host may wait for them.
    ///
    /// # Safety
    /// The regions must stay mapped, at their place, until they are replaced (also by an empty
    /// list) or the engine is dropped.
    unsafe fn register_memory(&mut self, regions: &[(*mut u8, usize)]) -> bool {
        let _ = regions;
        false
    }

    /// Whether every operation is done when `start` returns. Then pool work runs inline too.
    fn is_synchronous(&self) -> bool {
        false
    }

    /// Whether blocking work runs inline and only its *completion* is scheduled by the engine, as
    /// the deterministic simulation needs it.
    fn is_simulated(&self) -> bool {
        false
    }
}
