//! The Linux AIO engine: `io_submit` for a batch, an eventfd for completions.
//!
//! Linux AIO is asynchronous only with direct I/O (it would read through the page cache inside
//! `io_submit`), so other files are refused. Even so `io_submit` may block where the file system has
//! to allocate. Syncs go to the kernel's own workers (`IOCB_CMD_FDSYNC`), watches are
//! `IOCB_CMD_POLL`; allocation changes, timers, and syncs of files that the kernel cannot sync
//! asynchronously run on one helper thread that is started with the engine.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use super::{
    Engine, EngineFile, EngineKind, HostFile, HostOp, Segment, Started, Token,
    aio_sys::{self, Context, IoEvent, Iocb},
    aio_worker::{Job, Worker},
    sys::{self, FileTable, MAX_TRANSFER, Notifier},
};
use crate::{Error, ErrorKind, Result};

/// Attempts to submit when the kernel has no room and nothing is in flight that could make some.
const SUBMIT_ATTEMPTS: u32 = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Touches a file, and perhaps memory of the caller.
    File,
    Timer,
    Watch,
}

/// An operation in flight. The kernel has the address of its `iocb`.
#[derive(Debug)]
struct Slot {
    iocb: Iocb,
    token: Token,
    kind: Kind,
}

/// The Linux AIO engine.
#[derive(Debug)]
pub struct AioEngine {
    // Destroyed first: nothing below may go while the kernel uses it.
    context: Context,
    worker: Worker,
    files: FileTable,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Started, not yet submitted to the kernel, in order.
    queued: Vec<u32>,
    /// The kernel had no room for what is queued.
    stuck: bool,
    /// Refused by the kernel, not yet reaped.
    refused: Vec<(u32, i32)>,
    /// Operations in flight that must end before the engine does.
    unfinished: usize,
    pointers: Vec<*mut Iocb>,
    events: Box<[IoEvent]>,
    notifier: Arc<Notifier>,
}

impl AioEngine {
    /// An engine for the calling thread that holds `depth` operations.
    ///
    /// # Errors
    /// When the kernel has no context to give; the message says why.
    pub fn new(depth: u32) -> Result<Self> {
        let depth = depth.clamp(1, 1 << 14);
        let context = Context::new(depth).map_err(|error| refused(&error))?;
        let notifier =
            Arc::new(Notifier::new().map_err(|e| Error::from(e).operation("create eventfd"))?);
        let worker =
            Worker::new(&notifier).map_err(|e| Error::from(e).operation("start thread"))?;
        Ok(Self {
            context,
            worker,
            files: FileTable::default(),
            slots: (0..depth)
                .map(|_| Slot {
                    iocb: Iocb::default(),
                    token: Token(0),
                    kind: Kind::File,
                })
                .collect(),
            free: (0..depth).rev().collect(),
            queued: Vec::new(),
            stuck: false,
            refused: Vec::new(),
            unfinished: 0,
            pointers: Vec::new(),
            events: vec![IoEvent::default(); depth.min(256) as usize].into(),
            notifier,
        })
    }

    fn transfer(
        &self,
        (fd, unit): (RawFd, usize),
        offset: u64,
        segments: &[Segment],
        write: bool,
    ) -> Result<Iocb, i32> {
        let offset = i64::try_from(offset).map_err(|_| -libc::EINVAL)?;
        let segments = sys::prefix(segments, unit);
        let eventfd = self.notifier.as_raw_fd();
        let mut iocb = if let [segment] = segments {
            let opcode = if write {
                aio_sys::CMD_PWRITE
            } else {
                aio_sys::CMD_PREAD
            };
            let mut iocb = Iocb::new(opcode, fd, eventfd);
            iocb.buf = segment.as_ptr() as u64;
            iocb.nbytes = segment.len().min(MAX_TRANSFER) as u64;
            iocb
        } else {
            let opcode = if write {
                aio_sys::CMD_PWRITEV
            } else {
                aio_sys::CMD_PREADV
            };
            let mut iocb = Iocb::new(opcode, fd, eventfd);
            // A segment is laid out as an iovec.
            iocb.buf = segments.as_ptr() as u64;
            iocb.nbytes = segments.len() as u64;
            iocb
        };
        iocb.offset = offset;
        Ok(iocb)
    }

    /// The control block of an operation, or `None` for one that the helper thread does.
    fn control_block(&self, op: &HostOp<'_>) -> Result<Option<Iocb>, i32> {
        let target = |file: EngineFile| -> Result<(RawFd, usize), i32> {
            let known = self.files.get(file).ok_or(-libc::EBADF)?;
            Ok((known.fd, known.unit))
        };
        let eventfd = self.notifier.as_raw_fd();
        Ok(Some(match *op {
            HostOp::Read {
                file,
                offset,
                segments,
            } => self.transfer(target(file)?, offset, segments, false)?,
            HostOp::Write {
                file,
                offset,
                segments,
                dsync,
            } => {
                let mut iocb = self.transfer(target(file)?, offset, segments, true)?;
                iocb.rw_flags = if dsync { libc::RWF_DSYNC } else { 0 };
                iocb
            }
            HostOp::Sync { file } => Iocb::new(aio_sys::CMD_FDSYNC, target(file)?.0, eventfd),
            HostOp::PollReadable { fd } => {
                let mut iocb = Iocb::new(aio_sys::CMD_POLL, fd, eventfd);
                iocb.buf = libc::POLLIN as u64;
                iocb
            }
            HostOp::Fallocate { .. } | HostOp::Timer { .. } => return Ok(None),
        }))
    }

    /// Gives the helper thread what the kernel's interface cannot do.
    fn delegate(&self, slot: u32, op: &HostOp<'_>) -> Result<(), i32> {
        match *op {
            HostOp::Fallocate {
                file,
                mode,
                offset,
                len,
            } => {
                let fd = self.files.get(file).ok_or(-libc::EBADF)?.fd;
                let job = Job::Fallocate {
                    fd,
                    mode,
                    offset,
                    len,
                };
                self.worker.run(slot, job);
            }
            HostOp::Timer { after } => self.worker.timer(slot, after),
            _ => return Err(-libc::EINVAL),
        }
        Ok(())
    }

    /// The kernel refused the first queued operation.
    fn refuse_first(&mut self, errno: i32) {
        let index = self.queued.remove(0);
        let iocb = &self.slots[index as usize].iocb;
        if iocb.opcode == aio_sys::CMD_FDSYNC && errno == libc::EINVAL {
            // Before Linux 4.18, or a file that has only a blocking sync.
            let fd = iocb.fildes as RawFd;
            self.worker.run(index, Job::Sync { fd });
        } else {
            self.refused.push((index, -errno));
            self.notifier.signal();
        }
    }

    /// An operation ended: its slot is free again.
    fn end(&mut self, index: u32, result: i32, out: &mut Vec<(Token, i32)>) {
        let slot = &self.slots[index as usize];
        let result = match slot.kind {
            // A watch reports what it saw.
            Kind::Watch => result.min(0),
            Kind::File => {
                self.unfinished -= 1;
                result
            }
            Kind::Timer => result,
        };
        out.push((slot.token, result));
        self.free.push(index);
    }

    fn collect(&mut self, out: &mut Vec<(Token, i32)>) -> usize {
        let before = out.len();
        for (index, result) in std::mem::take(&mut self.refused) {
            self.end(index, result, out);
        }
        for (index, result) in self.worker.results() {
            self.end(index, result, out);
        }
        while !self.context.is_empty() {
            let count = self.context.collect(&mut self.events);
            for at in 0..count {
                let event = self.events[at];
                let result = i32::try_from(event.res).unwrap_or(-libc::EIO);
                self.end(event.data as u32, result, out);
            }
            if count < self.events.len() {
                break;
            }
        }
        out.len() - before
    }
}

/// What the refusal of a context means.
fn refused(error: &io::Error) -> Error {
    let (kind, reason) = match error.raw_os_error() {
        Some(libc::ENOSYS) => (
            ErrorKind::Unsupported,
            "the kernel was built without it (CONFIG_AIO)".to_owned(),
        ),
        Some(libc::EAGAIN) => (
            ErrorKind::Io(libc::EAGAIN),
            "the host's limit of operations is reached (sysctl fs.aio-max-nr)".to_owned(),
        ),
        errno => (
            errno.map_or(ErrorKind::Unsupported, ErrorKind::from_errno),
            error.to_string(),
        ),
    };
    Error::with_message(kind, format!("linux-aio: {reason}")).operation("create engine")
}

impl Engine for AioEngine {
    fn name(&self) -> &'static str {
        EngineKind::LinuxAio.name()
    }

    fn register(&mut self, file: &Arc<HostFile>) -> Result<EngineFile> {
        sys::require_os(file, self.name())?;
        if !file.is_direct() {
            return Err(Error::unsupported(
                "linux-aio needs direct I/O: open the file with O_DIRECT, or use another engine",
            )
            .path(file.path()));
        }
        Ok(self.files.insert(file))
    }

    fn unregister(&mut self, file: EngineFile) {
        self.files.remove(file);
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        let Some(index) = self.free.pop() else {
            return Started::Full;
        };
        let control_block = match self.control_block(&op) {
            Ok(made) => made,
            Err(result) => {
                self.free.push(index);
                return Started::Done(result);
            }
        };
        let kind = match op {
            HostOp::Timer { .. } => Kind::Timer,
            HostOp::PollReadable { .. } => Kind::Watch,
            _ => Kind::File,
        };
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.kind = kind;
        match control_block {
            Some(mut iocb) => {
                iocb.data = u64::from(index);
                slot.iocb = iocb;
                self.queued.push(index);
            }
            None => {
                if let Err(result) = self.delegate(index, &op) {
                    self.free.push(index);
                    return Started::Done(result);
                }
            }
        }
        if kind == Kind::File {
            self.unfinished += 1;
        }
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut attempts = 0;
        while !self.queued.is_empty() {
            self.pointers.clear();
            let slots = &mut self.slots;
            self.pointers.extend(
                self.queued
                    .iter()
                    .map(|index| &raw mut slots[*index as usize].iocb),
            );
            // SAFETY: slots never move; whoever started the operations vouches for their memory.
            let error = match unsafe { self.context.submit(&mut self.pointers) } {
                Ok(0) => io::Error::from_raw_os_error(libc::EAGAIN),
                Ok(taken) => {
                    self.queued.drain(..taken);
                    continue;
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => {
                    // With operations in flight, their completions let the caller try again.
                    let busy = self.slots.len() - self.free.len() > self.queued.len();
                    if busy || attempts == SUBMIT_ATTEMPTS {
                        self.stuck = true;
                        return Err(error);
                    }
                    attempts += 1;
                    std::thread::yield_now();
                }
                errno => self.refuse_first(errno.unwrap_or(libc::EIO)),
            }
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        // The notifier is cleared only when nothing was found, and then once more is looked: what
        // came before clearing is seen by that look, what comes after makes it readable again.
        if self.collect(out) == 0 {
            self.notifier.clear();
            self.collect(out);
        }
        if std::mem::take(&mut self.stuck) {
            // What ended made room. If not, it is tried again next time.
            let _ = self.submit();
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = sys::try_again_soon(self.submit(), timeout)?;
        if !self.refused.is_empty() || self.worker.has_results() {
            return Ok(());
        }
        sys::poll(&mut [sys::readable(self.notifier.as_raw_fd())], timeout)
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}

impl Drop for AioEngine {
    fn drop(&mut self) {
        let mut out = Vec::new();
        let mut reported = false;
        loop {
            self.reap(&mut out);
            if self.unfinished == 0 {
                return;
            }
            // The kernel may still write to memory of others: there is no way on but waiting.
            if let Err(error) = self.wait(None)
                && !std::mem::replace(&mut reported, true)
            {
                tracing::error!(%error, "linux-aio: cannot wait for operations in flight");
            }
        }
    }
}
