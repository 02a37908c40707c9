//! The blocking pool: decompression, compression and host calls that have no asynchronous form.
//!
//! One pool serves the process. Its threads start when the first disk is opened, before a sandbox
//! forbids it, and nothing is spawned on the request path.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use crate::sync::lock;

type Job = Box<dyn FnOnce() + Send>;

/// The most threads a pool has by default.
const DEFAULT_MAX_THREADS: usize = 8;

/// A fixed number of threads that run blocking work.
#[derive(Clone)]
pub struct Pool {
    sender: Sender<Job>,
    threads: usize,
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
        let (sender, receiver) = mpsc::channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        for index in 0..threads {
            let receiver = Arc::clone(&receiver);
            thread::Builder::new()
                .name(format!("platter-pool{index}"))
                .spawn(move || work(&receiver))?;
        }
        Ok(Self { sender, threads })
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

    /// Queues work. A panic in it ends the work, not the thread.
    pub(crate) fn execute(&self, job: Job) {
        // The receiver lives as long as a worker does, and workers end only after the last sender.
        let sent = self.sender.send(job);
        debug_assert!(sent.is_ok(), "the pool outlives its handles");
    }
}

fn work(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = lock(receiver).recv();
        let Ok(job) = job else { return };
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("blocking work panicked");
        }
    }
}
