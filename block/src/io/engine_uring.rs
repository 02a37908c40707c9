//! The io_uring engine: one ring per driving thread, one `io_uring_enter` per batch.
//!
//! # The ring and its thread
//! The ring is set up with `SINGLE_ISSUER` and `DEFER_TASKRUN` where the kernel has them: completions
//! are posted by the driving thread itself, when it enters the kernel, instead of interrupting it.
//! The kernel tells through `TASKRUN_FLAG` that there is something to post, so
//! [`reap`](Engine::reap) enters only then. Older kernels get `COOP_TASKRUN` or a plain ring.
//!
//! # The notifier
//! Two kinds of sleep must end: [`wait`](Engine::wait), which sleeps in the ring, and an epoll loop
//! around [`notifier`](Engine::notifier). The eventfd of the engine is registered with the ring, and
//! under `DEFER_TASKRUN` the kernel writes it as soon as something is ready to be posted, before
//! anybody enters; so an epoll loop needs no thread and misses nothing. But the kernel writes it
//! again when the completions are posted, and a poll of that eventfd inside the same ring would then
//! complete through its own completions, over and over. The two kinds of sleep therefore exclude
//! each other:
//!
//! - Until somebody asks for [`notifier`](Engine::notifier), nobody can sleep on it, and the ring's
//!   writes to it are switched off (`IORING_CQ_EVENTFD_DISABLED`). `wait` sleeps in the ring, with
//!   one poll of the eventfd armed that only another thread's write, through
//!   [`waker`](Engine::waker), can fire. A cycle of submitting and waiting is one system call.
//! - Once `notifier` was called, the kernel writes the eventfd for completions, no poll of it is
//!   armed any more, and `wait` submits and sleeps in `poll(2)` on it. `reap` clears it only when it
//!   found nothing, and then looks once more: what came before clearing is seen by that look, what
//!   comes after makes the eventfd readable again.
//!
//! # Which files go through the ring
//! Files on disk file systems and block devices do, with direct I/O or through the page cache: the
//! ring tries by itself without waiting before it hands an operation to one of its workers. Files on
//! tmpfs and ramfs do not: their file systems cannot try, so the ring would hand every operation to
//! a worker at five to ten times the cost of copying the bytes. Their operations are done in
//! [`start`](Engine::start), where nothing but swapping can make them wait. Writes through the page
//! cache of a file system that cannot try them go to a thread beside the ring, a batch at a time
//! ([`uring_writer`](super::uring_writer)). A page-cached read that is alone in its batch is tried
//! without the ring first ([`uring_lone`](super::uring_lone)), unless somebody sleeps on the notifier:
//! telling them would cost what it saves.
//!
//! # What the kernel owns
//! An operation occupies a slot from `start` until its completion was reaped; slots bound the
//! operations in flight below the size of the completion queue. Dropping the engine waits for every
//! operation on a file: it may use memory, or change what somebody else writes next. Watches and
//! timers are abandoned to the kernel.

mod beside;

use std::{
    cell::Cell,
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, squeue, types};

use super::{
    Engine, EngineFile, EngineKind, HostFile, HostOp, Started, Token,
    sys::{self, FileTable, Notifier},
    uring_entry::{Kind, MAX_TIMEOUT, Target, entry},
    uring_lone::LoneReads,
    uring_memory::RegisteredMemory,
    uring_setup,
    uring_writer::Writer,
};
use crate::{Error, Result};

/// The user data of the engine's own poll of its notifier.
const WAKE: u64 = u64::MAX;

/// Attempts to submit when the kernel is out of memory and nothing is in flight that could free it.
const SUBMIT_ATTEMPTS: u32 = 1000;

/// How an io_uring engine works.
#[derive(Clone, Copy, Debug, Default)]
pub struct UringOptions {
    /// How long `wait` looks for completions before it sleeps: a processor for a shorter latency.
    pub spin: Duration,
    /// Poll the device for completions (`IORING_SETUP_IOPOLL`). Not supported yet; creating the
    /// engine fails.
    pub polled: bool,
    /// Use only what Linux 5.6 has: no deferred task work, no file table, no sleep in the ring.
    pub compatible: bool,
}

/// A write that need not be durable when it ends. One that must be waits for the disk, and would
/// hold up all others of the thread that makes it: the kernel has a worker for each of those.
fn is_plain_write(op: &HostOp<'_>) -> bool {
    matches!(op, HostOp::Write { dsync: false, .. })
}

/// An operation in flight.
struct Slot {
    token: Token,
    kind: Kind,
    /// Where the kernel reads a timer's duration.
    timeout: types::Timespec,
}

/// The io_uring engine. It belongs to the thread that made it.
pub struct UringEngine {
    ring: IoUring,
    files: FileTable,
    /// Entries of the ring's file table; 0 when the kernel refused one.
    table: u32,
    /// Which of them are in use.
    fixed: Vec<bool>,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Operations in flight that must end before the engine does.
    unfinished: usize,
    memory: RegisteredMemory,
    notifier: Arc<Notifier>,
    /// For writes that the ring cannot try; started with the first file that has such.
    writer: Option<Writer>,
    lone: LoneReads,
    /// Operations in the submission queue, but for watches: a read may be held when there is none.
    batch: usize,
    /// What was done beside the ring, on its way to the caller.
    beside: Vec<(u32, i32)>,
    /// Somebody may sleep on the notifier.
    announced: Cell<bool>,
    /// The engine's own poll of the notifier is in the ring.
    wake_armed: bool,
    options: UringOptions,
    _on_one_thread: PhantomData<*const ()>,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine")
            .field("in_flight", &(self.slots.len() - self.free.len()))
            .field("announced", &self.announced.get())
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// A ring for the calling thread that holds `depth` operations.
    ///
    /// # Errors
    /// When the kernel has no ring to give; the message says what is missing.
    pub fn new(depth: u32, options: UringOptions) -> Result<Self> {
        if options.polled {
            return Err(Error::unsupported(
                "io_uring: polled completions are not supported; use the spin option",
            ));
        }
        let depth = depth.clamp(1, 1 << 14);
        let ring = uring_setup::ring(depth, options.compatible)?;
        let notifier =
            Arc::new(Notifier::new().map_err(|e| Error::from(e).operation("create eventfd"))?);
        let table = if options.compatible {
            0
        } else {
            uring_setup::register_file_table(&ring)
        };
        ring.submitter()
            .register_eventfd(notifier.as_raw_fd())
            .map_err(|error| Error::from(error).operation("register eventfd with io_uring"))?;
        let mut engine = Self {
            // Without a timeout in `io_uring_enter` (before Linux 5.11) `wait` needs the eventfd.
            announced: Cell::new(options.compatible || !ring.params().is_feature_ext_arg()),
            ring,
            files: FileTable::default(),
            table,
            fixed: vec![false; table as usize],
            slots: (0..depth)
                .map(|_| Slot {
                    token: Token(0),
                    kind: Kind::File,
                    timeout: types::Timespec::new(),
                })
                .collect(),
            free: (0..depth).rev().collect(),
            unfinished: 0,
            memory: RegisteredMemory::default(),
            notifier,
            writer: None,
            lone: LoneReads::new(depth as usize),
            batch: 0,
            beside: Vec::with_capacity(depth as usize),
            wake_armed: false,
            options,
            _on_one_thread: PhantomData,
        };
        if !engine.announced.get() {
            engine.ring.completion().disable_eventfd();
        }
        Ok(engine)
    }

    /// Whether the kernel has completions that only an enter brings into the completion queue.
    fn owes_completions(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Puts an entry into the submission queue; `false` when it is full even after submitting.
    ///
    /// # Safety
    /// What the entry points to stays valid until its completion was reaped.
    #[inline(always)]
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller vouches for the entry.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return true;
        }
        // SAFETY: the caller vouches for the entry.
        self.submit().is_ok() && unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// [`push`](Self::push) for the entry of an operation; an engine result when there is none.
    ///
    /// # Safety
    /// As for [`Engine::start`].
    unsafe fn push_operation(
        &mut self,
        op: &HostOp<'_>,
        index: u32,
        target: Target,
    ) -> std::result::Result<bool, i32> {
        let user_data = u64::from(index);
        let place = &mut self.slots[index as usize].timeout;
        let entry = entry(op, target, &self.memory, place)?;
        // SAFETY: the caller keeps segments and memory, the slot a timer's duration.
        Ok(unsafe { self.push(&entry.user_data(user_data)) })
    }

    /// Takes what is in the completion queue; returns how many operations ended.
    fn drain(&mut self, out: &mut Vec<(Token, i32)>) -> usize {
        let mut ended = self.drain_beside(out);
        let mut woken = false;
        for completion in self.ring.completion() {
            if completion.user_data() == WAKE {
                woken = true;
                continue;
            }
            let index = completion.user_data() as u32;
            let slot = &self.slots[index as usize];
            let result = match (slot.kind, completion.result()) {
                (Kind::Timer, result) if result == -libc::ETIME => 0,
                (Kind::Watch, result) if result > 0 => 0,
                (_, result) => result,
            };
            if slot.kind == Kind::File {
                self.unfinished -= 1;
            }
            out.push((slot.token, result));
            self.free.push(index);
            ended += 1;
        }
        if woken {
            self.wake_armed = false;
            // In the announced mode `reap` clears it, once it has found nothing more.
            if !self.announced.get() {
                self.notifier.clear();
            }
        }
        ended
    }

    /// Enters the kernel for completions that it has not posted yet.
    fn collect(&mut self) {
        // Whatever is wrong shows again in `submit` and `wait`, which can say so.
        let _ = self.ring.submitter().submit();
    }

    /// Looks for completions for a while; whether there are any.
    fn spin(&mut self, timeout: Option<Duration>) -> bool {
        let limit = timeout.map_or(self.options.spin, |timeout| self.options.spin.min(timeout));
        if limit.is_zero() {
            return false;
        }
        let end = Instant::now() + limit;
        loop {
            if self.completions_at_hand() || self.owes_completions() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Sleeps in the ring.
    fn wait_in_ring(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.wake_armed {
            let poll =
                opcode::PollAdd::new(types::Fd(self.notifier.as_raw_fd()), libc::POLLIN as u32)
                    .build()
                    .user_data(WAKE);
            // SAFETY: the entry points to no memory.
            self.wake_armed = unsafe { self.push(&poll) };
        }
        let timeout = timeout.map(|timeout| types::Timespec::from(timeout.min(MAX_TIMEOUT)));
        let mut arguments = types::SubmitArgs::new();
        if let Some(timeout) = &timeout {
            arguments = arguments.timespec(timeout);
        }
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                // Something has to be reaped first, or memory is short.
                Some(libc::EBUSY | libc::EAGAIN) => {
                    std::thread::yield_now();
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }
}

impl Engine for UringEngine {
    fn name(&self) -> &'static str {
        EngineKind::IoUring.name()
    }

    fn register(&mut self, file: &Arc<HostFile>) -> Result<EngineFile> {
        let fd = sys::require_os(file, self.name())?;
        let index = self.files.insert(file);
        if self.writer.is_none()
            && self
                .files
                .get(index)
                .is_some_and(|file| file.waits_to_write)
        {
            match Writer::new(&self.notifier, self.slots.len()) {
                Ok(writer) => self.writer = Some(writer),
                Err(error) => {
                    self.files.remove(index);
                    return Err(Error::from(error).operation("start thread"));
                }
            }
        }
        if index.0 < self.table {
            let update = self.ring.submitter().register_files_update(index.0, &[fd]);
            self.fixed[index.0 as usize] = matches!(update, Ok(1));
        }
        Ok(index)
    }

    fn unregister(&mut self, file: EngineFile) {
        if let Some(fixed) = self.fixed.get_mut(file.0 as usize)
            && std::mem::take(fixed)
            && let Err(error) = self.ring.submitter().register_files_update(file.0, &[-1])
        {
            // The entry is overwritten when the index is used again.
            tracing::warn!(%error, "io_uring keeps an unregistered file open");
        }
        self.files.remove(file);
    }

    unsafe fn register_memory(&mut self, regions: &[(*mut u8, usize)]) -> bool {
        // SAFETY: the caller vouches for the memory until it is replaced or the engine is gone.
        unsafe { self.memory.register(&self.ring.submitter(), regions) }
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        let target = match op {
            HostOp::Read { file, .. }
            | HostOp::Write { file, .. }
            | HostOp::Sync { file }
            | HostOp::Fallocate { file, .. } => match self.files.get(file) {
                None => return Started::Done(-libc::EBADF),
                Some(known) if known.in_memory => {
                    // SAFETY: the caller vouches for the memory.
                    return Started::Done(unsafe { sys::perform(&self.files, &op) });
                }
                Some(known) if known.waits_to_write && is_plain_write(&op) => {
                    // SAFETY: the caller keeps segments and memory.
                    return unsafe { self.start_on_writer(token, &op) };
                }
                Some(known) if self.fixed.get(file.0 as usize) == Some(&true) => Target {
                    fd: file.0 as RawFd,
                    unit: known.unit,
                    flags: squeue::Flags::FIXED_FILE,
                },
                Some(known) => Target {
                    fd: known.fd,
                    unit: known.unit,
                    flags: squeue::Flags::empty(),
                },
            },
            HostOp::Timer { .. } | HostOp::PollReadable { .. } => Target {
                fd: -1,
                unit: 1,
                flags: squeue::Flags::empty(),
            },
        };
        let Some(index) = self.free.pop() else {
            return Started::Full;
        };
        let kind = Kind::of(&op);
        if kind != Kind::Watch
            && let Some(read) = self.lone.take_held()
        {
            self.push_lone(&read);
        }
        // SAFETY: the caller keeps segments and memory.
        if !unsafe { self.hold(&op, index, target) } {
            // SAFETY: as above, and the slot keeps a timer's duration.
            match unsafe { self.push_operation(&op, index, target) } {
                Ok(true) => {}
                Ok(false) => {
                    self.free.push(index);
                    return Started::Full;
                }
                Err(result) => {
                    self.free.push(index);
                    return Started::Done(result);
                }
            }
            if kind != Kind::Watch {
                self.batch += 1;
            }
        }
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.kind = kind;
        if kind == Kind::File {
            self.unfinished += 1;
        }
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        self.submit_beside();
        self.batch = 0;
        let mut attempts = 0;
        loop {
            let queued = self.ring.submission().len();
            if queued == 0 {
                return Ok(());
            }
            let error = match self.ring.submitter().submit() {
                Ok(0) => io::Error::from_raw_os_error(libc::EAGAIN),
                Ok(_) => continue,
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // With operations in flight, their completions let the caller try again.
                Some(libc::EAGAIN | libc::EBUSY)
                    if attempts < SUBMIT_ATTEMPTS
                        && self.slots.len() - self.free.len() <= queued =>
                {
                    attempts += 1;
                    std::thread::yield_now();
                }
                _ => return Err(error),
            }
        }
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        // What was started since the last submission is known by now.
        if let Some(read) = self.lone.try_held() {
            self.push_lone(&read);
        }
        let mut ended = self.drain(out);
        let announced = self.announced.get();
        if ended > 0 && !announced {
            // What ended meanwhile makes the next batch larger, and the device is rung less often.
            if self.owes_completions() {
                self.collect();
                self.drain(out);
            }
            return;
        }
        let mut cleared = false;
        loop {
            // One enter posts a limited number of completions and says if there are more. The flag
            // alone is no promise: the kernel may set it after the work it announces has run, and
            // then nothing clears it before there is work again.
            while self.owes_completions() {
                self.collect();
                let posted = self.drain(out);
                if posted == 0 {
                    break;
                }
                ended += posted;
            }
            ended += self.drain(out);
            if ended > 0 || cleared || !announced {
                return;
            }
            self.notifier.clear();
            cleared = true;
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.submit_beside();
        if self.completions_at_hand() {
            return self.submit();
        }
        self.batch = 0;
        if !self.options.spin.is_zero() {
            self.submit()?;
            if self.spin(timeout) {
                return Ok(());
            }
        }
        if !self.announced.get() {
            return self.wait_in_ring(timeout);
        }
        let timeout = sys::try_again_soon(self.submit(), timeout)?;
        if self.completions_at_hand() || self.owes_completions() {
            return Ok(());
        }
        sys::poll(&mut [sys::readable(self.notifier.as_raw_fd())], timeout)
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        if !self.announced.replace(true) {
            // SAFETY: no other handle of the completion queue exists: they live inside the methods
            // that take `&mut self`.
            let queue = unsafe { self.ring.completion_shared() };
            queue.enable_eventfd();
            drop(queue);
            // What completed before was not announced.
            self.notifier.signal();
        }
        self.notifier.as_fd()
    }

    fn waker(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        let mut out = Vec::new();
        let mut reported = false;
        // Nobody sleeps on the notifier of an engine that is going away; see the module's text for
        // why the ring must not write it while it polls it.
        self.announced.set(false);
        self.ring.completion().disable_eventfd();
        self.submit_beside();
        while self.unfinished > 0 {
            // The kernel may still write to memory of others: there is no way on but waiting.
            if !self.completions_at_hand()
                && let Err(error) = self.wait_in_ring(None)
            {
                if !std::mem::replace(&mut reported, true) {
                    tracing::error!(%error, "io_uring: cannot wait for operations in flight");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            while self.owes_completions() {
                self.collect();
                self.drain(&mut out);
            }
            self.drain(&mut out);
        }
        // The kernel takes a ring apart in the background. Files are given back here, so that their
        // locks are gone when this returns.
        if self.fixed.contains(&true) {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}
