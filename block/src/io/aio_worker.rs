//! The helper thread of a Linux AIO engine: what the kernel's interface cannot do without blocking.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    io,
    os::fd::RawFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    FallocateMode,
    sys::{self, Notifier},
};

/// A blocking system call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    Sync {
        fd: RawFd,
    },
    Fallocate {
        fd: RawFd,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    },
}

impl Job {
    fn run(self) -> i32 {
        match self {
            Job::Sync { fd } => sys::fdatasync(fd),
            Job::Fallocate {
                fd,
                mode,
                offset,
                len,
            } => sys::fallocate(fd, mode, offset, len),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<(u32, Job)>,
    timers: BinaryHeap<Reverse<(Instant, u32)>>,
    results: Vec<(u32, i32)>,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    notifier: Arc<Notifier>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let mut expired = false;
            while let Some(Reverse((due, slot))) = state.timers.peek().copied()
                && due <= now
            {
                state.timers.pop();
                state.results.push((slot, 0));
                expired = true;
            }
            if expired {
                self.notifier.signal();
            }
            if let Some((slot, job)) = state.jobs.pop_front() {
                drop(state);
                let result = job.run();
                state = self.lock();
                state.results.push((slot, result));
                self.notifier.signal();
                continue;
            }
            if state.stop {
                return;
            }
            state = match state.timers.peek() {
                Some(Reverse((due, _))) => {
                    let left = due.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}

/// The helper thread. Jobs run in order; a timer may be late by one job.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, which writes `notifier` for every result.
    pub(super) fn new(notifier: &Arc<Notifier>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            notifier: Arc::clone(notifier),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("platter-aio".to_owned())
            .spawn(move || theirs.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Runs a job for a slot. Its descriptor stays open until the result was taken.
    pub(super) fn run(&self, slot: u32, job: Job) {
        self.shared.lock().jobs.push_back((slot, job));
        self.shared.changed.notify_one();
    }

    /// Reports a slot after a time.
    pub(super) fn timer(&self, slot: u32, after: Duration) {
        // A time that the clock cannot express never comes; a century is as good.
        const CENTURY: Duration = Duration::from_secs(100 * 365 * 86400);
        let due = Instant::now() + after.min(CENTURY);
        self.shared.lock().timers.push(Reverse((due, slot)));
        self.shared.changed.notify_one();
    }

    /// Whether there are results.
    pub(super) fn has_results(&self) -> bool {
        !self.shared.lock().results.is_empty()
    }

    /// Takes the results.
    pub(super) fn results(&self) -> Vec<(u32, i32)> {
        std::mem::take(&mut self.shared.lock().results)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends after the jobs it has; a panic of it was reported already.
            let _ = thread.join();
        }
    }
}
