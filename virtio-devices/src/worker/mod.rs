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
//!    have posted something in between. This happens whether or not requests are in flight. A worker
//!    that sleeps by itself ([`Worker::run`]) and has nothing in flight goes on looking for some
//!    microseconds before it asks, if its guest has been coming back that soon.
//!
//! A front end that stopped because the `AsyncIo` was full is drained again after the next
//! completion, without a doorbell.
//!
//! The worker is made on the thread that drives it and stays there. [`Worker::run`] waits in the
//! `AsyncIo` itself, or in one of several that sleep in the same; a VMM with its own event loop watches
//! [`Worker::notifier`] and the doorbell, and calls [`Worker::process`] when either becomes readable.

mod batch;
mod polling;
mod wait;

use std::{
    mem,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use block::io::{AsyncIo, Completion, MemoryRegions};

pub use batch::Batch;
use batch::WATCH;
pub use polling::DEFAULT_POLL_MAX;
use polling::Polling;
use wait::Watch;

use crate::Result;

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

    /// Goes on with requests that wait for something other than their disk.
    fn resume(&mut self, batch: &mut Batch) {
        let _ = batch;
    }

    /// When [`post`](Self::post) wants to be called again although nothing has happened: an
    /// interrupt that was held back is due then.
    fn deadline(&self) -> Option<Instant> {
        None
    }
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

/// Drives one front end over one data plane. See the [module](self).
pub struct Worker<F> {
    // Dropped first: an armed watch needs its descriptor.
    batch: Batch,
    front: F,
    completions: Vec<Completion>,
    /// It was made with a disk, and has no other.
    single: bool,
    /// The number of the data plane that watches the descriptors, and that it sleeps in.
    inside: Option<u64>,
    /// Data planes refuse to watch: it waits for their notifiers.
    beside: bool,
    watches: Vec<Watch>,
    next_watch: u64,
    stop_seen: bool,
    watch_error: Option<block::Error>,
    polling: Polling,
}

impl<F: FrontEnd> Worker<F> {
    /// A worker for `front` over `io`, on the thread that made `io`.
    #[must_use]
    pub fn new(front: F, io: Box<dyn AsyncIo>) -> Self {
        let mut worker = Self::without_disk(front);
        worker.single = true;
        worker.batch.attach(io);
        worker
    }

    /// A worker for a front end that [attaches](Batch::attach) the data planes of its disks, any
    /// number of them, as it needs them.
    #[must_use]
    pub fn without_disk(front: F) -> Self {
        Self {
            batch: Batch::default(),
            front,
            completions: Vec::new(),
            single: false,
            inside: None,
            beside: false,
            watches: Vec::new(),
            next_watch: WATCH,
            stop_seen: false,
            watch_error: None,
            polling: Polling::default(),
        }
    }

    /// Sets how long [`run`](Self::run) looks for requests before it sleeps, at most
    /// ([`DEFAULT_POLL_MAX`] otherwise); zero: never, and a second at most. It looks as long as that mostly finds
    /// some, and not where it sleeps for the disk anyway. On a host of one processor it never looks.
    pub fn set_poll_max(&mut self, limit: Duration) {
        self.polling.set_limit(limit);
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
        self.batch.make_room();
        start(&mut self.front, &mut self.batch)
    }

    /// Becomes readable when [`process`](Self::process) should be called because requests ended.
    ///
    /// # Panics
    /// For a worker that was made [without a disk](Self::without_disk): it has
    /// [`notifiers`](Self::notifiers).
    #[must_use]
    pub fn notifier(&self) -> BorrowedFd<'_> {
        match self.batch.planes.first() {
            Some(Some(plane)) if self.single => plane.io.notifier(),
            _ => unreachable!("a worker of several disks has notifiers"),
        }
    }

    /// All that become readable when [`process`](Self::process) should be called. The data planes,
    /// and with them these, may change with every call of it.
    pub fn notifiers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let planes = self.batch.planes.iter().flatten();
        planes.map(|plane| plane.io.notifier())
    }

    /// Block requests at the data planes.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.batch.in_flight()
    }

    /// Does everything that can be done without waiting.
    pub fn process(&mut self) -> Progress {
        let mut rounds = 0;
        while rounds < ROUNDS {
            self.reap();
            self.front.resume(&mut self.batch);
            self.front.post();
            self.batch.make_room();
            let drained = self.front.drain(&mut self.batch);
            if let Some(memory) = self.front.memory_to_pin() {
                self.batch.register_memory(memory);
            }
            let submitted = self.batch.submit();
            if drained.taken + submitted > 0 {
                // Some of it may have ended already, without the disk or by an engine that is fast.
                self.polling.found();
                rounds += 1;
                continue;
            }
            if self.looks_again() {
                continue;
            }
            if drained.full || !self.front.rearm() {
                return Progress::Idle;
            }
            rounds += 1;
        }
        Progress::More
    }

    /// Nothing moved: whether to look once more before asking for a doorbell. Disks tell when they have
    /// something; only the guest is waited for.
    fn looks_again(&mut self) -> bool {
        self.in_flight() == 0
            && self.batch.is_empty()
            && !self.stop_seen
            && self.watch_error.is_none()
            && self.front.outstanding() == 0
            && self.polling.goes_on()
    }

    /// Takes nothing new from the guest and returns when everything taken has been posted.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn drain(&mut self) -> Result<()> {
        self.drain_by(None).map(|_| ())
    }

    /// [`drain`](Self::drain) until `deadline` at the latest; returns whether everything has been
    /// posted. What has not goes on with the next [`process`](Self::process).
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn drain_until(&mut self, deadline: Instant) -> Result<bool> {
        self.drain_by(Some(deadline))
    }

    fn drain_by(&mut self, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let reaped = self.reap();
            self.front.resume(&mut self.batch);
            let submitted = self.batch.submit();
            let posted = self.front.post();
            if self.front.outstanding() == 0 && self.in_flight() == 0 && self.batch.is_empty() {
                return Ok(true);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            if reaped + submitted + posted == 0 {
                let timeout = self.idle_timeout();
                self.wait(timeout.map_or(left, |it| Some(left.map_or(it, |left| it.min(left)))))?;
            }
        }
    }

    /// Takes nothing new from the guest and returns when the disks hold nothing of the guest's
    /// memory any more. Requests that wait for something else stay, and are told about later.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn settle(&mut self) -> Result<()> {
        loop {
            let moved = self.reap() + self.batch.submit() + self.front.post();
            if self.in_flight() == 0 && self.batch.is_empty() {
                return Ok(());
            }
            if moved == 0 {
                self.wait(self.idle_timeout())?;
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
            let moved = self.reap() + self.batch.submit();
            if self.in_flight() == 0 && self.batch.is_empty() {
                self.front.discard_ended();
                return Ok(());
            }
            if moved == 0 {
                self.wait(self.idle_timeout())?;
            }
        }
    }

    /// Hands what has ended to the front end.
    fn reap(&mut self) -> usize {
        let mut reaped = 0;
        for at in 0..self.batch.planes.len() {
            let Some(Some(plane)) = self.batch.planes.get_mut(at) else {
                continue;
            };
            let mut completions = mem::take(&mut self.completions);
            plane.io.reap(&mut completions);
            for completion in completions.drain(..) {
                if completion.id & WATCH != 0 {
                    self.woken(completion.id);
                    continue;
                }
                if let Some(Some(plane)) = self.batch.planes.get_mut(at) {
                    debug_assert!(plane.in_flight > 0, "a completion without a request");
                    plane.in_flight = plane.in_flight.saturating_sub(1);
                }
                reaped += 1;
                self.front.complete(completion, &mut self.batch);
            }
            self.completions = completions;
        }
        self.batch.drop_detached();
        reaped
    }
}
