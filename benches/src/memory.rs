//! Files that are memory: what is left over such an engine is the cost of the mapping, the queue and
//! the device.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use block::io::{
    Backend, Engine, EngineFile, EngineKind, FallocateMode, FileOptions, Host, HostFile, HostOp,
    IoAlignment, Segment, SimulatedFile, Started, Token,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

/// A host whose files are memory, each of a fixed capacity.
#[derive(Debug)]
pub struct MemoryHost {
    capacity: usize,
    files: Mutex<HashMap<PathBuf, Arc<MemoryFile>>>,
}

impl MemoryHost {
    /// A host whose files hold up to `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            files: Mutex::default(),
        })
    }
}

/// A file in memory.
#[derive(Debug)]
struct MemoryFile {
    bytes: MmapRegion<()>,
    len: AtomicU64,
}

impl SimulatedFile for MemoryFile {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.bytes.size() as u64 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Host for MemoryHost {
    fn open(&self, path: &Path, options: FileOptions) -> block::Result<HostFile> {
        let fail = |errno| block::Error::from(io::Error::from_raw_os_error(errno)).path(path);
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match files.get(path) {
            Some(file) => Arc::clone(file),
            None if options.create => {
                let bytes = MmapRegion::new(self.capacity).map_err(|_| fail(libc::ENOMEM))?;
                let file = Arc::new(MemoryFile {
                    bytes,
                    len: AtomicU64::new(0),
                });
                files.insert(path.to_owned(), Arc::clone(&file));
                file
            }
            None => return Err(fail(libc::ENOENT)),
        };
        Ok(HostFile::simulated(
            path,
            file,
            options.write,
            IoAlignment::NONE,
        ))
    }

    fn open_beneath(
        &self,
        folder: &Path,
        name: &Path,
        options: FileOptions,
    ) -> block::Result<HostFile> {
        self.open(&folder.join(name), options)
    }

    fn absolute(&self, path: &Path) -> Option<PathBuf> {
        Some(path.to_owned())
    }

    fn engine(&self, _kind: EngineKind, depth: u32) -> block::Result<Box<dyn Engine>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let notifier = eventfd(0, flags).map_err(io::Error::from)?;
        Ok(Box::new(MemoryEngine {
            files: Vec::new(),
            done: VecDeque::with_capacity(depth as usize),
            watches: Vec::new(),
            notifier,
        }))
    }

    fn is_os(&self) -> bool {
        false
    }
}

/// Copies when an operation starts, and says so at the next reap.
struct MemoryEngine {
    files: Vec<Option<Arc<HostFile>>>,
    done: VecDeque<(Token, i32)>,
    watches: Vec<(Token, RawFd)>,
    notifier: OwnedFd,
}

impl MemoryEngine {
    fn file(&self, file: EngineFile) -> Option<&MemoryFile> {
        let file = self.files.get(file.0 as usize)?.as_ref()?;
        match file.backend() {
            Backend::Simulated(file) => file.as_any().downcast_ref(),
            Backend::Os(_) => None,
        }
    }

    fn perform(&self, op: &HostOp<'_>) -> Option<i32> {
        match *op {
            HostOp::Read {
                file,
                offset,
                segments,
            } => copy(self.file(file)?, offset, segments, false),
            HostOp::Write {
                file,
                offset,
                segments,
                ..
            } => copy(self.file(file)?, offset, segments, true),
            HostOp::Fallocate {
                file,
                mode,
                offset,
                len,
            } => {
                let file = self.file(file)?;
                let end = offset.checked_add(len)?;
                if mode == FallocateMode::Allocate {
                    file.set_len(end.max(file.len())).ok()?;
                    return Some(0);
                }
                let end = end.min(file.len());
                let zeroes = vec![0; usize::try_from(end.saturating_sub(offset)).ok()?];
                let at = usize::try_from(offset).ok()?;
                let place = file.bytes.get_slice(at, zeroes.len()).ok()?;
                place.copy_from(&zeroes);
                Some(0)
            }
            HostOp::Sync { .. } => Some(0),
            HostOp::Timer { .. } | HostOp::PollReadable { .. } => None,
        }
    }
}

/// Copies between a file and segments; how many bytes. A write makes the file longer.
fn copy(file: &MemoryFile, offset: u64, segments: &[Segment], write: bool) -> Option<i32> {
    let mut at = usize::try_from(offset).ok()?;
    let len: usize = segments.iter().map(Segment::len).sum();
    if write {
        let end = offset.checked_add(len as u64)?;
        file.set_len(end.max(file.len())).ok()?;
    }
    let mut left = usize::try_from(file.len()).ok()?.saturating_sub(at);
    let mut copied = 0;
    for segment in segments {
        let part = segment.len().min(left);
        let place = file.bytes.get_slice(at, part).ok()?;
        // SAFETY: the caller of `start` vouches for the segments' memory; the slice ends with this turn.
        let memory = unsafe { VolatileSlice::new(segment.as_ptr(), part) };
        if write {
            memory.copy_to_volatile_slice(place);
        } else {
            place.copy_to_volatile_slice(memory);
        }
        at += part;
        left -= part;
        copied += part;
    }
    i32::try_from(copied).ok()
}

impl Engine for MemoryEngine {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn register(&mut self, file: &Arc<HostFile>) -> block::Result<EngineFile> {
        self.files.push(Some(Arc::clone(file)));
        Ok(EngineFile(self.files.len() as u32 - 1))
    }

    fn unregister(&mut self, file: EngineFile) {
        if let Some(file) = self.files.get_mut(file.0 as usize) {
            *file = None;
        }
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        if let HostOp::PollReadable { fd } = op {
            self.watches.push((token, fd));
            return Started::Pending;
        }
        let result = self.perform(&op).unwrap_or(-libc::EIO);
        self.done.push_back((token, result));
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        out.extend(self.done.drain(..));
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.done.is_empty() {
            return Ok(());
        }
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(&self.notifier, PollFlags::IN)];
        fds.extend(self.watches.iter().map(|(_, fd)| {
            // SAFETY: who watches a descriptor keeps it open until it was reported.
            PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(*fd) }, PollFlags::IN)
        }));
        poll(&mut fds, timeout.as_ref())?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            let _ = rustix::io::read(&self.notifier, &mut [0; 8]);
        }
        let mut ready = ready[1..].iter();
        let done = &mut self.done;
        self.watches.retain(|(token, _)| {
            let ready = ready.next().is_some_and(|ready| *ready);
            if ready {
                done.push_back((*token, PollFlags::IN.bits().into()));
            }
            !ready
        });
        Ok(())
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}
