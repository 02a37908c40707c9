//! A vhost-user server for one virtio-blk device.
//!
//! ```text
//!  VMM (front end)                    VhostUserBlkServer
//!  ───────────────                    ──────────────────────────────────────────────
//!  messages on the socket  ◄───────►  control thread: run(), one session a connection
//!                                        │ start, stop (drain)
//!  guest memory, rings, kick  ─────►     ▼
//!  call, inflight memfd    ◄───────   platter-vq0 … platter-vqN: BlkWorker over AsyncIo
//! ```
//!
//! # The life of a connection
//!
//! One front end at a time. The control thread reads a message, does it, answers, reads the next.
//! A ring starts when it has a kick descriptor and is enabled; its thread then makes a
//! [`BlkWorker`](virtio_devices::virtio_blk::BlkWorker) and stays in it. Whatever a running ring
//! depends on changes only while it is stopped: for a new memory table the control thread drains the
//! rings, swaps the table and starts them again at the same index. `GET_VRING_BASE` is the same
//! drain without a new start. When the connection ends, in whatever way, every ring is drained, the
//! front end's memory and descriptors are given up, the device is reset, and the server listens
//! again; the disk stays open.
//!
//! # Why not `vhost-user-backend`, and how much of `vhost`
//!
//! - Its vring threads drive a backend object that must be `Send + Sync`. Our data plane
//!   ([`AsyncIo`](block::io::AsyncIo)) is made on the queue's thread and never leaves it: an
//!   io_uring with `SINGLE_ISSUER` has one owner.
//! - It answers `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD` with "not supported", and without those a
//!   crash loses requests.
//! - The `vhost` crate's own `BackendReqHandler` is closer, but its back-end channel cannot send
//!   `CONFIG_CHANGE_MSG` (nor is the descriptor to be had), a peer that stops in the middle of a
//!   message holds its thread for good, and after an error it cannot say whether the stream is
//!   still in step.
//!
//! So framing and dispatch are here, in the two small modules `message` and `session`; the message
//! payloads, request numbers and feature bits are the `vhost` crate's, and its front end is what
//! the tests drive the server with.
//!
//! # A hostile front end
//!
//! It shares memory with us, so it can always destroy its own guest's data. Beyond that it loses at
//! most its connection: sizes, counts and indices of messages are checked before use; at most 32
//! descriptors and 4 KiB come with a message; a message that was begun must end within ten seconds;
//! descriptors are made non-blocking; memory regions must lie in their file and must not overlap;
//! dirty log and inflight area must be sealed memfds. A guest memory file that shrinks after it was
//! mapped costs the connection as well: see the module `memory`.
//!
//! # Restart
//!
//! An orderly stop drains, flushes and closes the disk; a front end that reconnects to the next
//! server continues where it was. After SIGKILL the next server finds in the inflight area which
//! requests were not finished and does them again, in order. What requests that *were* finished
//! left on the disk is the disk's matter: with cached tables and without the `restartable` option
//! of [`block`], a kill is a power cut. A new server must not touch the image before the old one is
//! gone: opening the disk takes the image's lock, and that happens before the server exists.

mod inflight;
mod memory;
mod message;
mod notify;
mod rings;
mod session;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use block::AsyncDiskFile;
use virtio_devices::{
    Interrupt,
    virtio_blk::{VirtioBlk, VirtioBlkConfig},
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use memory::{DirtyPages, MAX_REGIONS, VhostUserMemory, VhostUserRegion};

use crate::{queue_thread::QueueHandle, socket::Listening, sys};
use notify::Notifier;
use session::{End, Session};

/// A [`std::result::Result`] with the error of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a server or a connection. A connection's error ends that connection and
/// is logged; [`VhostUserBlkServer::run`] returns only errors of the server itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket cannot be listened on.
    #[error("{}: {text}", path.display())]
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
    /// A message of the front end that cannot be served.
    #[error("vhost-user message {request} {text}")]
    Message {
        /// The number of the request.
        request: u32,
        /// What is wrong with it.
        text: String,
    },
    /// A system call failed, or the front end broke the connection.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The disk cannot be flushed or closed.
    #[error("{0}")]
    Disk(#[from] block::Error),
    /// The device cannot be made or flushed.
    #[error("{0}")]
    Device(#[from] virtio_devices::Error),
    /// The server was asked to stop.
    #[error("stopped")]
    Stopped,
}

/// How a server is made.
#[derive(Clone, Debug, Default)]
pub struct VhostUserBlkConfig {
    /// The device: queues, serial number, read-only and more. As with QEMU's own export there is
    /// one queue unless more are asked for; a front end may use fewer. `queue_size` is the largest
    /// ring that is accepted.
    pub device: VirtioBlkConfig,
    /// How long a queue's thread looks at its ring before it sleeps; zero sleeps at once. Costs a
    /// core a queue while there is work.
    pub poll: Duration,
    /// End after the first connection.
    pub once: bool,
}

/// Asks a server to stop, from any thread or from a signal handler.
#[derive(Debug)]
pub struct StopHandle(File);

impl StopHandle {
    /// The server ends its connection, drains, flushes, closes the disk and returns.
    ///
    /// # Errors
    /// The host's error when the eventfd cannot be written.
    pub fn stop(&self) -> io::Result<()> {
        sys::signal(&self.0)
    }

    /// Another handle of the same server.
    ///
    /// # Errors
    /// The host's error when there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

/// SIGTERM and SIGINT, blocked so that a server can take them as its stop.
#[derive(Debug)]
pub struct StopSignals(sys::StopSignals);

impl StopSignals {
    /// Blocks both signals in this thread and every thread that it starts from now on. To be called
    /// first thing in `main`: a thread that exists already would still be killed by them.
    ///
    /// # Errors
    /// The host's error.
    pub fn block() -> io::Result<Self> {
        Ok(Self(sys::StopSignals::block()?))
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What ends a server: one descriptor that is readable as soon as any source is.
#[derive(Debug)]
struct StopSources {
    epoll: Epoll,
    event: File,
    signals: Option<StopSignals>,
}

impl StopSources {
    fn new() -> io::Result<Self> {
        let sources = Self {
            epoll: Epoll::new()?,
            event: sys::event()?,
            signals: None,
        };
        sources.add(sources.event.as_fd())?;
        Ok(sources)
    }

    fn add(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }
}

impl AsFd for StopSources {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.epoll`, which the borrow keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.epoll.as_raw_fd()) }
    }
}

/// A vhost-user server for one disk. See the [module](self).
pub struct VhostUserBlkServer {
    listening: Listening,
    disk: Box<dyn AsyncDiskFile>,
    device: Arc<VirtioBlk>,
    config: VhostUserBlkConfig,
    stop: StopSources,
}

impl VhostUserBlkServer {
    /// A server that listens at `path`. A socket file that nobody listens on is replaced; the new
    /// one is removed when the server ends.
    ///
    /// # Errors
    /// [`Error::Listen`] when something else is there; what [`VirtioBlk::new`] says of the
    /// configuration.
    pub fn bind(
        path: impl AsRef<Path>,
        disk: Box<dyn AsyncDiskFile>,
        config: VhostUserBlkConfig,
    ) -> Result<Self> {
        // The device first: a wrong configuration leaves no socket behind.
        let device = VirtioBlk::new(disk.clone_async(), config.device.clone())?;
        let path = path.as_ref();
        let listening = Listening::bind(path).map_err(|text| Error::Listen {
            path: path.to_owned(),
            text,
        })?;
        Self::with(listening, disk, device, config)
    }

    /// A server on a socket that listens already, as a service manager hands one over.
    ///
    /// # Errors
    /// What [`VirtioBlk::new`] says of the configuration.
    pub fn from_listener(
        listener: UnixListener,
        disk: Box<dyn AsyncDiskFile>,
        config: VhostUserBlkConfig,
    ) -> Result<Self> {
        let device = VirtioBlk::new(disk.clone_async(), config.device.clone())?;
        Self::with(Listening::adopt(listener)?, disk, device, config)
    }

    fn with(
        listening: Listening,
        disk: Box<dyn AsyncDiskFile>,
        device: Arc<VirtioBlk>,
        config: VhostUserBlkConfig,
    ) -> Result<Self> {
        Ok(Self {
            listening,
            disk,
            device,
            config,
            stop: StopSources::new()?,
        })
    }

    /// A handle that stops this server.
    ///
    /// # Errors
    /// The host's error when there is no descriptor left.
    pub fn stop_handle(&self) -> Result<StopHandle> {
        Ok(StopHandle(self.stop.event.try_clone()?))
    }

    /// Takes these signals as a stop.
    ///
    /// # Errors
    /// The host's error.
    pub fn stop_on(&mut self, signals: StopSignals) -> Result<()> {
        self.stop.add(signals.0.as_fd())?;
        self.stop.signals = Some(signals);
        Ok(())
    }

    /// The device: its counters, and its size, which can be changed while the server runs.
    #[must_use]
    pub fn device(&self) -> &Arc<VirtioBlk> {
        &self.device
    }

    /// Serves front ends, one after the other, until the server is stopped (or, with
    /// [`once`](VhostUserBlkConfig::once), the first is gone). Then flushes and closes the disk.
    ///
    /// # Errors
    /// When threads or descriptors cannot be had, and when the disk cannot be flushed or closed:
    /// then data may be lost. Never because of what a front end does.
    pub fn run(self) -> Result<()> {
        let notifier = Arc::new(Notifier::new(self.config.device.num_queues));
        let listener = Arc::clone(&notifier);
        self.device.on_config_change(move || {
            if let Err(error) = listener.signal_config() {
                tracing::warn!(%error, "the front end was not told of the new configuration");
            }
        });
        let mut queues = Vec::new();
        for index in 0..self.config.device.num_queues {
            let device = Arc::clone(&self.device);
            let interrupt: Arc<dyn Interrupt> = Arc::<Notifier>::clone(&notifier);
            queues.push(QueueHandle::spawn(
                index,
                device,
                interrupt,
                self.config.poll,
            )?);
        }
        let served = self.serve(&mut queues, &notifier);
        // The path is free for a successor, which then waits for the image's lock.
        drop(self.listening);
        drop(queues);
        let closed = self.device.flush().map_err(Error::from);
        let closed = closed.and(self.disk.close().map_err(Error::from));
        served.and(closed)
    }

    fn serve(
        &self,
        queues: &mut [QueueHandle<Arc<VhostUserMemory>>],
        notifier: &Notifier,
    ) -> Result<()> {
        loop {
            let [waiting, stop] = sys::poll(
                [
                    (self.listening.as_fd(), libc::POLLIN),
                    (self.stop.as_fd(), libc::POLLIN),
                ],
                None,
            )?;
            if stop != 0 {
                return Ok(());
            }
            if waiting == 0 {
                continue;
            }
            let socket = match self.listening.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => continue,
                Err(error) => {
                    // No descriptors left, for instance. It may pass; a busy loop does not help.
                    tracing::warn!(%error, "a connection cannot be taken");
                    let again = sys::after(Duration::from_millis(100));
                    sys::poll([(self.stop.as_fd(), libc::POLLIN)], Some(again))?;
                    continue;
                }
            };
            tracing::debug!("front end connected");
            let session = Session::new(socket, &self.device, queues, notifier, self.stop.as_fd())?;
            let end = session.serve();
            match &end {
                Ok(end) => tracing::debug!(?end, "front end gone"),
                Err(error) => tracing::warn!(%error, "connection ended"),
            }
            match end {
                Ok(End::Stopped) => return Ok(()),
                // Somebody who only looked whether we are here was no front end.
                Ok(End::Closed { messages: 0 }) => {}
                _ if self.config.once => return Ok(()),
                _ => {}
            }
        }
    }
}
