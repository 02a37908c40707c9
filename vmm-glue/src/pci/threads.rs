//! Threads that drive the workers of a function, and can be held.

use std::{
    fs::File,
    ops::RangeBounds,
    os::fd::AsFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use virtio_devices::{
    Error, Result,
    worker::{FrontEnd, Worker},
};

use crate::sys;

/// What a worker's thread is told. All but the last hold the worker.
enum Order<T> {
    Pause(Sender<()>),
    /// Answers whether all has ended by then.
    Drain(Instant, Sender<bool>),
    Save(Sender<Result<T>>),
    Restore(T, Sender<()>),
    Resume,
}

/// How the state of a held worker is taken, and put into a fresh one.
pub(crate) struct Carry<F, T> {
    pub(crate) save: fn(&Worker<F>) -> Result<T>,
    pub(crate) restore: fn(&mut Worker<F>, &T),
}

/// Of workers that have no state of their own.
impl<F> Carry<F, ()> {
    pub(crate) const NOTHING: Self = Self {
        save: |_| Ok(()),
        restore: |_, ()| (),
    };
}

struct Seat<T> {
    orders: Option<Sender<Order<T>>>,
    wake: File,
    thread: Option<JoinHandle<()>>,
}

impl<T> Seat<T> {
    fn tell(&self, order: Order<T>) {
        if let Some(orders) = &self.orders {
            // One that is gone answers nothing.
            let _ = orders.send(order);
        }
        let _ = sys::signal(&self.wake);
    }
}

/// The threads of a function. They end, with nothing in flight, when this is dropped.
pub(crate) struct WorkerThreads<T = ()>(Mutex<Vec<Seat<T>>>);

impl<T> Default for WorkerThreads<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> WorkerThreads<T> {
    fn seats(&self) -> MutexGuard<'_, Vec<Seat<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + 'static> WorkerThreads<T> {
    /// Starts a thread that makes a worker and drives it; `kick` is the worker's doorbell.
    ///
    /// # Errors
    /// The host's, when there is no thread or descriptor to be had.
    pub(crate) fn start<F: FrontEnd + 'static>(
        &self,
        name: String,
        kick: File,
        make: impl FnOnce() -> Result<Worker<F>> + Send + 'static,
        carry: Carry<F, T>,
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
                Ok(worker) => work(worker, &kick, &stop, &inbox, &carry),
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
            seat.tell(Order::Pause(sender.clone()));
        }
        drop(sender);
        // Ends when each has answered, or is gone.
        while done.recv().is_ok() {}
    }

    /// Drains some of the workers at the same time, and holds them until [`resume`](Self::resume);
    /// whether all was posted at `until`.
    pub(crate) fn drain(&self, which: impl RangeBounds<usize>, until: Instant) -> bool {
        let seats = self.seats();
        let (sender, done) = channel();
        let chosen = seats.iter().enumerate();
        let mut count = 0;
        for (_, seat) in chosen.filter(|(index, _)| which.contains(index)) {
            seat.tell(Order::Drain(until, sender.clone()));
            count += 1;
        }
        drop(sender);
        let drained = done.iter().filter(|drained| *drained).count();
        drained == count
    }

    /// The states of the workers, which are drained, in order.
    ///
    /// # Errors
    /// That of a worker; [`Error::State`] when one is gone.
    pub(crate) fn save(&self) -> Result<Vec<T>> {
        let seats = self.seats();
        let states = seats.iter().map(|seat| {
            let (sender, done) = channel();
            seat.tell(Order::Save(sender));
            done.recv()
                .unwrap_or_else(|_| Err(Error::State("a worker is gone".to_owned())))
        });
        states.collect()
    }

    /// Puts held workers into their states.
    pub(crate) fn restore(&self, states: Vec<T>) {
        for (seat, state) in self.seats().iter().zip(states) {
            let (sender, done) = channel();
            seat.tell(Order::Restore(state, sender));
            let _ = done.recv();
        }
    }

    /// Lets the workers go on.
    pub(crate) fn resume(&self) {
        for seat in self.seats().iter() {
            if let Some(orders) = &seat.orders {
                // A held one waits for it, and another one need not be told.
                let _ = orders.send(Order::Resume);
            }
        }
    }
}

impl<T> Drop for WorkerThreads<T> {
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
fn work<F: FrontEnd, T>(
    mut worker: Worker<F>,
    kick: &File,
    stop: &File,
    inbox: &Receiver<Order<T>>,
    carry: &Carry<F, T>,
) {
    loop {
        if let Err(error) = worker.run(kick.as_fd(), stop.as_fd()) {
            tracing::error!(%error, "the worker has stopped");
            let _ = sys::poll([(stop.as_fd(), libc::POLLIN)], None);
        }
        // An order is sent before the descriptor is written; it may be one that was executed already.
        sys::clear(stop);
        let mut held = false;
        loop {
            let order = if held {
                inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                inbox.try_recv()
            };
            match order {
                Ok(Order::Resume) => held = false,
                Ok(order) => {
                    held = true;
                    execute(&mut worker, order, carry);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    settle(&mut worker);
                    return;
                }
            }
        }
    }
}

/// Whoever gave the order and is gone needs no answer.
fn execute<F: FrontEnd, T>(worker: &mut Worker<F>, order: Order<T>, carry: &Carry<F, T>) {
    match order {
        Order::Pause(done) => {
            settle(worker);
            let _ = done.send(());
        }
        Order::Drain(until, done) => {
            let drained = worker.drain_until(until).unwrap_or_else(|error| {
                tracing::error!(%error, "the worker cannot be drained");
                false
            });
            if !drained {
                settle(worker);
            }
            let _ = done.send(drained);
        }
        Order::Save(done) => {
            let _ = done.send((carry.save)(worker));
        }
        Order::Restore(state, done) => {
            (carry.restore)(worker, &state);
            let _ = done.send(());
        }
        Order::Resume => {}
    }
}

fn settle<F: FrontEnd>(worker: &mut Worker<F>) {
    if let Err(error) = worker.settle() {
        tracing::error!(%error, "the worker cannot be paused");
    }
}
