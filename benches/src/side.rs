//! The sides of a comparison, and the thread that a side inside this process runs on.

use std::{
    sync::mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    Result,
    cpu::{self, Of},
};

/// What a side did in one slice of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slice {
    /// Accesses completed.
    pub ios: u64,
    /// How long it took.
    pub wall: Duration,
    /// Processor time of the thread that drives the accesses.
    pub thread_cpu: Duration,
    /// Processor time of everything that worked for them, kernel workers included.
    pub all_cpu: Duration,
}

impl Slice {
    /// Accesses a second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.ios as f64 / self.wall.as_secs_f64()
    }

    /// Nanoseconds of processor time an access; of everything with `all`, else of the thread.
    #[must_use]
    pub fn cpu_per_io(&self, all: bool) -> f64 {
        let cpu = if all { self.all_cpu } else { self.thread_cpu };
        cpu.as_nanos() as f64 / self.ios as f64
    }
}

/// One of two things that are compared.
pub trait Side {
    /// Works for about `length`. `seed` decides the offsets.
    ///
    /// # Errors
    /// Any failed access.
    fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice>;
}

/// When a load ends.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// At this time.
    At(Instant),
    /// After this many accesses.
    After(u64),
}

impl Stop {
    /// Whether it is time to stop, after `started` accesses.
    #[must_use]
    pub fn reached(self, started: u64) -> bool {
        match self {
            Stop::At(end) => Instant::now() >= end,
            Stop::After(ios) => started >= ios,
        }
    }
}

/// A load that one thread of this process drives.
pub trait Load {
    /// Works until it is time to stop, and until everything in flight has ended. Returns how many
    /// accesses completed.
    ///
    /// # Errors
    /// Any failed access.
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64>;
}

struct Command {
    stop: StopIn,
    seed: u64,
}

enum StopIn {
    Time(Duration),
    Ios(u64),
}

/// A [`Load`] on a thread of its own.
pub struct OnThread {
    commands: Option<Sender<Command>>,
    slices: Receiver<Result<Slice>>,
    thread: Option<JoinHandle<()>>,
}

impl OnThread {
    /// Starts the thread; `make` makes the load on it.
    ///
    /// # Errors
    /// Those of `make`, and the host's when there is no thread to be had.
    pub fn start<L: Load>(make: impl FnOnce() -> Result<L> + Send + 'static) -> Result<Self> {
        let (commands, to_do) = mpsc::channel::<Command>();
        let (done, slices) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("load".to_owned())
            .spawn(move || {
                let mut load = match make() {
                    Ok(load) => load,
                    Err(error) => {
                        let _ = done.send(Err(error));
                        return;
                    }
                };
                let _ = done.send(Ok(Slice::default()));
                for command in to_do {
                    if done.send(timed(&mut load, &command)).is_err() {
                        return;
                    }
                }
            })?;
        let mut this = Self {
            commands: Some(commands),
            slices,
            thread: Some(thread),
        };
        this.end()?;
        Ok(this)
    }

    /// Works for a number of accesses.
    ///
    /// # Errors
    /// Any failed access.
    pub fn ios(&mut self, ios: u64, seed: u64) -> Result<Slice> {
        self.send(StopIn::Ios(ios), seed)?;
        self.end()
    }

    /// Begins to work for about `length`; [`Self::end`] tells what was done.
    ///
    /// # Errors
    /// When the thread is gone.
    pub(crate) fn begin(&self, length: Duration, seed: u64) -> Result<()> {
        self.send(StopIn::Time(length), seed)
    }

    /// Waits for the end of what was begun.
    ///
    /// # Errors
    /// Any failed access.
    pub(crate) fn end(&mut self) -> Result<Slice> {
        let slice = self.slices.recv();
        slice.map_err(|_| "the thread of the load ended: it panicked")?
    }

    fn send(&self, stop: StopIn, seed: u64) -> Result<()> {
        let sent = match &self.commands {
            Some(commands) => commands.send(Command { stop, seed }).is_ok(),
            None => false,
        };
        if sent {
            return Ok(());
        }
        Err("the thread of the load ended: it panicked".into())
    }
}

impl Side for OnThread {
    fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice> {
        self.begin(length, seed)?;
        self.end()
    }
}

impl Drop for OnThread {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn timed(load: &mut impl Load, command: &Command) -> Result<Slice> {
    let (thread, all) = (cpu::time(Of::Thread), cpu::time(Of::Process));
    let start = Instant::now();
    let stop = match command.stop {
        StopIn::Time(length) => Stop::At(start + length),
        StopIn::Ios(ios) => Stop::After(ios),
    };
    let ios = load.run(stop, command.seed)?;
    Ok(Slice {
        ios,
        wall: start.elapsed(),
        thread_cpu: cpu::time(Of::Thread) - thread,
        all_cpu: cpu::time(Of::Process) - all,
    })
}
