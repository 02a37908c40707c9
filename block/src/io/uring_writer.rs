//! The thread beside a ring that writes through the page cache, where the file system cannot try to
//! do so without waiting.
//!
//! The ring would hand each such write to a worker of the kernel: a wake-up, a lock and a cold cache
//! for every 4 KiB. This thread takes all writes of a batch at once and does them one after the
//! other, as the lock of the inode would have it anyway, and tells of several with one wake-up. Such
//! threads of several queues take turns with their batches: waiting for each other in the kernel, they would
//! spin.
//!
//! A short write that is alone, with nothing else in flight, is done at once by the thread that has
//! it: handing it over costs two wake-ups, and there is nothing it could hold up but what comes
//! meanwhile. When one took long, because the kernel makes writers wait for the disk, the next ones go to
//! the thread.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    HostFile, Segment,
    pace::Pace,
    sys::{self, Notifier},
};

/// Writes that may end before their engine is told. A write seldom waits, so this is some
/// microseconds; but one that does wait holds up the news of as many others.
const TOLD_TOGETHER: usize = 8;

/// The longest write that is done at once, in bytes.
const LONE_BYTES: usize = 64 << 10;

/// What a write that is done at once should take at most.
const LONE_TIME: Duration = Duration::from_micros(250);

/// A write.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) slot: u32,
    pub(super) file: Arc<HostFile>,
    pub(super) unit: usize,
    pub(super) offset: u64,
    pub(super) segments: *const [Segment],
}

// SAFETY: whoever hands a write over keeps the segments and their memory until its result was
// taken, on whichever thread they are read meanwhile.
unsafe impl Send for Write {}

impl Write {
    fn len(&self) -> usize {
        // SAFETY: they are kept until the result was taken.
        let segments = unsafe { &*self.segments };
        segments.iter().map(Segment::len).sum()
    }

    fn perform(&self) -> i32 {
        let fd = self.file.raw_fd().unwrap_or(-1);
        // SAFETY: they are kept until the result was taken, which `perform` makes.
        let segments = unsafe { &*self.segments };
        // SAFETY: as above.
        unsafe { sys::pwritev(fd, segments, self.unit, self.offset, false) }
    }
}

#[derive(Debug, Default)]
struct Queue {
    writes: Vec<Write>,
    /// The thread sleeps, or is about to.
    idle: bool,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    results: Mutex<Vec<(u32, i32)>>,
    /// There are results that the notifier was written for.
    told: AtomicBool,
    notifier: Arc<Notifier>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes every write there is, once there is one; `false` at the end.
    fn next(&self, writes: &mut Vec<Write>) -> bool {
        let mut queue = lock(&self.queue);
        while queue.writes.is_empty() {
            if queue.stop {
                return false;
            }
            queue.idle = true;
            let woken = self.changed.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
        queue.idle = false;
        std::mem::swap(&mut queue.writes, writes);
        true
    }

    fn tell(&self, results: &mut Vec<(u32, i32)>) {
        lock(&self.results).append(results);
        if !self.told.swap(true, Ordering::AcqRel) {
            self.notifier.signal();
        }
    }

    fn run(&self, depth: usize) {
        let mut writes = Vec::with_capacity(depth);
        let mut results = Vec::with_capacity(TOLD_TOGETHER);
        while self.next(&mut writes) {
            while !writes.is_empty() {
                let some = writes.len().min(TOLD_TOGETHER);
                let same_file = |one: &Write, next: &Write| Arc::ptr_eq(&one.file, &next.file);
                for of_one_file in writes[..some].chunk_by(same_file) {
                    let _turn = lock(of_one_file[0].file.writers());
                    results.extend(of_one_file.iter().map(|one| (one.slot, one.perform())));
                }
                // Given back before anybody is told: who closes the file then ends its locks.
                writes.drain(..some);
                self.tell(&mut results);
            }
        }
    }
}

/// The thread, and what was started but not yet handed to it.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    held: Vec<Write>,
    pace: Pace,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread, which writes `notifier` when there are results. With at most `depth` writes
    /// at a time nothing is allocated any more.
    pub(super) fn new(notifier: &Arc<Notifier>, depth: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                writes: Vec::with_capacity(depth),
                ..Queue::default()
            }),
            changed: Condvar::new(),
            results: Mutex::new(Vec::with_capacity(depth)),
            told: AtomicBool::new(false),
            notifier: Arc::clone(notifier),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("platter-writer".to_owned())
            .spawn(move || theirs.run(depth))?;
        Ok(Self {
            shared,
            held: Vec::with_capacity(depth),
            pace: Pace::default(),
            thread: Some(thread),
        })
    }

    /// Adds a write to the batch.
    ///
    /// # Safety
    /// The segments, and the memory behind them, stay valid until the result was taken.
    pub(super) unsafe fn start(&mut self, write: Write) {
        self.held.push(write);
    }

    /// Does the batch at once, if it is one short write; `alone` if nothing else is in flight. Whether
    /// it did: there is a result then.
    pub(super) fn try_lone(&mut self, alone: bool) -> bool {
        let [write] = self.held.as_slice() else {
            return false;
        };
        if !alone || write.len() > LONE_BYTES || !self.pace.allows() {
            return false;
        }
        let start = Instant::now();
        let result = (write.slot, write.perform());
        self.pace.went(start.elapsed() <= LONE_TIME);
        self.held.clear();
        lock(&self.shared.results).push(result);
        self.shared.told.store(true, Ordering::Release);
        true
    }

    /// Hands the batch over.
    pub(super) fn submit(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let mut queue = lock(&self.shared.queue);
        queue.writes.append(&mut self.held);
        let idle = std::mem::take(&mut queue.idle);
        drop(queue);
        if idle {
            self.shared.changed.notify_one();
        }
    }

    /// Whether there are results.
    pub(super) fn has_results(&self) -> bool {
        self.shared.told.load(Ordering::Acquire)
    }

    /// Takes the results: slots, and what the system call returned.
    pub(super) fn take(&self, out: &mut Vec<(u32, i32)>) {
        if self.shared.told.swap(false, Ordering::AcqRel) {
            out.append(&mut lock(&self.shared.results));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.submit();
        lock(&self.shared.queue).stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported already.
            let _ = thread.join();
        }
    }
}
