//! Messages on the socket: framing, descriptors, time limits.
//!
//! A message is a header of three 32-bit words (request, flags, size of the body), all in the
//! byte order of the machine, and the body; descriptors travel with the first byte. A peer has
//! [`PATIENCE`] to finish a message it began and to take a reply, so that one that stalls in the
//! middle loses its connection and not our thread.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vm_memory::ByteValued;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Error;
use crate::sys;

/// How long a peer may take for the rest of a message it began, or to take a reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// The length of a header.
const HEADER: usize = 12;
/// The version of the protocol, in the lowest two bits of the flags.
const VERSION: u32 = 1;
/// Flag: the message is a reply.
const REPLY: u32 = 1 << 2;
/// Flag: the sender wants an answer even where the message has none of its own.
const NEED_REPLY: u32 = 1 << 3;

/// A message from the front end.
#[derive(Debug)]
pub(super) struct Message {
    /// What is asked for: `VHOST_USER_…`.
    pub(super) request: u32,
    /// Whether the sender set `VHOST_USER_NEED_REPLY`.
    pub(super) need_reply: bool,
    /// The payload.
    pub(super) body: Vec<u8>,
    /// The attached descriptors; what is not taken out is closed.
    pub(super) files: Vec<File>,
}

impl Message {
    /// The body as a structure of exactly that size.
    pub(super) fn payload<T: ByteValued>(&self) -> Result<T, Error> {
        let mut value = T::zeroed();
        if self.body.len() != size_of::<T>() {
            return Err(self.bad(format!(
                "has {} bytes, {} are due",
                self.body.len(),
                size_of::<T>()
            )));
        }
        value.as_mut_slice().copy_from_slice(&self.body);
        Ok(value)
    }

    /// The one attached descriptor.
    pub(super) fn file(&mut self) -> Result<File, Error> {
        match (self.files.pop(), self.files.len()) {
            (Some(file), 0) => Ok(file),
            (_, others) => Err(self.bad(format!("has {others} descriptors, one is due"))),
        }
    }

    /// An error about this message.
    pub(super) fn bad(&self, text: impl Into<String>) -> Error {
        Error::Message {
            request: self.request,
            text: text.into(),
        }
    }
}

/// What came from the socket.
#[derive(Debug)]
pub(super) enum Received {
    /// A message.
    Message(Message),
    /// The front end closed the connection.
    Closed,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    /// A channel over a connected socket.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Reads one message. To be called when the socket is readable. `stop` becoming readable ends
    /// the wait for the rest of a message.
    pub(super) fn receive(&mut self, stop: BorrowedFd<'_>) -> Result<Received, Error> {
        let deadline = sys::after(PATIENCE);
        let mut header = [0u8; HEADER];
        let Some((first, files)) = self.receive_files(&mut header, stop, deadline)? else {
            return Ok(Received::Closed);
        };
        self.fill(&mut header[first..], stop, deadline)?;
        let word = |at: usize| {
            let mut bytes = [0u8; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        let mut message = Message {
            request,
            need_reply: flags & NEED_REPLY != 0,
            body: Vec::new(),
            files,
        };
        if flags & 3 != VERSION || flags & REPLY != 0 {
            return Err(message.bad(format!("has flags {flags:#x}")));
        }
        if size > MAX_MSG_SIZE {
            return Err(message.bad(format!(
                "announces {size} bytes, {MAX_MSG_SIZE} are the most"
            )));
        }
        message.body.resize(size, 0);
        self.fill(&mut message.body, stop, deadline)?;
        Ok(Received::Message(message))
    }

    /// Reads the first bytes of a message with its descriptors; `None` at the end of the stream.
    fn receive_files(
        &mut self,
        buf: &mut [u8],
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Option<(usize, Vec<File>)>, Error> {
        loop {
            let mut fds: [RawFd; MAX_ATTACHED_FD_ENTRIES] = [-1; MAX_ATTACHED_FD_ENTRIES];
            let mut vectors = [libc::iovec {
                iov_base: buf.as_mut_ptr().cast(),
                iov_len: buf.len(),
            }];
            // SAFETY: the vector describes `buf`, bytes that may have any value.
            let received = unsafe { self.socket.recv_with_fds(&mut vectors, &mut fds) };
            match received {
                Ok((bytes, count)) => {
                    let files = fds
                        .iter()
                        .take(count)
                        .map(|fd| {
                            sys::set_cloexec(*fd);
                            // SAFETY: the kernel made this descriptor for us in this very call.
                            unsafe { File::from_raw_fd(*fd) }
                        })
                        .collect();
                    return Ok((bytes > 0).then_some((bytes, files)));
                }
                Err(error) => self.wait(io::Error::from(error), libc::POLLIN, stop, deadline)?,
            }
        }
    }

    /// Reads exactly as many bytes as `buf` has.
    fn fill(
        &mut self,
        mut buf: &mut [u8],
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), Error> {
        while !buf.is_empty() {
            match self.socket.read(buf) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(bytes) => buf = &mut buf[bytes..],
                Err(error) => self.wait(error, libc::POLLIN, stop, deadline)?,
            }
        }
        Ok(())
    }

    /// After a call that did not go through: waits until it may, or returns its error.
    fn wait(
        &self,
        error: io::Error,
        events: i16,
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), Error> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock => {}
            _ => return Err(error.into()),
        }
        let [ready, stopped] = sys::poll(
            [(self.socket.as_fd(), events), (stop, libc::POLLIN)],
            Some(deadline),
        )?;
        if stopped != 0 {
            return Err(Error::Stopped);
        }
        if ready == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        Ok(())
    }

    /// Answers a message.
    pub(super) fn reply(
        &mut self,
        request: u32,
        body: &[u8],
        file: Option<&File>,
        stop: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let bytes = encode(request, REPLY | VERSION, body)?;
        let deadline = sys::after(PATIENCE);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let fds = match file {
                Some(file) if rest.len() == bytes.len() => &[file.as_raw_fd()][..],
                _ => &[],
            };
            match self.socket.send_with_fds(&[rest], fds) {
                Ok(count) => rest = &rest[count..],
                Err(error) => self.wait(error.into(), libc::POLLOUT, stop, deadline)?,
            }
        }
        Ok(())
    }

    /// Sends a message of ours, without waiting for anything: one that does not fit into the
    /// socket's buffer at once is an error.
    pub(super) fn notify(&self, request: u32) -> io::Result<()> {
        let bytes = encode(request, VERSION, &[]).map_err(|_| io::ErrorKind::InvalidData)?;
        let sent = self.socket.send_with_fds(&[bytes.as_slice()], &[])?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }
}

/// A message as it goes over the socket.
fn encode(request: u32, flags: u32, body: &[u8]) -> Result<Vec<u8>, Error> {
    let size =
        u32::try_from(body.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    Ok(bytes)
}
