//! The driver of one thread: operations in flight, tasks, and the turn that moves them on.
//!
//! Above every engine, and once for all of them, it continues short transfers, retries interrupted
//! ones, applies back-pressure, keeps what the kernel uses alive, and wakes whoever waits.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    pin::{Pin, pin},
    ptr,
    rc::{Rc, Weak},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use super::{
    AlignedBuf, Engine, EngineFile, FallocateMode, HostOp, MemoryRegions, Segments, Started, Token,
    buffers,
    slab::{Key, Slab},
};
use crate::sync::lock;
use crate::{Error, ErrorKind, Result, sync::LocalFuture};

/// Retries of one operation that was interrupted without progress before it is given up.
const MAX_INTERRUPTIONS: u32 = 10_000;

/// What a read does at the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Eof {
    /// What is missing reads as zeroes: data clusters and backing images.
    Zeroes,
    /// What is missing is an error: tables, and raw data inside the declared size.
    Error,
}

/// What an operation does, with what is needed to go on after a short transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OpKind {
    Read { eof: Eof },
    Write { dsync: bool },
    Sync,
    Fallocate { mode: FallocateMode, len: u64 },
    Timer { after: Duration },
    PollReadable { fd: i32 },
}

/// Who waits for an operation.
pub(crate) enum Owner {
    /// A future; its waker once it was polled.
    Future(Option<Waker>),
    /// A request that hit the map: queue and slot.
    Request { queue: Key, slot: Key },
    /// A watch of a queue.
    Watch { queue: Key, id: u64 },
    /// Nobody any more; the operation still owns its buffer.
    Detached,
}

/// An operation to start.
pub(crate) struct NewOp {
    pub(crate) kind: OpKind,
    pub(crate) file: EngineFile,
    pub(crate) offset: u64,
    pub(crate) segments: Segments,
    /// The unit that direct I/O on the file moves; 1 for buffered.
    pub(crate) unit: u32,
    /// Memory of the segments, where the operation owns it.
    pub(crate) buffer: Option<AlignedBuf>,
}

struct Op {
    new: NewOp,
    total: u64,
    done: u64,
    interruptions: u32,
    owner: Owner,
    result: Option<Result<(), ErrorKind>>,
}

/// Receives the end of operations that requests started without a task.
pub(crate) trait RequestSink {
    /// An operation of the request in `slot` ended.
    fn operation_ended(&self, slot: Key, result: Result<(), ErrorKind>);
    /// A watched descriptor became readable, or could not be watched.
    fn watch_fired(&self, id: u64, result: Result<(), ErrorKind>);
}

/// Tasks to poll, pushed from any thread.
struct WakeQueue {
    list: Mutex<Vec<Key>>,
    signalled: AtomicBool,
    notifier: OwnedFd,
}

thread_local! {
    /// The wake queue whose turn runs on this thread: it needs no signal.
    static CURRENT: Cell<*const WakeQueue> = const { Cell::new(ptr::null()) };
}

impl WakeQueue {
    fn signal(&self) {
        if CURRENT.get() == ptr::from_ref(self) || self.signalled.swap(true, Ordering::AcqRel) {
            return;
        }
        super::fsinfo::write_eventfd(self.notifier.as_raw_fd());
    }
}

struct TaskWaker {
    key: Key,
    /// The task is listed and was not polled since: however many wake it, it is polled once.
    listed: AtomicBool,
    queue: Arc<WakeQueue>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.listed.swap(true, Ordering::AcqRel) {
            return;
        }
        lock(&self.queue.list).push(self.key);
        self.queue.signal();
    }
}

struct RootWaker {
    woken: AtomicBool,
    queue: Arc<WakeQueue>,
}

impl Wake for RootWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.queue.signal();
    }
}

struct Task {
    /// `None` while it is being polled.
    future: Option<LocalFuture<'static, ()>>,
    waker: Arc<TaskWaker>,
}

/// Everything that one thread drives with one engine.
pub(crate) struct Driver {
    engine: RefCell<Box<dyn Engine>>,
    synchronous: bool,
    simulated: bool,
    // Boxed: the engine is given addresses inside an operation, which must stay.
    ops: RefCell<Slab<Box<Op>>>,
    #[expect(clippy::vec_box, reason = "the boxes are what is kept")]
    spare: RefCell<Vec<Box<Op>>>,
    backlog: RefCell<VecDeque<Key>>,
    unsubmitted: Cell<bool>,
    /// Somebody may sleep on the notifier.
    notifying: Cell<bool>,
    /// Completions that no queue was given yet.
    undelivered: Cell<usize>,
    finished: RefCell<Vec<(Token, i32)>>,
    tasks: RefCell<Slab<Task>>,
    wakes: Arc<WakeQueue>,
    woken: RefCell<Vec<Key>>,
    queues: RefCell<Slab<Weak<dyn RequestSink>>>,
    /// What the engine has registered stays mapped. Dropped after the engine.
    memory: RefCell<Option<MemoryRegions>>,
}

/// Operations kept for reuse.
const MAX_SPARE: usize = 1024;

impl Driver {
    /// A driver over an engine, on the thread that made the engine.
    pub(crate) fn new(engine: Box<dyn Engine>) -> Result<Rc<Self>> {
        // Only who asks for the notifier itself makes the engine write it for every completion.
        let notifier = engine
            .waker()
            .try_clone_to_owned()
            .map_err(|error| Error::from(error).operation("duplicate notifier"))?;
        Ok(Rc::new(Self {
            synchronous: engine.is_synchronous(),
            simulated: engine.is_simulated(),
            engine: RefCell::new(engine),
            ops: RefCell::default(),
            spare: RefCell::default(),
            backlog: RefCell::default(),
            unsubmitted: Cell::new(false),
            notifying: Cell::new(false),
            undelivered: Cell::new(0),
            finished: RefCell::default(),
            tasks: RefCell::default(),
            wakes: Arc::new(WakeQueue {
                list: Mutex::default(),
                signalled: AtomicBool::new(false),
                notifier,
            }),
            woken: RefCell::default(),
            queues: RefCell::default(),
            memory: RefCell::default(),
        }))
    }

    /// Whether operations are done when they start, and pool work runs inline.
    pub(crate) fn is_synchronous(&self) -> bool {
        self.synchronous
    }

    /// Whether blocking work runs inline and only its completion is scheduled.
    pub(crate) fn is_simulated(&self) -> bool {
        self.simulated
    }

    /// Makes a file known to the engine.
    pub(crate) fn register(&self, file: &Arc<super::HostFile>) -> Result<EngineFile> {
        self.engine.borrow_mut().register(file)
    }

    /// Forgets a file of the engine.
    pub(crate) fn unregister(&self, file: EngineFile) {
        self.engine.borrow_mut().unregister(file);
    }

    /// Registers memory with the engine instead of what was registered before; whether it did.
    pub(crate) fn register_memory(&self, memory: MemoryRegions) -> bool {
        // SAFETY: the regions stay mapped while `self.memory` holds them: until they are replaced
        // in the engine, or past its end.
        let registered = unsafe { self.engine.borrow_mut().register_memory(memory.as_slice()) };
        self.memory.replace(registered.then_some(memory));
        registered
    }

    /// A key for a queue whose requests start operations directly.
    pub(crate) fn add_queue(&self, sink: Weak<dyn RequestSink>) -> Key {
        self.queues.borrow_mut().insert(sink)
    }

    /// Forgets a queue; it has nothing in flight but watches, which then fire for nobody.
    pub(crate) fn remove_queue(&self, queue: Key) {
        self.queues.borrow_mut().remove(queue);
    }

    /// The descriptor that becomes readable when a [`turn`](Self::turn) is due. It lives as long as
    /// the driver. From the first call on, completions are signalled to it.
    pub(crate) fn notifier(&self) -> BorrowedFd<'_> {
        if !self.notifying.replace(true) {
            // What was held back for `wait` might never see one.
            self.submit();
            let engine = self.engine.borrow();
            let _ = engine.notifier();
        }
        self.wakes.notifier.as_fd()
    }

    /// Completions were put aside for a queue.
    pub(crate) fn undelivered(&self, completions: usize) {
        self.undelivered.set(self.undelivered.get() + completions);
    }

    /// A queue was given completions. Others of this thread may have some too, found in the same
    /// turn: they share the notifier, so it stays readable.
    pub(crate) fn delivered(&self, completions: usize) {
        let left = self.undelivered.get().saturating_sub(completions);
        self.undelivered.set(left);
        if left > 0 {
            self.notify();
        }
    }

    /// Makes the notifier readable, if somebody asked for it.
    pub(crate) fn notify(&self) {
        if self.notifying.get() {
            super::fsinfo::write_eventfd(self.wakes.notifier.as_raw_fd());
        }
    }

    /// Starts an operation. Its memory must stay valid until it ended: it is either the operation's
    /// own buffer, or the owner keeps it (a request its buffers; [`OpFuture`] waits when dropped).
    pub(crate) fn start(&self, new: NewOp, owner: Owner) -> Key {
        let total = new
            .segments
            .iter()
            .map(|segment| segment.len() as u64)
            .sum();
        let spare = self.spare.borrow_mut().pop();
        let boxed = match spare {
            Some(mut op) => {
                // Field by field: an operation is large, and this way it is copied once.
                op.new = new;
                op.total = total;
                op.done = 0;
                op.interruptions = 0;
                op.owner = owner;
                op.result = None;
                op
            }
            None => Box::new(Op {
                new,
                total,
                done: 0,
                interruptions: 0,
                owner,
                result: None,
            }),
        };
        let key = self.ops.borrow_mut().insert(boxed);
        if self.backlog.borrow().is_empty() {
            if !self.try_start(key) {
                self.backlog.borrow_mut().push_back(key);
            }
        } else {
            self.backlog.borrow_mut().push_back(key);
        }
        key
    }

    /// Starts or continues an operation; `false` when the engine has no room.
    fn try_start(&self, key: Key) -> bool {
        loop {
            let started = {
                let mut ops = self.ops.borrow_mut();
                let Some(op) = ops.get_mut(key) else {
                    return true;
                };
                let file = op.new.file;
                let offset = op.new.offset.wrapping_add(op.done);
                let host_op = match op.new.kind {
                    OpKind::Read { .. } => HostOp::Read {
                        file,
                        offset,
                        segments: &op.new.segments,
                    },
                    OpKind::Write { dsync } => HostOp::Write {
                        file,
                        offset,
                        segments: &op.new.segments,
                        dsync,
                    },
                    OpKind::Sync => HostOp::Sync { file },
                    OpKind::Fallocate { mode, len } => HostOp::Fallocate {
                        file,
                        mode,
                        offset,
                        len,
                    },
                    OpKind::Timer { after } => HostOp::Timer { after },
                    OpKind::PollReadable { fd } => HostOp::PollReadable { fd },
                };
                // SAFETY: the operation is boxed and stays in the slab until the engine reported
                // it; it owns its buffer, or its owner keeps the memory until then.
                unsafe { self.engine.borrow_mut().start(Token(key.to_u64()), host_op) }
            };
            match started {
                Started::Full => return false,
                Started::Pending => {
                    self.unsubmitted.set(true);
                    return true;
                }
                Started::Done(result) => {
                    if self.account(key, result) {
                        return true;
                    }
                }
            }
        }
    }

    /// Takes note of an engine's result; `false` when the operation must be started again.
    fn account(&self, key: Key, raw: i32) -> bool {
        let mut ops = self.ops.borrow_mut();
        let Some(op) = ops.get_mut(key) else {
            debug_assert!(false, "the engine reported an operation twice");
            return true;
        };
        let Some(result) = advance(op, raw) else {
            return false;
        };
        match std::mem::replace(&mut op.owner, Owner::Detached) {
            Owner::Future(waker) => {
                op.result = Some(result);
                op.owner = Owner::Future(None);
                drop(ops);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Owner::Request { queue, slot } => {
                let op = ops.remove(key);
                drop(ops);
                self.recycle(op);
                self.with_queue(queue, |sink| sink.operation_ended(slot, result));
            }
            Owner::Watch { queue, id } => {
                let op = ops.remove(key);
                drop(ops);
                self.recycle(op);
                self.with_queue(queue, |sink| sink.watch_fired(id, result));
            }
            Owner::Detached => {
                let op = ops.remove(key);
                drop(ops);
                self.recycle(op);
            }
        }
        true
    }

    fn with_queue(&self, queue: Key, act: impl FnOnce(&dyn RequestSink)) {
        let sink = self
            .queues
            .borrow_mut()
            .get_mut(queue)
            .and_then(|sink| sink.upgrade());
        if let Some(sink) = sink {
            act(&*sink);
        }
    }

    fn recycle(&self, op: Option<Box<Op>>) {
        let Some(mut op) = op else { return };
        op.new.buffer = None;
        op.owner = Owner::Detached;
        let mut spare = self.spare.borrow_mut();
        if spare.len() < MAX_SPARE {
            spare.push(op);
        }
    }

    /// Starts an operation and returns the future of its end, which gives back the buffer that the
    /// operation owned.
    pub(crate) fn operation(self: &Rc<Self>, new: NewOp) -> OpFuture {
        let key = self.start(new, Owner::Future(None));
        OpFuture {
            driver: Rc::clone(self),
            key: Some(key),
        }
    }

    /// Starts a task and runs it as far as it gets.
    pub(crate) fn spawn(&self, future: LocalFuture<'static, ()>) {
        let mut tasks = self.tasks.borrow_mut();
        let key = tasks.insert_with(|key| Task {
            future: Some(future),
            waker: Arc::new(TaskWaker {
                key,
                listed: AtomicBool::new(false),
                queue: Arc::clone(&self.wakes),
            }),
        });
        drop(tasks);
        self.poll_task(key);
    }

    fn poll_task(&self, key: Key) {
        let Some((mut future, waker)) = self.tasks.borrow_mut().get_mut(key).and_then(|task| {
            // From here on a wake-up means one more poll.
            task.waker.listed.swap(false, Ordering::AcqRel);
            let future = task.future.take()?;
            Some((future, Arc::clone(&task.waker)))
        }) else {
            return;
        };
        let waker = Waker::from(waker);
        let ready = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        if ready {
            let task = self.tasks.borrow_mut().remove(key);
            drop((task, future));
        } else if let Some(task) = self.tasks.borrow_mut().get_mut(key) {
            task.future = Some(future);
        }
    }

    /// Hands held-back operations to the host.
    pub(crate) fn submit(&self) {
        if !self.unsubmitted.replace(false) {
            return;
        }
        if let Err(error) = self.engine.borrow_mut().submit() {
            tracing::warn!(%error, "submission failed; it is tried again");
            self.unsubmitted.set(true);
        }
    }

    /// Whether somebody may sleep on the notifier, outside of [`wait`](Self::wait).
    pub(crate) fn is_notifying(&self) -> bool {
        self.notifying.get()
    }

    /// Whether [`wait`](Self::wait) can hand what is held back to the host and sleep with one system
    /// call, without a [`turn`](Self::turn) before.
    pub(crate) fn can_submit_and_wait(&self) -> bool {
        self.unsubmitted.get() && !self.notifying.get() && self.backlog.borrow().is_empty()
    }

    /// Moves everything on as far as it gets without waiting.
    pub(crate) fn turn(&self) {
        self.submit();
        self.turn_plugged();
    }

    /// A [`turn`](Self::turn) that leaves what is held back until the next one, unless there is more.
    pub(crate) fn turn_plugged(&self) {
        let before = CURRENT.replace(Arc::as_ptr(&self.wakes));
        loop {
            let mut finished = self.finished.take();
            self.engine.borrow_mut().reap(&mut finished);
            let mut progress = !finished.is_empty();
            for (token, raw) in finished.drain(..) {
                let key = Key::from_u64(token.0);
                if !self.account(key, raw) && !self.try_start(key) {
                    self.backlog.borrow_mut().push_back(key);
                }
            }
            self.finished.replace(finished);
            progress |= self.start_backlog();
            progress |= self.run_woken();
            if !progress {
                break;
            }
            self.submit();
        }
        CURRENT.set(before);
    }

    fn start_backlog(&self) -> bool {
        let mut progress = false;
        loop {
            let Some(key) = self.backlog.borrow_mut().pop_front() else {
                return progress;
            };
            if !self.try_start(key) {
                self.backlog.borrow_mut().push_front(key);
                return progress;
            }
            progress = true;
        }
    }

    fn run_woken(&self) -> bool {
        self.wakes.signalled.store(false, Ordering::Release);
        let mut woken = self.woken.take();
        std::mem::swap(&mut woken, &mut *lock(&self.wakes.list));
        let any = !woken.is_empty();
        for key in woken.drain(..) {
            self.poll_task(key);
        }
        self.woken.replace(woken);
        any
    }

    /// Blocks until there may be something for a [`turn`](Self::turn), or `timeout` has passed.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        if !lock(&self.wakes.list).is_empty() {
            return Ok(());
        }
        self.unsubmitted.set(false);
        self.engine
            .borrow_mut()
            .wait(timeout)
            .map_err(|error| Error::from(error).operation("wait for completions"))
    }

    /// Runs a future on the calling thread until it ends, moving everything else of this driver on
    /// meanwhile.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> Result<F::Output> {
        let root = Arc::new(RootWaker {
            woken: AtomicBool::new(true),
            queue: Arc::clone(&self.wakes),
        });
        let waker = Waker::from(Arc::clone(&root));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if root.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return Ok(output);
            }
            self.turn();
            if !root.woken.load(Ordering::Acquire) {
                self.wait(None)?;
                self.turn();
            }
        }
    }

    /// Operations in flight.
    pub(crate) fn operations(&self) -> usize {
        self.ops.borrow().len()
    }
}

/// Takes an engine's result into account; `None` when the operation must go on.
fn advance(op: &mut Op, raw: i32) -> Option<Result<(), ErrorKind>> {
    let Ok(moved) = u32::try_from(raw) else {
        let errno = raw.wrapping_neg();
        if (errno == libc::EINTR || errno == libc::EAGAIN) && op.interruptions < MAX_INTERRUPTIONS {
            op.interruptions += 1;
            return None;
        }
        // A timer that ran out says so with an error.
        if matches!(op.new.kind, OpKind::Timer { .. }) && errno == libc::ETIME {
            return Some(Ok(()));
        }
        return Some(Err(ErrorKind::from_errno(errno)));
    };
    let eof = match op.new.kind {
        OpKind::Read { eof } => Some(eof),
        OpKind::Write { .. } => None,
        _ => return Some(Ok(())),
    };
    op.done += u64::from(moved);
    if op.done >= op.total {
        return Some(Ok(()));
    }
    // Direct I/O that stopped inside a unit has met the end of the file.
    let at_end = moved == 0 || !op.done.is_multiple_of(u64::from(op.new.unit.max(1)));
    buffers::advance(&mut op.new.segments, u64::from(moved));
    match eof {
        Some(Eof::Zeroes) if at_end => {
            buffers::zero(&op.new.segments);
            Some(Ok(()))
        }
        Some(Eof::Error) if at_end => Some(Err(ErrorKind::ShortTransfer)),
        None if moved == 0 => Some(Err(ErrorKind::Io(libc::EIO))),
        _ => None,
    }
}

/// The end of an operation. Dropping it before that waits for the operation, unless the operation
/// owns its buffer: then it ends by itself.
pub(crate) struct OpFuture {
    driver: Rc<Driver>,
    key: Option<Key>,
}

impl Future for OpFuture {
    type Output = (Result<(), ErrorKind>, Option<AlignedBuf>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(key) = self.key else {
            return Poll::Ready((Err(ErrorKind::Cancelled), None));
        };
        let mut ops = self.driver.ops.borrow_mut();
        let Some(op) = ops.get_mut(key) else {
            return Poll::Ready((Err(ErrorKind::Cancelled), None));
        };
        let Some(result) = op.result else {
            match &mut op.owner {
                Owner::Future(Some(waker)) => waker.clone_from(context.waker()),
                owner => *owner = Owner::Future(Some(context.waker().clone())),
            }
            return Poll::Pending;
        };
        let buffer = op.new.buffer.take();
        let op = ops.remove(key);
        drop(ops);
        self.driver.recycle(op);
        self.key = None;
        Poll::Ready((result, buffer))
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        loop {
            {
                let mut ops = self.driver.ops.borrow_mut();
                let Some(op) = ops.get_mut(key) else { return };
                if op.result.is_some() {
                    let op = ops.remove(key);
                    drop(ops);
                    self.driver.recycle(op);
                    return;
                }
                if op.new.buffer.is_some() || op.new.segments.is_empty() {
                    op.owner = Owner::Detached;
                    return;
                }
            }
            self.driver.collect_only();
        }
    }
}

impl Driver {
    /// Waits for operations without running tasks: for a future that is dropped inside one.
    fn collect_only(&self) {
        self.submit();
        if let Err(error) = self.engine.borrow_mut().wait(None) {
            tracing::error!(%error, "cannot wait for operations in flight");
        }
        let mut finished = Vec::new();
        self.engine.borrow_mut().reap(&mut finished);
        for (token, raw) in finished {
            let key = Key::from_u64(token.0);
            if !self.account(key, raw) && !self.try_start(key) {
                self.backlog.borrow_mut().push_back(key);
            }
        }
        self.start_backlog();
    }
}
