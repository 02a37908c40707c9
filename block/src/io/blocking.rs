//! Blocking work on its way to the pool, and back to the task that waits for it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use super::Io;
use crate::{Error, ErrorKind, Result, sync::lock};

/// How often who gives up looks whether the work has ended.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

impl Io {
    /// Runs blocking work on the pool, or inline where the engine is synchronous. Dropping the future
    /// waits until the work has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] when the work panicked.
    pub async fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.run_on_pool(work, false).await
    }

    /// The same for work so short that this thread may do it, rather than sleep, where no thread of the
    /// pool is free.
    pub(crate) async fn run_short<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.run_on_pool(work, true).await
    }

    async fn run_on_pool<T, F>(&self, work: F, is_short: bool) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        if self.driver.is_synchronous() {
            return Ok(work());
        }
        if self.driver.is_simulated() {
            let value = work();
            self.sleep(Duration::ZERO).await?;
            return Ok(value);
        }
        let shared = Arc::new(Mutex::new(Outcome::Waiting(None)));
        let reporter = Reporter(Arc::clone(&shared));
        let work = move || reporter.report(Outcome::Done(work()));
        let pool = &self.core.pool;
        let may_help = is_short && !self.driver.is_notifying();
        let helper = may_help.then(|| self.driver.helps(pool));
        pool.execute(Box::new(work), helper);
        OutcomeFuture(shared).await
    }
}

/// What became of blocking work.
enum Outcome<T> {
    Waiting(Option<Waker>),
    Done(T),
    Lost,
}

/// Reports what became of pool work, also when it panics.
struct Reporter<T>(Arc<Mutex<Outcome<T>>>);

impl<T> Reporter<T> {
    fn report(&self, outcome: Outcome<T>) {
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
struct OutcomeFuture<T>(Arc<Mutex<Outcome<T>>>);

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
