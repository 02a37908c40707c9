//! Threads that drive the workers of a function, and can be held.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use virtio_devices::{
    Error, Result,
    worker::{FrontEnd, Worker},
};

use crate::sys;

/// What a worker's thread is told.
enum Order {
    Pause(Sender<()>),
    Resume,
}

struct Seat {
    orders: Option<Sender<Order>>,
    wake: File,
    thread: Option<JoinHandle<()>>,
}

/// The threads of a function. They end, with nothing in flight, when this is dropped.
#[derive(Default)]
pub(crate) struct WorkerThreads(Mutex<Vec<Seat>>);

impl WorkerThreads {
    fn seats(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that makes a worker and drives it; `kick` is the worker's doorbell.
    ///
    /// # Errors
    /// The host's, when there is no thread or descriptor to be had.
    pub(crate) fn start<F: FrontEnd>(
        &self,
        name: String,
        kick: File,
        make: impl FnOnce() -> Result<Worker<F>> + Send + 'static,
    ) -> Result<()> {
        let failed = |source| Error::Descriptor {
            what: "worker thread",
            source,
        };
        let (orders, inbox) = channel();
        let wake = sys::event().map_err(failed)?;
        let stop = wake.try_clone().map_err(failed)?;
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || match make() {
                Ok(worker) => work(worker, &kick, &stop, &inbox),
                Err(error) => tracing::error!(%error, "there is no worker"),
            });
        self.seats().push(Seat {
            orders: Some(orders),
            wake,
            thread: Some(thread.map_err(failed)?),
        });
        Ok(())
    }

    /// Returns when no worker uses guest memory, and holds them until [`resume`](Self::resume).
    pub(crate) fn pause(&self) {
        let seats = self.seats();
        let (sender, done) = channel();
        for seat in seats.iter() {
            if let Some(orders) = &seat.orders {
                let _ = orders.send(Order::Pause(sender.clone()));
            }
            let _ = sys::signal(&seat.wake);
        }
        drop(sender);
        // Ends when each has answered, or is gone.
        while done.recv().is_ok() {}
    }

    /// Lets the workers go on.
    pub(crate) fn resume(&self) {
        for seat in self.seats().iter() {
            if let Some(orders) = &seat.orders {
                let _ = orders.send(Order::Resume);
            }
        }
    }
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        let mut seats = std::mem::take(&mut *self.seats());
        for seat in &mut seats {
            drop(seat.orders.take());
            let _ = sys::signal(&seat.wake);
        }
        for seat in &mut seats {
            if let Some(thread) = seat.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("a worker's thread panicked");
            }
        }
    }
}

/// A worker's thread.
fn work<F: FrontEnd>(mut worker: Worker<F>, kick: &File, stop: &File, inbox: &Receiver<Order>) {
    loop {
        if let Err(error) = worker.run(kick.as_fd(), stop.as_fd()) {
            tracing::error!(%error, "the worker has stopped");
            let _ = sys::poll([(stop.as_fd(), libc::POLLIN)], None);
        }
        // An order is sent before the descriptor is written.
        sys::clear(stop);
        loop {
            match inbox.recv() {
                Ok(Order::Pause(done)) => {
                    if let Err(error) = worker.settle() {
                        tracing::error!(%error, "the worker cannot be paused");
                    }
                    let _ = done.send(());
                }
                Ok(Order::Resume) => break,
                Err(_) => {
                    if let Err(error) = worker.settle() {
                        tracing::error!(%error, "the worker cannot be ended");
                    }
                    return;
                }
            }
        }
    }
}
