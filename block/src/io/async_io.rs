//! The data plane of one queue: requests in, completions out.

use std::{os::fd::BorrowedFd, time::Duration};

use super::{Buffers, MemoryRegions};
use crate::{ErrorKind, Result};

/// One request of a queue. `id` is the caller's and comes back in the completion.
#[derive(Debug)]
pub struct Request {
    /// The caller's name for the request.
    pub id: u64,
    /// What to do.
    pub op: RequestOp,
}

impl Request {
    /// Takes it; what stays asks for nothing that matters.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            id: self.id,
            op: std::mem::replace(&mut self.op, RequestOp::Flush),
        }
    }
}

/// What a request asks for. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum RequestOp {
    /// Fill the buffers from the disk.
    Read {
        /// The first guest byte.
        offset: u64,
        /// Where the bytes go.
        buffers: Buffers,
    },
    /// Write the buffers to the disk.
    Write {
        /// The first guest byte.
        offset: u64,
        /// Where the bytes come from.
        buffers: Buffers,
        /// Force unit access: complete only when the data is durable.
        fua: bool,
    },
    /// Make everything that completed before durable.
    Flush,
    /// The range is not needed any more.
    Discard {
        /// The first guest byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// The first guest byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
        /// Whether host space may be given back.
        may_unmap: bool,
    },
}

impl RequestOp {
    /// Its name, offset and length, for messages.
    pub(crate) fn summary(&self) -> (&'static str, u64, u64) {
        match self {
            RequestOp::Read { offset, buffers } => ("read", *offset, buffers.len()),
            RequestOp::Write {
                offset, buffers, ..
            } => ("write", *offset, buffers.len()),
            RequestOp::Flush => ("flush", 0, 0),
            RequestOp::Discard { offset, len } => ("discard", *offset, *len),
            RequestOp::WriteZeroes { offset, len, .. } => ("write zeroes", *offset, *len),
        }
    }
}

/// The end of a request: everything was done, or the request failed as a whole.
#[derive(Debug)]
pub struct Completion {
    /// The id of the request.
    pub id: u64,
    /// Success, or what went wrong.
    pub result: Result<(), ErrorKind>,
    /// The buffers of a read or write, given back.
    pub buffers: Option<Buffers>,
}

/// The data plane of one queue. It is made by
/// [`create_async_io`](crate::AsyncDiskFile::create_async_io) on the thread that drives it and stays
/// there. Dropping it waits for everything in flight.
///
/// The life of a request: [`submit`](Self::submit) starts it, the notifier becomes readable (or
/// [`wait`](Self::wait) returns) when something may have completed, [`reap`](Self::reap) returns
/// completions and starts what became possible.
pub trait AsyncIo {
    /// Starts requests from the front of `batch`, removing those it took, with one submission to
    /// the host for all of them: at once when somebody asked for the [`notifier`](Self::notifier);
    /// otherwise with the [`wait`](Self::wait) that follows, so that both are one system call, or
    /// with the second [`reap`](Self::reap). It takes fewer than all only when
    /// [`capacity`](Self::capacity) is reached; the rest stays and can be offered again after the
    /// next completion. Returns the number taken.
    fn submit(&mut self, batch: &mut Vec<Request>) -> usize;

    /// Appends the completions at hand to `out` and returns their number. Never blocks.
    fn reap(&mut self, out: &mut Vec<Completion>) -> usize;

    /// Requests submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// The most requests that can be in flight.
    fn capacity(&self) -> usize;

    /// A descriptor that becomes readable when [`reap`](Self::reap) should be called. It means
    /// "poll me", never a count; `reap` clears it.
    fn notifier(&self) -> BorrowedFd<'_>;

    /// Also wakes [`wait`](Self::wait) when `fd` becomes readable, once: after it fired, a
    /// completion with this `id` and no buffers is reaped and the watch is over. The caller keeps `fd`
    /// open until then, or until this queue is dropped.
    ///
    /// A thread sleeps in one place: either in `wait`, with watches, or in its own event loop, with
    /// the [`notifier`](Self::notifier) beside its other descriptors.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) once the notifier of the calling thread was asked
    /// for; the host's error when the descriptor cannot be watched.
    fn watch(&mut self, fd: BorrowedFd<'_>, id: u64) -> Result<()>;

    /// Lets the host pin memory once, instead of for every request whose buffers are in it; replaces
    /// what was registered before by a queue of this thread. Requests in flight go on; the host may
    /// wait for them. Returns whether the host did it: refusal (an engine without registration, a
    /// limit on locked memory) costs speed alone. Registered memory cannot be swapped out.
    fn register_memory(&mut self, memory: MemoryRegions) -> bool {
        let _ = memory;
        false
    }

    /// Blocks until there may be something to reap or `timeout` has passed; returns whether there
    /// is. It may return early: whoever waits for one request waits again.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<bool>;

    /// What [`wait`](Self::wait) sleeps in, as a number, if other queues of the thread can sleep in the same:
    /// [`wait_for_any`](Self::wait_for_any) of one of them waits for all that have this number. `None`: it
    /// sleeps in something of its own.
    fn sleeps_in(&self) -> Option<usize> {
        None
    }

    /// [`wait`](Self::wait) for every queue of this thread that [sleeps in](Self::sleeps_in) the same. It
    /// does not sleep while one of them has something to reap: whoever calls it reaps all of them before.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    fn wait_for_any(&mut self, timeout: Option<Duration>) -> Result<bool> {
        self.wait(timeout)
    }
}
