//! A vfio-user server: a PCI function in a process of its own, for any VMM that speaks vfio-user.
//!
//! The session reads one message after the other and answers in order. Memory is exchanged while
//! the device is paused: nothing it has begun reaches into memory that the client has unmapped.

mod device;
mod interrupts;
mod memory;
mod message;
mod migration;
mod nvme;
mod poll;
mod session;
mod stream;

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use vm_memory::GuestMemoryAtomic;

pub use interrupts::VfioUserInterrupts;
pub use memory::{VfioUserMemory, VfioUserRegion, WriteBack, Written};
pub use nvme::{NvmeFunction, NvmeFunctionConfig};

use crate::{socket::Listening, sys};

pub use crate::{pci::PausableFunction, vhost_user::StopSignals};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket cannot be listened on.
    #[error("{path}: {text}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why not.
        text: String,
    },
    /// The client broke the protocol; it costs the connection.
    #[error("client: {0}")]
    Client(String),
    /// The host.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The device.
    #[error(transparent)]
    Device(#[from] virtio_devices::Error),
}

/// A server on one socket, for one client at a time.
pub struct VfioUserServer {
    listening: Listening,
    function: Arc<dyn PausableFunction>,
    memory: GuestMemoryAtomic<VfioUserMemory>,
    interrupts: Arc<VfioUserInterrupts>,
    stop: std::fs::File,
    signals: Option<StopSignals>,
    once: bool,
}

/// Stops a server from another thread.
#[derive(Debug)]
pub struct StopHandle(std::fs::File);

impl StopHandle {
    /// Asks the server to stop.
    pub fn stop(&self) {
        let _ = sys::signal(&self.0);
    }
}

impl VfioUserServer {
    /// Listens at `path`. `function` uses `memory` and `interrupts`.
    ///
    /// # Errors
    /// [`Error::Listen`] when somebody else listens there, or it is no socket.
    pub fn bind(
        path: &Path,
        function: Arc<dyn PausableFunction>,
        memory: GuestMemoryAtomic<VfioUserMemory>,
        interrupts: Arc<VfioUserInterrupts>,
    ) -> Result<Self, Error> {
        let listening = Listening::bind(path).map_err(|text| Error::Listen {
            path: path.to_owned(),
            text,
        })?;
        Ok(Self {
            listening,
            function,
            memory,
            interrupts,
            stop: sys::event()?,
            signals: None,
            once: false,
        })
    }

    /// Ends after the first client.
    pub fn once(&mut self, once: bool) {
        self.once = once;
    }

    /// Also stops on SIGTERM and SIGINT.
    pub fn stop_on(&mut self, signals: StopSignals) {
        self.signals = Some(signals);
    }

    /// A handle that stops it.
    ///
    /// # Errors
    /// The host's.
    pub fn stop_handle(&self) -> Result<StopHandle, Error> {
        Ok(StopHandle(self.stop.try_clone()?))
    }

    /// Serves clients until it is stopped.
    ///
    /// # Errors
    /// The host's. What a client does costs only its connection.
    pub fn run(&mut self) -> Result<(), Error> {
        let ended = sys::event()?;
        std::thread::scope(|scope| {
            if let Some(signals) = &self.signals {
                let (stop, ended) = (&self.stop, &ended);
                scope.spawn(move || {
                    let fds = [
                        (signals.as_fd(), libc::POLLIN),
                        (ended.as_fd(), libc::POLLIN),
                    ];
                    if sys::poll(fds, None).is_ok_and(|ready| ready[0] != 0) {
                        let _ = sys::signal(stop);
                    }
                });
            }
            let result = self.serve();
            let _ = sys::signal(&ended);
            result
        })
    }

    fn serve(&self) -> Result<(), Error> {
        loop {
            let fds = [
                (self.listening.as_fd(), libc::POLLIN),
                (self.stop.as_fd(), libc::POLLIN),
            ];
            let [_, stopped] = sys::poll(fds, None)?;
            if stopped != 0 {
                return Ok(());
            }
            let Some(stream) = self.listening.accept()? else {
                continue;
            };
            let mut session = session::Session::new(
                stream,
                self.stop.as_fd(),
                Arc::clone(&self.function),
                self.memory.clone(),
                Arc::clone(&self.interrupts),
            )?;
            if let Err(error) = session.serve() {
                tracing::warn!(%error, "the connection has ended");
            }
            session.end();
            if self.once {
                return Ok(());
            }
        }
    }
}
