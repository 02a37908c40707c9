//! The one loop that drives a device queue.
//!
//! A device model supplies a [`FrontEnd`]: it turns what the guest posted into block requests, and
//! turns ended requests into what the guest sees. Everything else is here, once:
//!
//! 1. reap completions from the [`AsyncIo`], hand them to the front end;
//! 2. post them together, with at most one interrupt;
//! 3. drain what the guest posted, as far as the `AsyncIo` has room, into one batch;
//! 4. submit the batch with one call;
//! 5. when nothing moved any more: ask for a doorbell, and look once again, because the guest may
//!    have posted something in between. This happens whether or not requests are in flight.
//!
//! A front end that stopped because the `AsyncIo` was full is drained again after the next
//! completion, without a doorbell.
//!
//! The worker is made on the thread that drives it and stays there. [`Worker::run`] waits in the
//! `AsyncIo` itself; a VMM with its own event loop watches [`Worker::notifier`] and the doorbell,
//! and calls [`Worker::process`] when either becomes readable.

use std::{
    fs::File,
    io::Read,
    mem,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use block::io::{AsyncIo, Completion, MemoryRegions, Request, RequestOp};

use crate::{Error, Result};

/// Requests on their way to the disk.
#[derive(Debug, Default)]
pub struct Batch {
    requests: Vec<Request>,
    room: usize,
}

impl Batch {
    /// How many more requests the data plane has room for. A front end takes a new guest request
    /// only while this is not 0; the block requests of one guest request may exceed it, the rest
    /// is submitted after the next completion.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room.saturating_sub(self.requests.len())
    }

    /// Adds a request. `id` comes back in [`FrontEnd::complete`]; its top bit must be clear.
    pub fn push(&mut self, id: u64, op: RequestOp) {
        debug_assert_eq!(id & WATCH, 0, "the top bit of an id is the worker's");
        self.requests.push(Request { id, op });
    }

    /// The number of requests not yet submitted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is nothing to submit.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

/// How far a [`FrontEnd::drain`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Guest requests taken.
    pub taken: usize,
    /// Whether it stopped because the batch had no room left.
    pub full: bool,
}

/// A device model, as its queue worker sees it.
pub trait FrontEnd {
    /// Takes what the guest posted, oldest first, until nothing is left or
    /// [`Batch::room`] is 0. A request that needs no disk, or is wrong, ends here.
    fn drain(&mut self, batch: &mut Batch) -> Drained;

    /// A block request has ended. The front end may push follow-up requests.
    fn complete(&mut self, completion: Completion, batch: &mut Batch);

    /// Shows the guest everything that has ended since the last call, and interrupts it at most
    /// once. Cheap when there is nothing. Returns how many guest requests it posted.
    fn post(&mut self) -> usize;

    /// Asks the guest for a doorbell and then looks again: whether it has posted something.
    fn rearm(&mut self) -> bool;

    /// Guest memory that the host should pin, if it is not the same as at the last call.
    fn memory_to_pin(&mut self) -> Option<MemoryRegions> {
        None
    }

    /// Guest requests taken and not yet posted.
    fn outstanding(&self) -> usize;

    /// Forgets what has ended and was not posted: the guest has reset the device.
    fn discard_ended(&mut self);
}

/// What is left after [`Worker::process`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do until the notifier or the doorbell becomes readable.
    Idle,
    /// The guest keeps posting: call again soon. Other work of the thread may go first.
    More,
}

/// Rounds of [`Worker::process`] before it gives other work of its thread a chance.
const ROUNDS: usize = 16;

/// Marks the ids of watched descriptors.
const WATCH: u64 = 1 << 63;

/// A descriptor that wakes the worker. The duplicate keeps it open for as long as it is watched.
struct Watch {
    id: u64,
    file: File,
    role: Role,
    /// Left over from an earlier run: it ends when it fires.
    stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Kick,
    Stop,
}

/// Drives one front end over one data plane. See the [module](self).
pub struct Worker<F> {
    // Dropped first: an armed watch needs its descriptor.
    io: Box<dyn AsyncIo>,
    front: F,
    batch: Batch,
    completions: Vec<Completion>,
    in_flight: usize,
    watches: Vec<Watch>,
    next_watch: u64,
    stop_seen: bool,
    watch_error: Option<block::Error>,
}

impl<F: FrontEnd> Worker<F> {
    /// A worker for `front` over `io`, on the thread that made `io`.
    #[must_use]
    pub fn new(front: F, io: Box<dyn AsyncIo>) -> Self {
        Self {
            io,
            front,
            batch: Batch::default(),
            completions: Vec::new(),
            in_flight: 0,
            watches: Vec::new(),
            next_watch: WATCH,
            stop_seen: false,
            watch_error: None,
        }
    }

    /// The device model.
    #[must_use]
    pub fn front(&self) -> &F {
        &self.front
    }

    /// The device model, to be changed between two calls of the worker.
    pub fn front_mut(&mut self) -> &mut F {
        &mut self.front
    }

    /// Lets the front end start requests outside a drain, for a replay after a restart. They are
    /// submitted by the next [`process`](Self::process).
    pub fn with_batch<R>(&mut self, start: impl FnOnce(&mut F, &mut Batch) -> R) -> R {
        self.make_room();
        start(&mut self.front, &mut self.batch)
    }

    /// Becomes readable when [`process`](Self::process) should be called because requests ended.
    #[must_use]
    pub fn notifier(&self) -> BorrowedFd<'_> {
        self.io.notifier()
    }

    /// Block requests at the data plane.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Does everything that can be done without waiting.
    pub fn process(&mut self) -> Progress {
        for _ in 0..ROUNDS {
            self.reap();
            self.front.post();
            self.make_room();
            let drained = self.front.drain(&mut self.batch);
            if let Some(memory) = self.front.memory_to_pin() {
                self.io.register_memory(memory);
            }
            let submitted = self.submit();
            if drained.taken + submitted > 0 {
                // Some of it may have ended already, without the disk or by an engine that is fast.
                continue;
            }
            if drained.full || !self.front.rearm() {
                return Progress::Idle;
            }
        }
        Progress::More
    }

    /// Processes until `stop` becomes readable; `kick` is the guest's doorbell, an eventfd, which
    /// is read here. `stop` is not read. Requests in flight stay in flight: call
    /// [`drain`](Self::drain) before looking at the queue's state, or `run` again to go on.
    ///
    /// # Errors
    /// The host's error when a descriptor cannot be watched or waiting fails.
    pub fn run(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        self.stop_seen = false;
        for watch in &mut self.watches {
            watch.stale = true;
        }
        self.watch(kick, Role::Kick)?;
        self.watch(stop, Role::Stop)?;
        loop {
            let progress = self.process();
            if let Some(error) = self.watch_error.take() {
                return Err(error.into());
            }
            if self.stop_seen {
                return Ok(());
            }
            let timeout = match progress {
                Progress::More => Some(Duration::ZERO),
                Progress::Idle => self.idle_timeout(),
            };
            self.io.wait(timeout)?;
        }
    }

    /// Takes nothing new from the guest and returns when everything taken has been posted.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn drain(&mut self) -> Result<()> {
        loop {
            let reaped = self.reap();
            let submitted = self.submit();
            let posted = self.front.post();
            if self.front.outstanding() == 0 && self.in_flight == 0 && self.batch.is_empty() {
                return Ok(());
            }
            if reaped + submitted + posted == 0 {
                self.io.wait(self.idle_timeout())?;
            }
        }
    }

    /// Device reset: takes nothing new, waits until the disk holds nothing of the guest's memory
    /// any more, and posts nothing.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn reset(&mut self) -> Result<()> {
        loop {
            let moved = self.reap() + self.submit();
            if self.in_flight == 0 && self.batch.is_empty() {
                self.front.discard_ended();
                return Ok(());
            }
            if moved == 0 {
                self.io.wait(self.idle_timeout())?;
            }
        }
    }

    /// How long to wait: for ever, unless requests are left over and no completion will bring
    /// them up again.
    fn idle_timeout(&self) -> Option<Duration> {
        (self.in_flight == 0 && !self.batch.is_empty()).then_some(Duration::from_millis(1))
    }

    /// Sets how many requests the next drain may take.
    fn make_room(&mut self) {
        self.batch.room = self.io.capacity().max(1).saturating_sub(self.in_flight);
    }

    /// Submits the batch; what does not fit stays for the next time.
    fn submit(&mut self) -> usize {
        if self.batch.is_empty() {
            return 0;
        }
        let taken = self.io.submit(&mut self.batch.requests);
        self.in_flight += taken;
        taken
    }

    /// Hands what has ended to the front end.
    fn reap(&mut self) -> usize {
        let mut completions = mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        let mut reaped = 0;
        for completion in completions.drain(..) {
            if completion.id & WATCH != 0 {
                self.woken(completion.id);
                continue;
            }
            debug_assert!(self.in_flight > 0, "a completion without a request");
            self.in_flight = self.in_flight.saturating_sub(1);
            reaped += 1;
            self.front.complete(completion, &mut self.batch);
        }
        self.completions = completions;
        reaped
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, role: Role) -> Result<()> {
        let file = fd
            .try_clone_to_owned()
            .map_err(|source| Error::Descriptor {
                what: match role {
                    Role::Kick => "doorbell",
                    Role::Stop => "stop descriptor",
                },
                source,
            })?;
        self.next_watch += 1;
        let id = self.next_watch;
        let file = File::from(file);
        self.io.watch(file.as_fd(), id)?;
        self.watches.push(Watch {
            id,
            file,
            role,
            stale: false,
        });
        Ok(())
    }

    /// A watch is over: clear a doorbell and watch it again, or remember to stop.
    fn woken(&mut self, id: u64) {
        let Some(at) = self.watches.iter().position(|watch| watch.id == id) else {
            return;
        };
        let mut watch = self.watches.swap_remove(at);
        if watch.stale {
            return;
        }
        match watch.role {
            Role::Stop => self.stop_seen = true,
            Role::Kick => {
                // It is readable and ours alone while we run, so this does not block.
                let _ = watch.file.read(&mut [0; 8]);
                self.next_watch += 1;
                watch.id = self.next_watch;
                match self.io.watch(watch.file.as_fd(), watch.id) {
                    Ok(()) => self.watches.push(watch),
                    Err(error) => self.watch_error = Some(error),
                }
            }
        }
    }
}
