//! The driver of one thread: operations in flight, tasks, and the turn that moves them on.
//!
//! Above every engine, and once for all of them, it continues short transfers, retries interrupted
//! ones, applies back-pressure, keeps what the kernel uses alive, and wakes whoever waits.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    pin::{Pin, pin},
    rc::{Rc, Weak},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use super::{
    AlignedBuf, Engine, EngineFile, MemoryRegions, Started, Token,
    operation::{NewOp, Op, Owner, RequestSink, Transfer},
    pool::{Helper, Helping, Pool},
    slab::{Key, Slab},
    wake::{CURRENT, RootWaker, TaskWaker, WakeQueue},
};
use crate::sync::lock;
use crate::{Error, ErrorKind, Result, sync::LocalFuture};

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
    /// A pool that may have short work of this driver's, and whether there is one.
    helped: RefCell<Option<Helping>>,
    has_short_work: Cell<bool>,
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
            helped: RefCell::default(),
            has_short_work: Cell::new(false),
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

    /// Whether a queue has completions that it was not given yet.
    pub(crate) fn has_undelivered(&self) -> bool {
        self.undelivered.get() > 0
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
        let spare = self.spare.borrow_mut().pop();
        let boxed = match spare {
            Some(mut op) => {
                op.renew(new, owner);
                op
            }
            None => Box::new(Op::new(new, owner)),
        };
        let key = self.ops.borrow_mut().insert(boxed);
        self.launch(key);
        key
    }

    /// The first half of [`start`](Self::start) for a transfer; [`launch`](Self::launch) is the second.
    pub(crate) fn prepare(&self, transfer: &Transfer<'_>, owner: Owner) -> Key {
        let spare = self.spare.borrow_mut().pop();
        let boxed = match spare {
            Some(mut op) => {
                op.renew_transfer(transfer, owner);
                op
            }
            None => Box::new(Op::transfer(transfer, owner)),
        };
        self.ops.borrow_mut().insert(boxed)
    }

    /// Starts what was prepared, or puts it behind what the engine had no room for. It may end at once.
    pub(crate) fn launch(&self, key: Key) {
        if !self.backlog.borrow().is_empty() || !self.try_start(key) {
            self.backlog.borrow_mut().push_back(key);
        }
    }

    /// Starts or continues an operation; `false` when the engine has no room.
    fn try_start(&self, key: Key) -> bool {
        loop {
            let started = {
                let mut ops = self.ops.borrow_mut();
                let Some(op) = ops.get_mut(key) else {
                    return true;
                };
                // SAFETY: the operation is boxed and stays in the slab until the engine reported
                // it; it owns its buffer, or its owner keeps the memory until then.
                unsafe {
                    self.engine
                        .borrow_mut()
                        .start(Token(key.to_u64()), op.rest())
                }
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
        let Some(result) = op.advance(raw) else {
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
            let ended = !finished.is_empty();
            for (token, raw) in finished.drain(..) {
                let key = Key::from_u64(token.0);
                if !self.account(key, raw) && !self.try_start(key) {
                    self.backlog.borrow_mut().push_back(key);
                }
            }
            self.finished.replace(finished);
            let started = self.start_backlog() | self.run_woken();
            // Whoever sleeps on the notifier has to be told about everything that has ended; `wait`
            // finds the rest when it submits.
            let more = started || (ended && self.notifying.get());
            if !more {
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

    /// Blocks until there may be something for a [`turn`](Self::turn), or `timeout` has passed. Does short
    /// work instead that the pool has no thread for.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        if !lock(&self.wakes.list).is_empty() || self.help(timeout) {
            return Ok(());
        }
        self.unsubmitted.set(false);
        self.engine
            .borrow_mut()
            .wait(timeout)
            .map_err(|error| Error::from(error).operation("wait for completions"))
    }

    /// From now on this driver does its own short work on a pool where that has no thread free. Returns as
    /// whom.
    pub(crate) fn helps(&self, pool: &Pool) -> Helper {
        let mut helped = self.helped.borrow_mut();
        if helped.is_none() {
            *helped = Some(pool.help(self.as_helper()));
            self.has_short_work.set(true);
        }
        self.as_helper()
    }

    fn as_helper(&self) -> Helper {
        Arc::as_ptr(&self.wakes).addr()
    }

    /// Does a short work instead of sleeping so long; whether there was one.
    fn help(&self, timeout: Option<Duration>) -> bool {
        self.has_short_work.get() && timeout != Some(Duration::ZERO) && self.help_now()
    }

    // Apart, so that those who have no such work do not pay for it.
    #[cold]
    fn help_now(&self) -> bool {
        let mut helped = self.helped.borrow_mut();
        let job = helped.as_ref().and_then(Helping::job);
        let Some(job) = job else {
            *helped = None;
            self.has_short_work.set(false);
            return false;
        };
        drop(helped);
        // What was held back for the wait goes on meanwhile.
        self.submit();
        let before = CURRENT.replace(Arc::as_ptr(&self.wakes));
        job.run();
        CURRENT.set(before);
        true
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
