//! Waiting across queues: locks, wake lists and coalesced work, in safe Rust.
//!
//! A waiter never inherits a result by accident: it is woken, looks again, and goes on or waits on.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
};

/// A boxed future of one queue: it never leaves its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Locks a mutex whose data stays consistent even if a holder panicked.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A list of tasks that wait for a condition.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    waiters: Mutex<Vec<Waker>>,
}

impl Notify {
    /// Waits until `condition` gives a value. It is asked again after every
    /// [`notify_all`](Self::notify_all).
    pub(crate) async fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| {
            if let Some(value) = condition() {
                return Poll::Ready(value);
            }
            {
                let mut waiters = lock(&self.waiters);
                // A task that waits for several things here, or was polled for another reason, is
                // listed once.
                if !waiters
                    .iter()
                    .any(|waiter| waiter.will_wake(context.waker()))
                {
                    waiters.push(context.waker().clone());
                }
            }
            // What changed between the first look and the registration is seen here.
            match condition() {
                Some(value) => Poll::Ready(value),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Wakes every waiter, outside the lock.
    pub(crate) fn notify_all(&self) {
        let waiters = std::mem::take(&mut *lock(&self.waiters));
        for waker in waiters {
            waker.wake();
        }
    }
}

#[derive(Debug, Default)]
struct CoalescerState {
    running: bool,
    started: u64,
    finished: u64,
    /// Runs up to this one that failed share the error of the last failure.
    failed: Option<(u64, crate::ErrorKind)>,
}

/// Work that several tasks want done at the same time, such as a sync: a caller joins a run that
/// has not started yet, never one in flight.
#[derive(Debug, Default)]
pub(crate) struct Coalescer {
    state: Mutex<CoalescerState>,
    changed: Notify,
}

enum Turn {
    Lead(u64),
    Finished(Result<(), crate::ErrorKind>),
}

/// Ends a run even if its task is dropped half-way.
struct Leading<'a> {
    coalescer: &'a Coalescer,
    run: u64,
    outcome: Result<(), crate::ErrorKind>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.coalescer.state);
        state.running = false;
        state.finished = self.run;
        if let Err(kind) = self.outcome {
            state.failed = Some((self.run, kind));
        }
        drop(state);
        self.coalescer.changed.notify_all();
    }
}

impl Coalescer {
    /// Returns after a whole run of `work` that started after this call: ours or another caller's.
    pub(crate) async fn run<F>(&self, work: impl FnOnce() -> F) -> crate::Result<()>
    where
        F: Future<Output = crate::Result<()>>,
    {
        let target = lock(&self.state).started + 1;
        let turn = self
            .changed
            .until(|| {
                let mut state = lock(&self.state);
                if state.finished >= target {
                    let outcome = match state.failed {
                        Some((run, kind)) if run >= target => Err(kind),
                        _ => Ok(()),
                    };
                    return Some(Turn::Finished(outcome));
                }
                if state.running {
                    return None;
                }
                state.running = true;
                state.started += 1;
                Some(Turn::Lead(state.started))
            })
            .await;
        match turn {
            Turn::Finished(outcome) => outcome.map_err(Into::into),
            Turn::Lead(run) => {
                let mut leading = Leading {
                    coalescer: self,
                    run,
                    outcome: Err(crate::ErrorKind::Cancelled),
                };
                let result = work().await;
                leading.outcome = match &result {
                    Ok(()) => Ok(()),
                    Err(error) => Err(error.kind()),
                };
                result
            }
        }
    }
}

/// Polls several futures of one task together and waits for all of them, also after an error:
/// operations in flight are never abandoned.
pub(crate) async fn join_all<F, T>(futures: impl IntoIterator<Item = F>) -> Vec<T>
where
    F: Future<Output = T>,
{
    enum Slot<F, T> {
        Running(Pin<Box<F>>),
        Done(T),
    }
    let mut slots: Vec<Slot<F, T>> = futures
        .into_iter()
        .map(|future| Slot::Running(Box::pin(future)))
        .collect();
    poll_fn(|context| {
        let mut pending = false;
        for slot in &mut slots {
            if let Slot::Running(future) = slot {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => *slot = Slot::Done(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    slots
        .into_iter()
        .filter_map(|slot| match slot {
            Slot::Done(value) => Some(value),
            Slot::Running(_) => None,
        })
        .collect()
}
