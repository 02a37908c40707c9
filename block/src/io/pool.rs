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

/// A thread that does jobs of its own besides the pool. As long as it does, the pool needs a thread less.
pub(crate) struct Helping {
    pool: Pool,
    helper: Helper,
}

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
struct Queue {
    jobs: Mutex<Jobs>,
    called: Condvar,
}

/// Jobs, and who is at them.
struct Jobs {
    waiting: VecDeque<Job>,
    /// Threads of the pool that do a job or are called for one, and those that wait for a call.
    busy: usize,
    idle: usize,
    /// Calls that no thread has heard yet.
    calls: usize,
    /// Threads outside the pool that do jobs.
    helpers: usize,
    processors: usize,
    ended: bool,
}

impl Jobs {
    /// Whether to call a thread for a job that waits; it counts as called then. With a helper, more threads
    /// than processors would only take turns, so a job that it may do can wait. One thread is always at it.
    fn call(&mut self, can_wait: bool) -> bool {
        let crowded = self.busy + self.helpers >= self.processors;
        let needless = can_wait && self.helpers > 0 && self.busy > 0 && crowded;
        let wanted = self.waiting.len() > self.calls && self.idle > 0 && !needless;
        if wanted {
            self.idle -= 1;
            self.busy += 1;
            self.calls += 1;
        }
        wanted
    }
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The last one to go ends the threads.
struct Handle(Arc<Queue>);

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.0.jobs).ended = true;
        self.0.called.notify_all();
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
        Self::beside_helpers(threads, processors())
    }

    /// A pool that takes care not to have more threads than processors work, those of helpers included.
    fn beside_helpers(threads: usize, processors: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let queue = Arc::new(Queue {
            jobs: Mutex::new(Jobs {
                waiting: VecDeque::new(),
                busy: threads,
                idle: 0,
                calls: 0,
                helpers: 0,
                processors,
                ended: false,
            }),
            called: Condvar::new(),
        });
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
        let pool = Self::new(processors().min(DEFAULT_MAX_THREADS))?;
        *global = Some(pool.clone());
        Ok(pool)
    }

    /// The number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Queues work. A panic in it ends the work, not the thread. A helper [may do](Helping::job) it too.
    pub(crate) fn execute(&self, work: Work, helper: Option<Helper>) {
        let queue = &self.handle.0;
        let mut jobs = lock(&queue.jobs);
        jobs.waiting.push_back(Job { work, helper });
        let call = jobs.call(helper.is_some());
        drop(jobs);
        if call {
            queue.called.notify_one();
        }
    }

    /// From now on a thread does jobs of its own.
    pub(crate) fn help(&self, helper: Helper) -> Helping {
        lock(&self.handle.0.jobs).helpers += 1;
        Helping {
            pool: self.clone(),
            helper,
        }
    }
}

impl Helping {
    /// One of the helper's jobs that no thread is on its way for.
    pub(crate) fn job(&self) -> Option<Job> {
        let mut jobs = lock(&self.pool.handle.0.jobs);
        if jobs.waiting.len() <= jobs.calls {
            return None;
        }
        let own = |job: &Job| job.helper == Some(self.helper);
        let place = jobs.waiting.iter().position(own)?;
        jobs.waiting.remove(place)
    }
}

impl Drop for Helping {
    fn drop(&mut self) {
        let queue = &self.pool.handle.0;
        let mut jobs = lock(&queue.jobs);
        jobs.helpers -= 1;
        let call = jobs.call(true);
        drop(jobs);
        if call {
            queue.called.notify_one();
        }
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
            jobs.busy -= 1;
            jobs.idle += 1;
            let uncalled = |jobs: &mut Jobs| jobs.calls == 0 && !jobs.ended;
            let woken = self.called.wait_while(jobs, uncalled);
            jobs = woken.unwrap_or_else(PoisonError::into_inner);
            jobs.calls = jobs.calls.saturating_sub(1);
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

    /// A job that says that it began, and waits for a word; and the ends of both.
    fn blocked() -> (Work, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (began, started) = mpsc::channel();
        let (go, gate) = mpsc::channel::<()>();
        let work = move || {
            began.send(()).unwrap();
            let _ = gate.recv();
        };
        (Box::new(work), started, go)
    }

    /// Fails rather than hangs where a job does not begin.
    fn soon(started: &mpsc::Receiver<()>) {
        let limit = std::time::Duration::from_secs(30);
        started
            .recv_timeout(limit)
            .expect("a thread begins the job");
    }

    #[test]
    fn a_helper_does_its_own_jobs_that_no_thread_is_free_for() {
        let pool = Pool::new(1).unwrap();
        let helping = pool.help(1);
        let (work, started, go) = blocked();
        pool.execute(work, Some(1));
        soon(&started);
        let (sender, ended) = mpsc::channel();
        for (number, helper) in [(0, None), (1, Some(2)), (2, Some(1)), (3, Some(1))] {
            let sender = sender.clone();
            let work = move || sender.send((number, thread::current().id())).unwrap();
            pool.execute(Box::new(work), helper);
        }
        helping.job().unwrap().run();
        helping.job().unwrap().run();
        assert!(helping.job().is_none());
        let here = thread::current().id();
        assert_eq!(ended.try_iter().collect::<Vec<_>>(), [(2, here), (3, here)]);
        go.send(()).unwrap();
        drop((helping, pool, sender));
        let others: Vec<_> = ended
            .iter()
            .map(|(number, by)| (number, by == here))
            .collect();
        assert_eq!(others, [(0, false), (1, false)]);
    }

    #[test]
    fn with_a_helper_no_more_threads_work_than_there_are_processors() {
        let pool = Pool::beside_helpers(2, 2).unwrap();
        let jobs = || lock(&pool.handle.0.jobs);
        while jobs().idle < 2 {
            thread::yield_now();
        }
        let helping = pool.help(1);
        let (work, started, go) = blocked();
        pool.execute(work, Some(1));
        soon(&started);
        let (short, short_started, go_short) = blocked();
        pool.execute(short, Some(1));
        assert_eq!(jobs().busy, 1, "the helper's");
        let (long, long_started, go_long) = blocked();
        pool.execute(long, None);
        // A job that nobody else may do has a thread called; it takes the one that came first.
        soon(&short_started);
        assert_eq!(jobs().busy, 2);
        go_short.send(()).unwrap();
        soon(&long_started);
        let (last, last_started, _) = blocked();
        go_long.send(()).unwrap();
        while jobs().busy > 1 {
            thread::yield_now();
        }
        pool.execute(last, Some(1));
        assert_eq!(jobs().calls, 0);
        drop(helping);
        soon(&last_started);
        go.send(()).unwrap();
    }

    #[test]
    fn a_helper_takes_no_job_that_a_thread_was_called_for() {
        let pool = Pool::beside_helpers(1, 2).unwrap();
        while lock(&pool.handle.0.jobs).idle < 1 {
            thread::yield_now();
        }
        let helping = pool.help(1);
        let mut jobs = lock(&pool.handle.0.jobs);
        jobs.waiting.push_back(Job {
            work: Box::new(|| ()),
            helper: Some(1),
        });
        assert!(jobs.call(true));
        // As if the thread that was called had not looked yet.
        jobs.calls += 1;
        drop(jobs);
        assert!(helping.job().is_none());
    }
}
