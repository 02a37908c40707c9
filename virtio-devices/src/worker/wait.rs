//! How a worker waits: in the data plane of its only disk, or beside those of several.

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
    /// Left over from an earlier run: it ends when it fires.
    stale: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Kick,
    Stop,
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
        let result = if self.single {
            self.run_inside(kick, stop)
        } else {
            self.run_beside(kick, stop)
        };
        self.polling.enabled = false;
        result
    }

    /// [`run`](Self::run) for one disk: waits in its data plane.
    fn run_inside(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        for watch in &mut self.watches {
            watch.stale = true;
        }
        self.watch(kick, Role::Kick)?;
        self.watch(stop, Role::Stop)?;
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
            self.wait(timeout)?;
            if alone && progress == Progress::Idle {
                self.polling.slept(start.elapsed());
            }
        }
    }

    /// [`run`](Self::run) for several disks: waits for their notifiers beside the descriptors.
    fn run_beside(&mut self, kick: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let mut doorbell =
            File::from(
                kick.try_clone_to_owned()
                    .map_err(|source| Error::Descriptor {
                        what: "doorbell",
                        source,
                    })?,
            );
        loop {
            let progress = self.process();
            let timeout = match progress {
                Progress::More => Some(Duration::ZERO),
                Progress::Idle => self.idle_timeout(),
            };
            let (start, alone) = (Instant::now(), self.in_flight() == 0);
            let [rung, stopped] = self.wait_beside([kick, stop], timeout)?;
            if alone && progress == Progress::Idle {
                self.polling.slept(start.elapsed());
            }
            if stopped {
                return Ok(());
            }
            if rung {
                // It is readable and ours alone while we run, so this does not block.
                let _ = doorbell.read(&mut [0; 8]);
            }
        }
    }

    /// Waits for any data plane.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        if self.single
            && let Some(Some(plane)) = self.batch.planes.first_mut()
        {
            plane.io.wait(timeout)?;
            return Ok(());
        }
        // What was parked by something else than a disk is looked at again soon.
        let soon = Duration::from_millis(1);
        let timeout = timeout.map_or(soon, |timeout| timeout.min(soon));
        self.wait_beside([], Some(timeout)).map(|_| ())
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

    fn watch(&mut self, fd: BorrowedFd<'_>, role: Role) -> Result<()> {
        let file = fd
            .try_clone_to_owned()
            .map_err(|source| Error::Descriptor {
                what: match role {
                    Role::Kick => "doorbell",
                    Role::Stop => "stop descriptor",
                },
                source,
            })?;
        self.next_watch += 1;
        let id = self.next_watch;
        let file = File::from(file);
        self.watch_with(file.as_fd(), id)?;
        self.watches.push(Watch {
            id,
            file,
            role,
            stale: false,
        });
        Ok(())
    }

    fn watch_with(&mut self, fd: BorrowedFd<'_>, id: u64) -> block::Result<()> {
        match self.batch.planes.first_mut() {
            Some(Some(plane)) => plane.io.watch(fd, id),
            _ => Err(block::Error::unsupported("watch: the worker has no disk")),
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
                self.next_watch += 1;
                watch.id = self.next_watch;
                match self.watch_with(watch.file.as_fd(), watch.id) {
                    Ok(()) => self.watches.push(watch),
                    Err(error) => self.watch_error = Some(error),
                }
            }
        }
    }
}
