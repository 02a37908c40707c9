//! The blocking pool: decompression, compression and host calls that have no asynchronous form.
//!
//! One pool serves the process. Its threads start when the first disk is opened, before a sandbox
//! forbids it, and nothing is spawned on the request path.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread,
};

use crate::sync::lock;

type Work = Box<dyn FnOnce() + Send>;

/// Who may do a job besides the pool: the address of something that lives as long.
pub(crate) type Helper = usize;

/// Work that waits.
pub(crate) struct Job {
    work: Work,
    helper: Option<Helper>,
}

/// The most threads a pool has by default.
const DEFAULT_MAX_THREADS: usize = 8;

/// A fixed number of threads that run blocking work.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
    threads: usize,
}

/// What the threads take from. A job wakes one of them at most: with a channel behind a lock the one
/// that takes a job wakes the next, only for it to wait.
#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    added: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Threads that wait for one. Only then is there anybody to wake, which is a system call.
    idle: usize,
    ended: bool,
}

/// The last one to go ends the threads.
struct Handle(Arc<Queue>);

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.0.jobs).ended = true;
        self.0.added.notify_all();
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads)
    }
}

impl Pool {
    /// Starts a pool with `threads` threads (at least one). They end when the last handle on the pool is dropped.
    ///
    /// # Errors
    /// When the host refuses to start a thread.
    pub fn new(threads: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let queue = Arc::new(Queue::default());
        // Made first, so that a failure ends the threads that were started.
        let handle = Arc::new(Handle(Arc::clone(&queue)));
        for index in 0..threads {
            let queue = Arc::clone(&queue);
            thread::Builder::new()
                .name(format!("platter-pool{index}"))
                .spawn(move || work(&queue))?;
        }
        Ok(Self { handle, threads })
    }

    /// The pool of the process, started at the first call with one thread a processor, at most 8.
    ///
    /// # Errors
    /// When the host refuses to start a thread.
    pub fn global() -> io::Result<Self> {
        static GLOBAL: OnceLock<Mutex<Option<Pool>>> = OnceLock::new();
        let mut global = lock(GLOBAL.get_or_init(Mutex::default));
        if let Some(pool) = &*global {
            return Ok(pool.clone());
        }
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let pool = Self::new(threads.min(DEFAULT_MAX_THREADS))?;
        *global = Some(pool.clone());
        Ok(pool)
    }

    /// The number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Queues work. A panic in it ends the work, not the thread. A helper [may do](Self::job_for) it too.
    pub(crate) fn execute(&self, work: Work, helper: Option<Helper>) {
        let queue = &self.handle.0;
        let mut jobs = lock(&queue.jobs);
        jobs.waiting.push_back(Job { work, helper });
        let wake = jobs.idle > 0;
        drop(jobs);
        if wake {
            queue.added.notify_one();
        }
    }

    /// One of the helper's jobs that no thread is free for.
    pub(crate) fn job_for(&self, helper: Helper) -> Option<Job> {
        let mut jobs = lock(&self.handle.0.jobs);
        if jobs.waiting.len() <= jobs.idle {
            return None;
        }
        let own = |job: &Job| job.helper == Some(helper);
        let place = jobs.waiting.iter().position(own)?;
        jobs.waiting.remove(place)
    }
}

impl Job {
    /// Does it.
    pub(crate) fn run(self) {
        if catch_unwind(AssertUnwindSafe(self.work)).is_err() {
            tracing::error!("blocking work panicked");
        }
    }
}

impl Queue {
    /// The next job; `None` when there will be no more.
    fn take(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            if jobs.ended {
                return None;
            }
            jobs.idle += 1;
            let woken = self.added.wait(jobs);
            jobs = woken.unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        }
    }
}

fn work(queue: &Queue) {
    while let Some(job) = queue.take() {
        job.run();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn every_job_runs_and_a_panic_ends_only_its_own() {
        let pool = Pool::new(2).unwrap();
        let (sender, ended) = mpsc::channel();
        for number in 0..100 {
            let sender = sender.clone();
            let work = move || {
                assert!(number % 10 != 3, "a panic on purpose");
                sender.send(number).unwrap();
            };
            pool.execute(Box::new(work), None);
        }
        drop(sender);
        let mut all: Vec<i32> = ended.iter().collect();
        all.sort_unstable();
        let wanted: Vec<i32> = (0..100).filter(|number| number % 10 != 3).collect();
        assert_eq!(all, wanted);
    }

    #[test]
    fn what_was_queued_still_runs_and_then_the_threads_end() {
        let pool = Pool::new(1).unwrap();
        let (sender, ended) = mpsc::channel();
        let (go, gate) = mpsc::channel::<()>();
        pool.execute(Box::new(move || gate.recv().unwrap()), None);
        for number in 0..3 {
            let sender = sender.clone();
            pool.execute(Box::new(move || sender.send(number).unwrap()), None);
        }
        let queue = Arc::downgrade(&pool.handle.0);
        drop((pool, sender));
        go.send(()).unwrap();
        assert_eq!(ended.iter().collect::<Vec<i32>>(), [0, 1, 2]);
        while queue.strong_count() > 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn a_helper_does_its_own_jobs_that_no_thread_is_free_for() {
        let pool = Pool::new(1).unwrap();
        let (busy, started) = mpsc::channel();
        let (go, gate) = mpsc::channel::<()>();
        let blocked = move || {
            busy.send(()).unwrap();
            gate.recv().unwrap();
        };
        pool.execute(Box::new(blocked), Some(1));
        started.recv().unwrap();
        let (sender, ended) = mpsc::channel();
        for (number, helper) in [(0, None), (1, Some(2)), (2, Some(1)), (3, Some(1))] {
            let sender = sender.clone();
            let work = move || sender.send((number, thread::current().id())).unwrap();
            pool.execute(Box::new(work), helper);
        }
        pool.job_for(1).unwrap().run();
        pool.job_for(1).unwrap().run();
        assert!(pool.job_for(1).is_none());
        let here = thread::current().id();
        assert_eq!(ended.try_iter().collect::<Vec<_>>(), [(2, here), (3, here)]);
        go.send(()).unwrap();
        drop((pool, sender));
        let others: Vec<_> = ended
            .iter()
            .map(|(number, by)| (number, by == here))
            .collect();
        assert_eq!(others, [(0, false), (1, false)]);
    }
}
