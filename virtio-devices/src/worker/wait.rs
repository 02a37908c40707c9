//! How a worker waits: in a data plane that wakes it for all of its disks, or beside them.
//!
//! The data planes of a thread mostly share one engine, and sleep in it together: then a wait is the
//! system call that submits. A worker without a disk, or with disks of several engines, waits in `poll(2)`
//! for the doorbell beside the notifiers. From then on completions are signalled to those, which costs
//! system calls of its own; so nobody asks for a notifier before it is needed.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::{Duration, Instant},
};

use super::{FrontEnd, Progress, Worker, batch::Plane};
use crate::{Error, Result};

/// A descriptor that wakes the worker. The duplicate keeps it open for as long as it is watched.
pub(super) struct Watch {
    id: u64,
    file: File,
    role: Role,
    /// The number of the data plane that watches it.
    plane: u64,
    /// Nobody waits for it any more: it ends when it fires.
    stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Kick,
    Stop,
}

impl Role {
    fn of(self, fd: BorrowedFd<'_>) -> Result<File> {
        let owned = fd.try_clone_to_owned();
        owned.map(File::from).map_err(|source| Error::Descriptor {
            what: match self {
                Role::Kick => "doorbell",
                Role::Stop => "stop descriptor",
            },
            source,
        })
    }
}

impl<F: FrontEnd> Worker<F> {
    /// Processes until `stop` becomes readable; `kick` is the guest's doorbell, an eventfd, which
    /// is read here. `stop` is not read. Requests in flight stay in flight: call
    /// [`drain`](Self::drain) before looking at the queue's state, or `run` again to go on.
    ///
    /// # Errors
    /// The host's error when a descriptor cannot be watched or waiting fails.
    pub fn run(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        self.stop_seen = false;
        self.polling.enabled = true;
        self.unwatch();
        let result = self.run_until(kick, stop);
        self.polling.enabled = false;
        result
    }

    fn run_until(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let mut doorbell = Role::Kick.of(kick)?;
        loop {
            let progress = self.process();
            if let Some(error) = self.watch_error.take() {
                return Err(error.into());
            }
            if self.stop_seen {
                return Ok(());
            }
            let timeout = match progress {
                Progress::More => Some(Duration::ZERO),
                Progress::Idle => self.idle_timeout(),
            };
            let (start, alone) = (Instant::now(), self.in_flight() == 0);
            let inside = self.watch_inside(kick, stop)?;
            if inside {
                self.wait_inside(timeout)?;
            } else {
                let [rung, stopped] = self.wait_beside([kick, stop], timeout)?;
                if stopped {
                    return Ok(());
                }
                if rung {
                    // It is readable and ours alone while we run, so this does not block.
                    let _ = doorbell.read(&mut [0; 8]);
                }
            }
            match (progress, alone) {
                (Progress::Idle, true) => self.polling.slept(start.elapsed()),
                (Progress::Idle, false) => self.polling.waited(),
                (Progress::More, _) => {}
            }
        }
    }

    /// A data plane that wakes the worker for all of them, if there is one.
    fn sleeper(&self) -> Option<u64> {
        if self.beside {
            return None;
        }
        let mut planes = self.batch.planes.iter().flatten();
        let first = planes.next()?;
        let place = first.io.sleeps_in();
        if !planes.all(|plane| place.is_some() && plane.io.sleeps_in() == place) {
            return None;
        }
        // What is watched in one of them stays there.
        let watching = self.inside.filter(|number| self.has_plane(*number));
        Some(watching.unwrap_or(first.number))
    }

    fn has_plane(&self, number: u64) -> bool {
        let mut planes = self.batch.planes.iter().flatten();
        planes.any(|plane| plane.number == number)
    }

    fn plane(&mut self, number: u64) -> Option<&mut Plane> {
        let mut planes = self.batch.planes.iter_mut().flatten();
        planes.find(|plane| plane.number == number)
    }

    /// Watches the descriptors in the data plane to sleep in; returns whether there is one.
    fn watch_inside(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<bool> {
        let sleeper = self.sleeper();
        if sleeper.is_some() && sleeper == self.inside {
            return Ok(true);
        }
        self.unwatch();
        let Some(plane) = sleeper else {
            return Ok(false);
        };
        let watched = self
            .watch(kick, Role::Kick, plane)
            .and_then(|()| self.watch(stop, Role::Stop, plane));
        match watched {
            Ok(()) => {
                self.inside = Some(plane);
                Ok(true)
            }
            // Somebody has asked for a notifier of this thread: it can only be waited for as well.
            Err(Error::Block(error))
                if !self.single && error.kind() == block::ErrorKind::Unsupported =>
            {
                self.unwatch();
                self.beside = true;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Nobody waits any more for what is watched. What fires after that is for nobody.
    fn unwatch(&mut self) {
        self.inside = None;
        let planes = &self.batch.planes;
        let is_there = |number| planes.iter().flatten().any(|it| it.number == number);
        self.watches.retain(|watch| is_there(watch.plane));
        for watch in &mut self.watches {
            watch.stale = true;
        }
    }

    /// Waits for any data plane.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        if self.single {
            return self.wait_inside(timeout);
        }
        // What was parked by something else than a disk is looked at again soon.
        let soon = Duration::from_millis(1);
        let timeout = timeout.map_or(soon, |timeout| timeout.min(soon));
        if self.sleeper().is_some() {
            return self.wait_inside(Some(timeout));
        }
        self.wait_beside([], Some(timeout)).map(|_| ())
    }

    /// Waits in a data plane, for what any of them has and for what is watched.
    fn wait_inside(&mut self, timeout: Option<Duration>) -> Result<()> {
        if let Some(number) = self.sleeper()
            && let Some(plane) = self.plane(number)
        {
            plane.io.wait_for_any(timeout)?;
        }
        Ok(())
    }

    /// Waits for any data plane, or for one of `fds`; returns which of those are readable.
    fn wait_beside<const N: usize>(
        &self,
        fds: [BorrowedFd<'_>; N],
        timeout: Option<Duration>,
    ) -> Result<[bool; N]> {
        let mut list: Vec<libc::pollfd> = fds
            .into_iter()
            .chain(self.notifiers())
            .map(|fd| libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        // SAFETY: `list` is an array of that many pollfd structures and outlives the call.
        let ready = unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            let source = io::Error::last_os_error();
            if source.kind() != io::ErrorKind::Interrupted {
                return Err(Error::Descriptor {
                    what: "waiting for requests",
                    source,
                });
            }
        }
        let mut readable = [false; N];
        for (out, entry) in readable.iter_mut().zip(&list) {
            *out = entry.revents != 0;
        }
        Ok(readable)
    }

    /// How long to wait: for ever, unless an interrupt is due before, or requests are left over
    /// and no completion will bring them up again.
    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        let stuck = |plane: &Plane| plane.in_flight == 0 && !plane.requests.is_empty();
        if self.batch.planes.iter().flatten().any(stuck) {
            return Some(Duration::from_millis(1));
        }
        let due = self.front.deadline()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, role: Role, plane: u64) -> Result<()> {
        let file = role.of(fd)?;
        self.next_watch += 1;
        let id = self.next_watch;
        self.watch_with(file.as_fd(), id, plane)?;
        self.watches.push(Watch {
            id,
            file,
            role,
            plane,
            stale: false,
        });
        Ok(())
    }

    fn watch_with(&mut self, fd: BorrowedFd<'_>, id: u64, plane: u64) -> block::Result<()> {
        match self.plane(plane) {
            Some(plane) => plane.io.watch(fd, id),
            None => Err(block::Error::unsupported("watch: the worker has no disk")),
        }
    }

    /// A watch is over: clear a doorbell and watch it again, or remember to stop.
    pub(super) fn woken(&mut self, id: u64) {
        let Some(at) = self.watches.iter().position(|watch| watch.id == id) else {
            return;
        };
        let mut watch = self.watches.swap_remove(at);
        if watch.stale {
            return;
        }
        match watch.role {
            Role::Stop => self.stop_seen = true,
            Role::Kick => {
                // It is readable and ours alone while we run, so this does not block.
                let _ = watch.file.read(&mut [0; 8]);
                if !self.has_plane(watch.plane) {
                    // It went meanwhile: another one watches before the worker sleeps.
                    return;
                }
                self.next_watch += 1;
                watch.id = self.next_watch;
                match self.watch_with(watch.file.as_fd(), watch.id, watch.plane) {
                    Ok(()) => self.watches.push(watch),
                    Err(error) => self.watch_error = Some(error),
                }
            }
        }
    }
}
