//! Blocking work on its way from the pool to the task that waits for it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use crate::{Error, ErrorKind, Result, sync::lock};

/// How often who gives up looks whether the work has ended.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// What became of blocking work.
pub(super) enum Outcome<T> {
    Waiting(Option<Waker>),
    Done(T),
    Lost,
}

/// Reports what became of pool work, also when it panics.
pub(super) struct Reporter<T>(pub(super) Arc<Mutex<Outcome<T>>>);

impl<T> Reporter<T> {
    pub(super) fn report(&self, outcome: Outcome<T>) {
        let before = std::mem::replace(&mut *lock(&self.0), outcome);
        if let Outcome::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<T> Drop for Reporter<T> {
    fn drop(&mut self) {
        let waiting = matches!(&*lock(&self.0), Outcome::Waiting(_));
        if waiting {
            self.report(Outcome::Lost);
        }
    }
}

/// Ends when the work was reported.
pub(super) struct OutcomeFuture<T>(pub(super) Arc<Mutex<Outcome<T>>>);

/// Work may have memory of a request ([`Target`](super::Target)): it is not left behind. Futures are
/// dropped before their end only where a caller gives up as a whole.
impl<T> Drop for OutcomeFuture<T> {
    fn drop(&mut self) {
        while matches!(&*lock(&self.0), Outcome::Waiting(_)) {
            thread::sleep(LOOK_AGAIN);
        }
    }
}

impl<T> Future for OutcomeFuture<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut outcome = lock(&self.0);
        match std::mem::replace(&mut *outcome, Outcome::Lost) {
            Outcome::Done(value) => Poll::Ready(Ok(value)),
            Outcome::Lost => Poll::Ready(Err(Error::with_message(
                ErrorKind::Cancelled,
                "blocking work panicked",
            ))),
            Outcome::Waiting(_) => {
                *outcome = Outcome::Waiting(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}
