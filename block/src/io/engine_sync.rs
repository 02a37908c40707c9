//! The synchronous engine: every operation is a system call on the calling thread.
//!
//! Operations are done when [`start`](Engine::start) returns, so a future over this engine is ready
//! at its first poll and nobody needs a runtime. Only a watch on a descriptor stays behind: it is
//! polled by `reap` and `wait`, so a thread that sleeps elsewhere, on the notifier, does not see it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use super::{
    Engine, EngineFile, EngineKind, HostFile, HostOp, Started, Token,
    sys::{self, FileTable, Notifier},
};
use crate::{Error, Result};

/// The synchronous engine.
#[derive(Debug)]
pub struct SyncEngine {
    files: FileTable,
    watches: Vec<(Token, RawFd)>,
    polled: Vec<libc::pollfd>,
    notifier: Notifier,
}

impl SyncEngine {
    /// A new engine for the calling thread.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> Result<Self> {
        Ok(Self {
            files: FileTable::default(),
            watches: Vec::new(),
            polled: Vec::new(),
            notifier: Notifier::new().map_err(|e| Error::from(e).operation("create eventfd"))?,
        })
    }
}

impl Engine for SyncEngine {
    fn name(&self) -> &'static str {
        EngineKind::Sync.name()
    }

    fn register(&mut self, file: &Arc<HostFile>) -> Result<EngineFile> {
        sys::require_os(file, self.name())?;
        Ok(self.files.insert(file))
    }

    fn unregister(&mut self, file: EngineFile) {
        self.files.remove(file);
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        match op {
            HostOp::PollReadable { fd } => {
                self.watches.push((token, fd));
                Started::Pending
            }
            HostOp::Timer { after } => {
                std::thread::sleep(after);
                Started::Done(0)
            }
            // SAFETY: the caller vouches for the memory.
            op => Started::Done(unsafe { sys::perform(&self.files, &op) }),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        self.notifier.clear();
        if self.watches.is_empty() {
            return;
        }
        self.polled.clear();
        self.polled
            .extend(self.watches.iter().map(|(_, fd)| sys::readable(*fd)));
        if sys::poll(&mut self.polled, Some(Duration::ZERO)).is_err() {
            // Out of memory: the next call asks again.
            return;
        }
        let mut polled = self.polled.iter();
        self.watches.retain(|(token, _)| {
            let revents = polled.next().map_or(0, |fd| fd.revents);
            if revents != 0 {
                out.push((*token, sys::poll_result(revents)));
            }
            revents == 0
        });
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.polled.clear();
        self.polled.push(sys::readable(self.notifier.as_raw_fd()));
        self.polled
            .extend(self.watches.iter().map(|(_, fd)| sys::readable(*fd)));
        sys::poll(&mut self.polled, timeout)
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    fn is_synchronous(&self) -> bool {
        true
    }
}
