//! The queue: requests in, completions out, over any image and any engine.
//!
//! A request that hits the map starts its host operations at once and allocates nothing; any other
//! becomes a task. Both pin before they look anything up and unpin when their last operation ended.

mod direct;

use std::{
    any::Any,
    cell::{Cell, RefCell},
    collections::VecDeque,
    os::fd::{AsRawFd, BorrowedFd},
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Error, ErrorKind, GuestRange, Result,
    hooks::Mutation,
    image::{Extents, Intent},
    io::{
        AsyncIo, Buffers, Completion, Driver, EngineFile, InFlight, Io, Key, MemoryRegions, NewOp,
        OpKind, Owner, Pin, Request, RequestOp, RequestSink, Segments, Slab,
    },
    serve::{self, Served},
};

use direct::{Access, Direct};

/// The most requests a queue accepts at a time.
const MAX_DEPTH: u32 = 65_536;

pub(crate) struct QueueInner {
    io: Io,
    served: Arc<Served>,
    number: Cell<Key>,
    capacity: usize,
    in_flight: InFlight,
    direct: RefCell<Slab<Direct>>,
    completed: RefCell<Vec<Completion>>,
    held: RefCell<VecDeque<Request>>,
    extents: RefCell<Extents>,
}

/// The data plane of one device queue.
///
/// What [`submit`](AsyncIo::submit) starts is held back for the [`wait`](AsyncIo::wait) that is about
/// to follow: handing it to the host and sleeping are one system call then. A caller that never
/// waits, but reaps again and again, or sleeps on the notifier, is not left hanging: the second reap
/// hands over, and once the notifier was asked for nothing is held back.
pub(crate) struct Queue {
    inner: Rc<QueueInner>,
    /// Nothing was reaped since the last submission.
    plugged: bool,
    /// The disk stays open while a queue of it exists. Dropped last.
    _keep: Arc<dyn Any>,
}

impl Queue {
    /// A queue of the calling thread.
    pub(crate) fn new(io: Io, served: Arc<Served>, depth: u32, keep: Arc<dyn Any>) -> Result<Self> {
        if depth == 0 || depth > MAX_DEPTH {
            return Err(Error::invalid_argument(format!(
                "ring depth: {depth}, expected 1 to {MAX_DEPTH}"
            )));
        }
        let in_flight = InFlight::register(io.core.id);
        let inner = Rc::new(QueueInner {
            io,
            served,
            number: Cell::new(Key::NONE),
            capacity: depth as usize,
            in_flight,
            direct: RefCell::default(),
            completed: RefCell::default(),
            held: RefCell::default(),
            extents: RefCell::default(),
        });
        let sink: Weak<QueueInner> = Rc::downgrade(&inner);
        inner.number.set(inner.io.driver.add_queue(sink));
        Ok(Self {
            inner,
            plugged: false,
            _keep: keep,
        })
    }

    fn driver(&self) -> &Rc<Driver> {
        &self.inner.io.driver
    }

    /// Moves everything of the thread on, and sleeps, until `ready` or `timeout`; returns whether it is ready.
    fn wait_until(
        &mut self,
        timeout: Option<Duration>,
        ready: impl Fn(&Self) -> bool,
    ) -> Result<bool> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.plugged = false;
        loop {
            if ready(self) {
                return Ok(true);
            }
            if !self.driver().can_submit_and_wait() {
                self.driver().turn();
                if ready(self) {
                    return Ok(true);
                }
            }
            // A wake that moved a task on, but ended no request, does not end the wait.
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            self.driver().wait(left)?;
            self.driver().turn();
            if left == Some(Duration::ZERO) {
                return Ok(ready(self));
            }
        }
    }
}

impl QueueInner {
    /// Starts a request as far as it gets, pinned along with `held`; without that it waits until the
    /// disk is no longer drained. What is left of the request means nothing.
    fn start(self: &Rc<Self>, request: &mut Request, held: Option<Pin>) {
        let Some(held) = held else {
            self.hold(request.take());
            return;
        };
        // Under the pin: the size does not change any more, nor is the disk closed.
        if let Err(kind) = serve::check(&self.served, &request.op) {
            self.complete(request.id, Err(kind), buffers_of(request.take().op));
            return;
        }
        let pin = self.io.pins.pin_along(held);
        let mutation = serve::mutation(&request.op);
        self.served.hooks.begin(mutation);
        let id = request.id;
        let access = |range, intent, dsync| Access {
            id,
            range,
            pin,
            intent,
            dsync,
        };
        let started = match &mut request.op {
            RequestOp::Read { offset, buffers } => {
                let range = GuestRange::new(*offset, buffers.len());
                self.try_direct(&access(range, Intent::Read, false), buffers)
            }
            RequestOp::Write {
                offset,
                buffers,
                fua,
            } => {
                let range = GuestRange::new(*offset, buffers.len());
                let fua = *fua && !self.io.never_syncs();
                self.served.policy.allows_direct_write()
                    && !self.is_guarded(range)
                    && self.try_direct(&access(range, Intent::WriteInPlace, fua), buffers)
            }
            _ => false,
        };
        if !started {
            self.start_task(id, request.take().op, pin, mutation);
        }
    }

    /// Starts requests under one pin.
    fn start_all<'a>(self: &Rc<Self>, requests: impl IntoIterator<Item = &'a mut Request>) {
        let pins = &self.io.core.pins;
        let pin = self.io.pins.pin(pins);
        for request in requests {
            self.start(request, pin);
        }
        if let Some(pin) = pin {
            self.io.pins.unpin(pins, pin);
        }
    }

    fn is_guarded(&self, range: GuestRange) -> bool {
        match &self.served.guard {
            Some(guard) => guard.concerns(range, self.served.image.size()),
            None => false,
        }
    }

    /// Serves a request that the map alone cannot.
    fn start_task(self: &Rc<Self>, id: u64, op: RequestOp, pin: Pin, mutation: Option<Mutation>) {
        let queue = Rc::clone(self);
        self.io.driver.spawn(Box::pin(async move {
            let result = serve::serve(&queue.served, &queue.io, &op).await;
            let result = result.map_err(|error| {
                tracing::warn!(disk = %queue.io.core.path.display(), request = ?op.summary(), %error, "request failed");
                error.kind()
            });
            queue.io.pins.unpin(&queue.io.core.pins, pin);
            queue.served.hooks.end(mutation, result);
            queue.complete(id, result, buffers_of(op));
        }));
    }

    /// Keeps a request until the disk is no longer drained.
    fn hold(self: &Rc<Self>, request: Request) {
        let first = self.held.borrow().is_empty();
        self.held.borrow_mut().push_back(request);
        if !first {
            return;
        }
        let queue = Rc::clone(self);
        self.io.driver.spawn(Box::pin(async move {
            loop {
                queue.io.core.pins.opened().await;
                let mut held = queue.held.take();
                queue.start_all(&mut held);
                if queue.held.borrow().is_empty() {
                    return;
                }
            }
        }));
    }

    fn complete(&self, id: u64, result: Result<(), ErrorKind>, buffers: Option<Buffers>) {
        self.completed.borrow_mut().push(Completion {
            id,
            result,
            buffers,
        });
        self.io.driver.undelivered(1);
    }
}

fn buffers_of(op: RequestOp) -> Option<Buffers> {
    match op {
        RequestOp::Read { buffers, .. } | RequestOp::Write { buffers, .. } => Some(buffers),
        _ => None,
    }
}

impl RequestSink for QueueInner {
    fn operation_ended(&self, slot: Key, result: Result<(), ErrorKind>) {
        self.end_operation(slot, result);
    }

    fn watch_fired(&self, id: u64, result: Result<(), ErrorKind>) {
        self.in_flight.add(1);
        self.complete(id, result, None);
    }
}

impl AsyncIo for Queue {
    fn submit(&mut self, batch: &mut Vec<Request>) -> usize {
        let inner = &self.inner;
        let room = inner.capacity.saturating_sub(inner.in_flight.get());
        let take = room.min(batch.len());
        inner.in_flight.add(take);
        inner.start_all(&mut batch[..take]);
        batch.drain(..take);
        self.plugged = true;
        if self.driver().is_notifying() {
            self.driver().submit();
        }
        if !inner.completed.borrow().is_empty() {
            // Done already: whoever waits for the notifier must come and look.
            self.driver().notify();
        }
        take
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let plugged = std::mem::take(&mut self.plugged);
        // What `wait` found is taken first: the next `wait` looks for more, at no cost of its own.
        if self.driver().is_notifying() || self.inner.completed.borrow().is_empty() {
            if plugged {
                self.driver().turn_plugged();
            } else {
                self.driver().turn();
            }
        }
        let mut completed = self.inner.completed.borrow_mut();
        let count = completed.len();
        if out.is_empty() {
            std::mem::swap(out, &mut completed);
        } else {
            out.append(&mut completed);
        }
        self.inner.in_flight.remove(count);
        self.driver().delivered(count);
        count
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight.get()
    }

    fn capacity(&self) -> usize {
        self.inner.capacity
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.driver().notifier()
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, id: u64) -> Result<()> {
        if self.driver().is_notifying() {
            return Err(Error::unsupported(
                "watch: the notifier of this thread was asked for; wait for the descriptor beside it",
            ));
        }
        let owner = Owner::Watch {
            queue: self.inner.number.get(),
            id,
        };
        self.driver().start(
            NewOp {
                kind: OpKind::PollReadable { fd: fd.as_raw_fd() },
                file: EngineFile(0),
                offset: 0,
                segments: Segments::new(),
                unit: 1,
                buffer: None,
            },
            owner,
        );
        Ok(())
    }

    fn register_memory(&mut self, memory: MemoryRegions) -> bool {
        self.driver().register_memory(memory)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<bool> {
        self.wait_until(timeout, |queue| !queue.inner.completed.borrow().is_empty())
    }

    fn sleeps_in(&self) -> Option<usize> {
        Some(Rc::as_ptr(self.driver()).addr())
    }

    fn wait_for_any(&mut self, timeout: Option<Duration>) -> Result<bool> {
        self.wait_until(timeout, |queue| queue.driver().has_undelivered())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut completions = Vec::new();
        loop {
            self.reap(&mut completions);
            completions.clear();
            if self.inner.in_flight.get() == 0 {
                break;
            }
            if let Err(error) = self.driver().wait(None) {
                tracing::error!(%error, "cannot wait for requests in flight");
            }
        }
        self.driver().remove_queue(self.inner.number.get());
    }
}
