//! A thread for each queue.
//!
//! It lives from the start of the device to its end. While the queue runs, the thread is inside
//! [`BlkWorker`]; in between it waits for the thread that controls the device. The data plane is
//! made on the queue's thread when the queue starts and never leaves it.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use virtio_devices::{
    Interrupt, MemorySource,
    stats::Op,
    virtio::InflightTracker,
    virtio_blk::{BlkWorker, VirtioBlk},
    worker::Progress,
};
use virtio_queue::Queue;

use crate::sys;

/// Everything that a queue needs to run.
pub(crate) struct QueueSetup<S> {
    /// Guest memory.
    pub(crate) memory: S,
    /// As the driver set it up: ready, with addresses, and with the indices to go on at.
    pub(crate) queue: Queue,
    /// The driver's doorbell, non-blocking.
    pub(crate) kick: File,
    /// Where requests in flight are recorded.
    pub(crate) tracker: Option<Box<dyn InflightTracker + Send>>,
    /// What an earlier process left unfinished; `None` if there was none.
    pub(crate) resubmit: Option<Vec<u16>>,
}

/// How a queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// What the driver posted and the device took is finished and shown to the driver.
    Drain,
    /// The driver has reset the device: nothing more is shown to it.
    Reset,
}

enum Command<S> {
    Start(Box<QueueSetup<S>>),
    Stop(Stop),
}

enum Reply {
    Started(Result<(), String>),
    Stopped(Option<u16>),
}

/// The controlling thread's end of a queue.
pub(crate) struct QueueHandle<S> {
    /// Dropped to end the thread.
    commands: Option<Sender<Command<S>>>,
    replies: Receiver<Reply>,
    wake: File,
    thread: Option<JoinHandle<()>>,
}

impl<S: MemorySource + Send + 'static> QueueHandle<S> {
    /// Starts the thread of queue `index`.
    pub(crate) fn spawn(
        index: u16,
        device: Arc<VirtioBlk>,
        interrupt: Arc<dyn Interrupt>,
        poll: Duration,
    ) -> io::Result<Self> {
        let (commands, inbox) = channel();
        let (outbox, replies) = channel();
        let wake = sys::event()?;
        let queue = QueueThread {
            index,
            device,
            interrupt,
            poll,
            inbox,
            outbox,
            wake: wake.try_clone()?,
        };
        let thread = thread::Builder::new()
            .name(format!("platter-vq{index}"))
            .spawn(move || queue.serve())?;
        Ok(Self {
            commands: Some(commands),
            replies,
            wake,
            thread: Some(thread),
        })
    }

    /// Starts the queue.
    pub(crate) fn start(&mut self, setup: QueueSetup<S>) -> Result<(), String> {
        self.send(Command::Start(Box::new(setup)));
        match self.replies.recv() {
            Ok(Reply::Started(result)) => result,
            _ => Err("the queue's thread is gone".into()),
        }
    }

    /// Stops the queue. Returns the next entry of the available ring to take; `None` if the queue
    /// was not running or the thread is gone.
    pub(crate) fn stop(&mut self, how: Stop) -> Option<u16> {
        self.send(Command::Stop(how));
        match self.replies.recv() {
            Ok(Reply::Stopped(next_avail)) => next_avail,
            _ => None,
        }
    }

    /// A thread that is gone shows when its reply is missed.
    fn send(&self, command: Command<S>) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
        let _ = sys::signal(&self.wake);
    }
}

impl<S> Drop for QueueHandle<S> {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = sys::signal(&self.wake);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a queue's thread panicked");
        }
    }
}

/// The queue's side.
struct QueueThread<S> {
    index: u16,
    device: Arc<VirtioBlk>,
    interrupt: Arc<dyn Interrupt>,
    poll: Duration,
    inbox: Receiver<Command<S>>,
    outbox: Sender<Reply>,
    wake: File,
}

impl<S: MemorySource> QueueThread<S> {
    fn serve(self) {
        while let Ok(command) = self.inbox.recv() {
            let reply = match command {
                Command::Start(setup) => {
                    let (worker, kick) = match self.prepare(*setup) {
                        Ok(ready) => ready,
                        Err(error) => {
                            let text = format!("queue {}: {error}", self.index);
                            let _ = self.outbox.send(Reply::Started(Err(text)));
                            continue;
                        }
                    };
                    let _ = self.outbox.send(Reply::Started(Ok(())));
                    Reply::Stopped(Some(self.run(worker, &kick)))
                }
                Command::Stop(_) => Reply::Stopped(None),
            };
            let _ = self.outbox.send(reply);
        }
    }

    /// Makes the worker and resubmits what an earlier process left unfinished.
    fn prepare(&self, setup: QueueSetup<S>) -> Result<(BlkWorker<S>, File), virtio_devices::Error> {
        let interrupt = Arc::clone(&self.interrupt);
        let mut worker =
            self.device
                .queue_worker(self.index, &setup.queue, setup.memory, interrupt)?;
        if let Some(tracker) = setup.tracker {
            worker.set_inflight_tracker(tracker);
        }
        if let Some(heads) = setup.resubmit {
            if !heads.is_empty() {
                tracing::info!(queue = self.index, requests = heads.len(), "resubmitting");
            }
            worker.resubmit(&heads)?;
        }
        Ok((worker, setup.kick))
    }

    /// Runs the ring until the control thread wants it to stop, then drains it.
    fn run(&self, mut worker: BlkWorker<S>, kick: &File) -> u16 {
        let how = loop {
            let result = if self.poll.is_zero() {
                worker
                    .run(kick.as_fd(), self.wake.as_fd())
                    .map_err(|error| error.to_string())
            } else {
                self.run_polled(&mut worker, kick)
                    .map_err(|error| error.to_string())
            };
            if let Err(error) = result {
                tracing::error!(queue = self.index, error, "the queue has stopped");
                let _ = sys::poll([(self.wake.as_fd(), libc::POLLIN)], None);
            }
            // A command is sent before the descriptor is written, so what woke us is there now,
            // unless it was the start of this ring itself.
            sys::clear(&self.wake);
            match self.inbox.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(Command::Stop(how)) => break how,
                Ok(Command::Start(_)) | Err(TryRecvError::Disconnected) => break Stop::Drain,
            }
        };
        let stopped = match how {
            Stop::Drain => worker.drain(),
            Stop::Reset => worker.reset(),
        };
        if let Err(error) = stopped {
            tracing::error!(queue = self.index, %error, "the queue cannot be drained");
        }
        worker.queue_state().next_avail
    }

    /// As [`BlkWorker::run`], but looks at the rings for a while before it goes to sleep.
    fn run_polled(&self, worker: &mut BlkWorker<S>, kick: &File) -> io::Result<()> {
        let mut done = self.work_done();
        let mut until = Instant::now() + self.poll;
        loop {
            let progress = worker.process();
            let now = self.work_done();
            if now != done || progress == Progress::More {
                done = now;
                until = Instant::now() + self.poll;
            }
            let sleep = (Instant::now() < until).then(Instant::now);
            let [_, rung, woken] = sys::poll(
                [
                    (worker.notifier(), libc::POLLIN),
                    (kick.as_fd(), libc::POLLIN),
                    (self.wake.as_fd(), libc::POLLIN),
                ],
                sleep,
            )?;
            if woken != 0 {
                return Ok(());
            }
            if rung != 0 {
                sys::clear(kick);
            }
        }
    }

    /// Changes when the queue has done something.
    fn work_done(&self) -> u64 {
        let Some(stats) = self.device.stats(self.index) else {
            return 0;
        };
        let ended: u64 = Op::ALL.iter().map(|op| stats.op(*op).completed()).sum();
        ended + stats.batches()
    }
}
