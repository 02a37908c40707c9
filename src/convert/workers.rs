//! Threads that share the runs of the sources: the loop that compressing and plain copies have in common.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
    mpsc::{self, Receiver},
};

use crate::{
    convert::{
        job::Job,
        scan::{self, Look, Run, Scanned},
    },
    util::{failure::Outcome, interrupt, progress::Progress},
};

/// Runs that are found ahead of the threads.
const AHEAD: usize = 64;
/// Bytes by which progress is shown at least, whatever the size of a chunk.
const STEP: u64 = 1 << 20;

/// What a thread is given to copy one run with.
pub(super) struct Hand<'a> {
    pub(super) sources: &'a [Scanned],
    /// The place of the run in the order of the sources.
    number: u64,
    turns: &'a Turns,
}

impl<'a> Hand<'a> {
    /// Waits until every run before this one has had its turn; `None` when the copy has failed elsewhere.
    pub(super) fn turn(&self) -> Option<Turn<'a>> {
        let mut state = lock(&self.turns.state);
        while !state.over && state.next != self.number {
            state = self
                .turns
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        (!state.over).then_some(Turn(self.turns))
    }
}

/// Whose turn it is, where the order matters.
#[derive(Default)]
struct Turns {
    state: Mutex<TurnState>,
    moved: Condvar,
}

#[derive(Default)]
struct TurnState {
    next: u64,
    over: bool,
}

/// The turn of one run, until this is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).next += 1;
        self.0.moved.notify_all();
    }
}

/// Ends the copy of all threads unless it is disarmed: also when a thread panics.
struct EndAll<'a> {
    turns: &'a Turns,
    stop: &'a AtomicBool,
    armed: bool,
}

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.stop.store(true, Ordering::Relaxed);
            lock(&self.turns.state).over = true;
            self.turns.moved.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next run and its number; nothing when all are taken.
fn next(runs: &Mutex<(u64, Receiver<Outcome<Run>>)>) -> Option<(u64, Outcome<Run>)> {
    let mut runs = lock(runs);
    let run = runs.1.recv().ok()?;
    runs.0 += 1;
    Some((runs.0 - 1, run))
}

/// Calls `copy` for every run of the sources, on `threads` threads, each with a buffer of a chunk. It gives the
/// bytes by which the progress moves. The first failure ends all threads.
pub(super) fn run(
    job: &Job,
    progress: &Progress,
    look: Look,
    threads: usize,
    copy: impl Fn(&Hand<'_>, &Run, &mut [u8]) -> Outcome<u64> + Sync,
) -> Outcome<()> {
    let sources = scan::sources(&job.sources)?;
    let (to, from) = mpsc::sync_channel(AHEAD);
    let runs = Mutex::new((0, from));
    let (turns, stop, done) = (Turns::default(), AtomicBool::new(false), AtomicU64::new(0));
    let (moved, results) = mpsc::channel();
    std::thread::scope(|scope| {
        let (sources, runs, turns, stop, done, copy) =
            (&sources, &runs, &turns, &stop, &done, &copy);
        scope.spawn(move || scan::run(sources, look, &mut |run| to.send(run).is_ok()));
        for _ in 0..threads {
            let moved = moved.clone();
            scope.spawn(move || {
                let mut end = EndAll {
                    turns,
                    stop,
                    armed: true,
                };
                let mut buf = vec![0; look.chunk as usize];
                while !stop.load(Ordering::Relaxed) {
                    let Some((number, run)) = next(runs) else {
                        break;
                    };
                    let hand = Hand {
                        sources,
                        number,
                        turns,
                    };
                    let result = run.and_then(|run| {
                        interrupt::check()?;
                        let bytes = copy(&hand, &run, &mut buf)?;
                        job.keep_rate(done.fetch_add(run.len, Ordering::Relaxed) + run.len);
                        Ok(bytes)
                    });
                    let failed = result.is_err();
                    if moved.send(result).is_err() || failed {
                        return;
                    }
                }
                end.armed = false;
            });
        }
        drop(moved);
        let mut first = Ok(());
        let mut unseen = 0;
        for result in results {
            match result {
                Ok(bytes) => unseen += bytes,
                Err(failure) => first = first.and(Err(failure)),
            }
            if unseen >= STEP {
                progress.advance(unseen);
                unseen = 0;
            }
        }
        if unseen > 0 {
            progress.advance(unseen);
        }
        // The scanner may be waiting for room: what is left is for nobody.
        while lock(runs).1.recv().is_ok() {}
        first
    })
}
