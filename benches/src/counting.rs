//! A host that counts what it is asked to do.

use std::{
    io, mem,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use block::io::{
    Engine, EngineFile, EngineKind, FileOptions, Host, HostFile, HostOp, OsHost, Segment, Started,
    Token,
};

/// Host operations so far, of all engines of a [`CountingHost`].
#[derive(Debug, Default)]
pub struct Counts {
    /// Writes.
    writes: AtomicU64,
    /// Their bytes.
    written: AtomicU64,
    /// Flushes, and writes that are durable when they complete.
    flushes: AtomicU64,
    /// Offsets and lengths of reads.
    reads: Mutex<Vec<(u64, u64)>>,
}

/// What [`Counts`] held at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Writes.
    pub writes: u64,
    /// Their bytes.
    pub written: u64,
    /// Flushes, and writes that are durable when they complete.
    pub flushes: u64,
}

impl Counts {
    /// The counts now.
    #[must_use]
    pub fn now(&self) -> Counted {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counted {
            writes: load(&self.writes),
            written: load(&self.written),
            flushes: load(&self.flushes),
        }
    }

    /// The reads so far: offsets and lengths in bytes. They are forgotten.
    #[must_use]
    pub fn take_reads(&self) -> Vec<(u64, u64)> {
        mem::take(&mut *self.reads())
    }

    fn reads(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, op: &HostOp<'_>) {
        let add = |count: &AtomicU64, more| count.fetch_add(more, Ordering::Relaxed);
        match op {
            HostOp::Write {
                segments, dsync, ..
            } => {
                let len: usize = segments.iter().map(Segment::len).sum();
                add(&self.writes, 1);
                add(&self.written, len as u64);
                add(&self.flushes, u64::from(*dsync));
            }
            HostOp::Sync { .. } => {
                add(&self.flushes, 1);
            }
            HostOp::Read {
                offset, segments, ..
            } => {
                let len: usize = segments.iter().map(Segment::len).sum();
                self.reads().push((*offset, len as u64));
            }
            HostOp::Fallocate { .. } | HostOp::Timer { .. } | HostOp::PollReadable { .. } => {}
        }
    }
}

/// The operating system, counted.
#[derive(Debug, Default)]
pub struct CountingHost {
    host: OsHost,
    counts: Arc<Counts>,
}

impl CountingHost {
    /// The operating system, nothing counted yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Its counts.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

impl Host for CountingHost {
    fn open(&self, path: &Path, options: FileOptions) -> block::Result<HostFile> {
        self.host.open(path, options)
    }

    fn open_beneath(
        &self,
        folder: &Path,
        name: &Path,
        options: FileOptions,
    ) -> block::Result<HostFile> {
        self.host.open_beneath(folder, name, options)
    }

    fn absolute(&self, path: &Path) -> Option<PathBuf> {
        self.host.absolute(path)
    }

    fn engine(&self, kind: EngineKind, depth: u32) -> block::Result<Box<dyn Engine>> {
        Ok(Box::new(CountingEngine {
            engine: self.host.engine(kind, depth)?,
            counts: self.counts(),
        }))
    }

    fn is_os(&self) -> bool {
        self.host.is_os()
    }
}

struct CountingEngine {
    engine: Box<dyn Engine>,
    counts: Arc<Counts>,
}

impl Engine for CountingEngine {
    fn name(&self) -> &'static str {
        self.engine.name()
    }

    fn register(&mut self, file: &Arc<HostFile>) -> block::Result<EngineFile> {
        self.engine.register(file)
    }

    fn unregister(&mut self, file: EngineFile) {
        self.engine.unregister(file);
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        // SAFETY: the caller promises to us what the engine asks for.
        let started = unsafe { self.engine.start(token, op) };
        if started != Started::Full {
            self.counts.count(&op);
        }
        started
    }

    fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        self.engine.reap(out);
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.engine.wait(timeout)
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.engine.notifier()
    }

    fn waker(&self) -> BorrowedFd<'_> {
        self.engine.waker()
    }

    unsafe fn register_memory(&mut self, regions: &[(*mut u8, usize)]) -> bool {
        // SAFETY: the caller promises to us what the engine asks for.
        unsafe { self.engine.register_memory(regions) }
    }

    fn is_synchronous(&self) -> bool {
        self.engine.is_synchronous()
    }

    fn is_simulated(&self) -> bool {
        self.engine.is_simulated()
    }
}

#[cfg(test)]
mod tests {
    use block::{DiskFile as _, Format, OpenOptions};

    use super::*;

    #[test]
    fn writes_and_flushes_are_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let host = CountingHost::new();
        let counts = host.counts();
        let disk = OpenOptions::new()
            .format(Format::Raw)
            .open_on(file.path(), host)
            .unwrap();
        let before = counts.now();
        disk.write_at(&[1; 4096], 8192).unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        disk.flush().unwrap();
        let _ = counts.take_reads();
        disk.read_at(&mut [0; 1024], 512).unwrap();
        assert_eq!(counts.take_reads(), [(512, 1024)]);
        let after = counts.now();
        assert_eq!(after.writes - before.writes, 2);
        assert_eq!(after.written - before.written, 4608);
        assert_eq!(after.flushes - before.flushes, 1);
    }
}
