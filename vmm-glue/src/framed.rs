//! Messages with descriptors on a stream socket, with time limits: what vhost-user and vfio-user share.
//!
//! A peer has [`PATIENCE`] to finish a message it began and to take a reply, so that one that stalls in
//! the middle loses its connection and not our thread.

use std::{
    fs::File,
    io::{self, Read},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, RawFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::sys;

/// How long a peer may take for the rest of a message it began, or to take a reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why nothing was transferred.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The server is to stop.
    Stopped,
    /// The host's error; `TimedOut` when the peer stalled.
    Io(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Io(error)
    }
}

/// One end of a connection. `stop` becoming readable ends every wait.
#[derive(Debug)]
pub(crate) struct Framed {
    socket: UnixStream,
}

impl AsFd for Framed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Framed {
    /// Over a connected socket.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Ends the connection for both sides; whoever waits for the peer finds it gone.
    pub(crate) fn shut_down(&self) {
        // It may be gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// When the message that begins now has to be over.
    pub(crate) fn deadline() -> Instant {
        sys::after(PATIENCE)
    }

    /// Reads the header of a message with up to `FDS` descriptors; `None` at the end of the stream.
    pub(crate) fn receive_header<const FDS: usize>(
        &self,
        header: &mut [u8],
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Option<Vec<File>>, Broken> {
        let (first, files) = loop {
            let mut fds: [RawFd; FDS] = [-1; FDS];
            let mut vectors = [libc::iovec {
                iov_base: header.as_mut_ptr().cast(),
                iov_len: header.len(),
            }];
            // SAFETY: the vector describes `header`, bytes that may have any value.
            match unsafe { self.socket.recv_with_fds(&mut vectors, &mut fds) } {
                Ok((bytes, count)) => {
                    let files = fds.iter().take(count).map(|fd| {
                        sys::set_cloexec(*fd);
                        // SAFETY: the kernel made this descriptor for us in this very call.
                        unsafe { File::from_raw_fd(*fd) }
                    });
                    break (bytes, files.collect());
                }
                Err(error) => self.wait(io::Error::from(error), libc::POLLIN, stop, deadline)?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        self.fill(&mut header[first..], stop, deadline)?;
        Ok(Some(files))
    }

    /// Reads exactly as many bytes as `buf` has.
    pub(crate) fn fill(
        &self,
        mut buf: &mut [u8],
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), Broken> {
        while !buf.is_empty() {
            match (&self.socket).read(buf) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(bytes) => buf = &mut buf[bytes..],
                Err(error) => self.wait(error, libc::POLLIN, stop, deadline)?,
            }
        }
        Ok(())
    }

    /// Sends a message; the descriptors go with its first byte.
    pub(crate) fn send(
        &self,
        message: &[u8],
        fds: &[RawFd],
        stop: BorrowedFd<'_>,
    ) -> Result<(), Broken> {
        let deadline = Self::deadline();
        let mut rest = message;
        while !rest.is_empty() {
            let fds = if rest.len() == message.len() {
                fds
            } else {
                &[]
            };
            match self.socket.send_with_fds(&[rest], fds) {
                Ok(count) => rest = &rest[count..],
                Err(error) => self.wait(error.into(), libc::POLLOUT, stop, deadline)?,
            }
        }
        Ok(())
    }

    /// Sends a message without waiting for anything: one that does not fit into the socket's buffer
    /// at once is an error.
    pub(crate) fn send_now(&self, message: &[u8]) -> io::Result<()> {
        let sent = self.socket.send_with_fds(&[message], &[])?;
        if sent == message.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// After a call that did not go through: waits until it may, or returns its error.
    fn wait(
        &self,
        error: io::Error,
        events: i16,
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), Broken> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock => {}
            _ => return Err(error.into()),
        }
        let fds = [(self.socket.as_fd(), events), (stop, libc::POLLIN)];
        let [ready, stopped] = sys::poll(fds, Some(deadline))?;
        if stopped != 0 {
            return Err(Broken::Stopped);
        }
        if ready == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        Ok(())
    }
}
