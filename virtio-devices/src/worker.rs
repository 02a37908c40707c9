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
    io::{self, Read},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::{Duration, Instant},
};

use block::io::{AsyncIo, Completion, MemoryRegions, Request, RequestOp};

use crate::{Error, Result};

/// The data plane of one disk, and what is on its way there.
struct Plane {
    io: Box<dyn AsyncIo>,
    requests: Vec<Request>,
    in_flight: usize,
    /// How many requests may wait to be submitted before the front end stops taking more.
    room: usize,
    /// No more requests come: it goes when the last has ended.
    detached: bool,
}

impl Plane {
    fn make_room(&mut self) {
        self.room = self.io.capacity().max(1).saturating_sub(self.in_flight);
    }
}

/// Requests on their way to the disks. A front end of one disk knows only plane 0.
#[derive(Default)]
pub struct Batch {
    planes: Vec<Option<Plane>>,
}

impl Batch {
    /// How many more requests the data plane has room for. A front end takes a new guest request
    /// only while this is not 0; the block requests of one guest request may exceed it, the rest
    /// is submitted after the next completion.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room_of(0)
    }

    /// [`room`](Self::room) of one data plane.
    #[must_use]
    pub fn room_of(&self, plane: usize) -> usize {
        match self.planes.get(plane) {
            Some(Some(plane)) => plane.room.saturating_sub(plane.requests.len()),
            _ => 0,
        }
    }

    /// Whether every data plane has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.planes
            .iter()
            .flatten()
            .all(|plane| plane.requests.len() < plane.room)
    }

    /// Adds a request. `id` comes back in [`FrontEnd::complete`]; its top bit must be clear.
    pub fn push(&mut self, id: u64, op: RequestOp) {
        let pushed = self.push_to(0, id, op);
        debug_assert!(pushed, "a worker of one disk has plane 0");
    }

    /// Adds a request for one data plane; returns whether there is such a plane.
    pub fn push_to(&mut self, plane: usize, id: u64, op: RequestOp) -> bool {
        debug_assert_eq!(id & WATCH, 0, "the top bit of an id is the worker's");
        let Some(Some(plane)) = self.planes.get_mut(plane) else {
            return false;
        };
        plane.requests.push(Request { id, op });
        true
    }

    /// Takes the requests named `id` back if all `count` of them still wait to be submitted; returns
    /// whether they did. Otherwise nothing changes.
    pub fn take_back(&mut self, id: u64, count: usize) -> bool {
        let requests = self.planes.iter().flatten().flat_map(|it| &it.requests);
        if requests.filter(|request| request.id == id).count() != count {
            return false;
        }
        for plane in self.planes.iter_mut().flatten() {
            plane.requests.retain(|request| request.id != id);
        }
        true
    }

    /// Adds the data plane of one more disk; returns its number.
    pub fn attach(&mut self, io: Box<dyn AsyncIo>) -> usize {
        // Whoever drives several disks waits for their notifiers; asking for one says so.
        let _ = io.notifier();
        let mut plane = Plane {
            io,
            requests: Vec::new(),
            in_flight: 0,
            room: 0,
            detached: false,
        };
        plane.make_room();
        match self.planes.iter().position(Option::is_none) {
            Some(free) => {
                self.planes[free] = Some(plane);
                free
            }
            None => {
                self.planes.push(Some(plane));
                self.planes.len() - 1
            }
        }
    }

    /// Gives a data plane back once its requests have ended. No more may be pushed to it.
    pub fn detach(&mut self, plane: usize) {
        if let Some(Some(plane)) = self.planes.get_mut(plane) {
            plane.detached = true;
        }
        self.drop_detached();
    }

    /// The number of requests not yet submitted.
    #[must_use]
    pub fn len(&self) -> usize {
        let planes = self.planes.iter().flatten();
        planes.map(|plane| plane.requests.len()).sum()
    }

    /// Whether there is nothing to submit.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn in_flight(&self) -> usize {
        let planes = self.planes.iter().flatten();
        planes.map(|plane| plane.in_flight).sum()
    }

    fn make_room(&mut self) {
        for plane in self.planes.iter_mut().flatten() {
            plane.make_room();
        }
    }

    /// Submits what is there; what does not fit stays for the next time.
    fn submit(&mut self) -> usize {
        let mut submitted = 0;
        for plane in self.planes.iter_mut().flatten() {
            if !plane.requests.is_empty() {
                let taken = plane.io.submit(&mut plane.requests);
                plane.in_flight += taken;
                submitted += taken;
            }
        }
        submitted
    }

    /// The data planes of a thread share what is registered.
    fn register_memory(&mut self, memory: MemoryRegions) {
        if let Some(plane) = self.planes.iter_mut().flatten().next() {
            plane.io.register_memory(memory);
        }
    }

    fn drop_detached(&mut self) {
        for place in &mut self.planes {
            if place
                .as_ref()
                .is_some_and(|it| it.detached && it.in_flight == 0 && it.requests.is_empty())
            {
                *place = None;
            }
        }
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
    batch: Batch,
    front: F,
    completions: Vec<Completion>,
    /// It waits in the data plane of its only disk, not beside those of several.
    single: bool,
    watches: Vec<Watch>,
    next_watch: u64,
    stop_seen: bool,
    watch_error: Option<block::Error>,
}

impl<F: FrontEnd> Worker<F> {
    /// A worker for `front` over `io`, on the thread that made `io`.
    #[must_use]
    pub fn new(front: F, io: Box<dyn AsyncIo>) -> Self {
        let mut worker = Self::without_disk(front);
        worker.single = true;
        worker.batch.planes.push(Some(Plane {
            io,
            requests: Vec::new(),
            in_flight: 0,
            room: 0,
            detached: false,
        }));
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
        for _ in 0..ROUNDS {
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
        if !self.single {
            return self.run_beside(kick, stop);
        }
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
            self.wait(timeout)?;
        }
    }

    /// [`run`](Self::run) for several disks: waits for their notifiers beside the descriptors.
    fn run_beside(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let mut doorbell =
            File::from(
                kick.try_clone_to_owned()
                    .map_err(|source| Error::Descriptor {
                        what: "doorbell",
                        source,
                    })?,
            );
        loop {
            let timeout = match self.process() {
                Progress::More => Some(Duration::ZERO),
                Progress::Idle => self.idle_timeout(),
            };
            let [rung, stopped] = self.wait_beside([kick, stop], timeout)?;
            if stopped {
                return Ok(());
            }
            if rung {
                // It is readable and ours alone while we run, so this does not block.
                let _ = doorbell.read(&mut [0; 8]);
            }
        }
    }

    /// Waits for any data plane.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        if self.single
            && let Some(Some(plane)) = self.batch.planes.first_mut()
        {
            plane.io.wait(timeout)?;
            return Ok(());
        }
        // What was parked by something else than a disk is looked at again soon.
        let soon = Duration::from_millis(1);
        let timeout = timeout.map_or(soon, |timeout| timeout.min(soon));
        self.wait_beside([], Some(timeout)).map(|_| ())
    }

    /// Waits for any data plane, or for one of `fds`; returns which of those are readable.
    fn wait_beside<const N: usize>(
        &self,
        fds: [BorrowedFd<'_>; N],
        timeout: Option<Duration>,
    ) -> Result<[bool; N]> {
        let mut list: Vec<libc::pollfd> = fds
            .into_iter()
            .chain(self.notifiers())
            .map(|fd| libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        // SAFETY: `list` is an array of that many pollfd structures and outlives the call.
        let ready = unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            let source = io::Error::last_os_error();
            if source.kind() != io::ErrorKind::Interrupted {
                return Err(Error::Descriptor {
                    what: "waiting for requests",
                    source,
                });
            }
        }
        let mut readable = [false; N];
        for (out, entry) in readable.iter_mut().zip(&list) {
            *out = entry.revents != 0;
        }
        Ok(readable)
    }

    /// Takes nothing new from the guest and returns when everything taken has been posted.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn drain(&mut self) -> Result<()> {
        loop {
            let reaped = self.reap();
            self.front.resume(&mut self.batch);
            let submitted = self.batch.submit();
            let posted = self.front.post();
            if self.front.outstanding() == 0 && self.in_flight() == 0 && self.batch.is_empty() {
                return Ok(());
            }
            if reaped + submitted + posted == 0 {
                self.wait(self.idle_timeout())?;
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

    /// How long to wait: for ever, unless an interrupt is due before, or requests are left over
    /// and no completion will bring them up again.
    fn idle_timeout(&self) -> Option<Duration> {
        let stuck = |plane: &Plane| plane.in_flight == 0 && !plane.requests.is_empty();
        if self.batch.planes.iter().flatten().any(stuck) {
            return Some(Duration::from_millis(1));
        }
        let due = self.front.deadline()?;
        Some(due.saturating_duration_since(Instant::now()))
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
        self.watch_with(file.as_fd(), id)?;
        self.watches.push(Watch {
            id,
            file,
            role,
            stale: false,
        });
        Ok(())
    }

    fn watch_with(&mut self, fd: BorrowedFd<'_>, id: u64) -> block::Result<()> {
        match self.batch.planes.first_mut() {
            Some(Some(plane)) => plane.io.watch(fd, id),
            _ => Err(block::Error::unsupported("watch: the worker has no disk")),
        }
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
                match self.watch_with(watch.file.as_fd(), watch.id) {
                    Ok(()) => self.watches.push(watch),
                    Err(error) => self.watch_error = Some(error),
                }
            }
        }
    }
}
