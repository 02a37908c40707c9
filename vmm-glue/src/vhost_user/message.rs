//! Messages on the socket.
//!
//! A message is a header of three 32-bit words (request, flags, size of the body), all in the
//! byte order of the machine, and the body; descriptors travel with the first byte.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vm_memory::ByteValued;

use super::Error;
use crate::framed::{Broken, Framed};

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

impl From<Broken> for Error {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Stopped => Error::Stopped,
            Broken::Io(error) => error.into(),
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Framed,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    /// A channel over a connected socket.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        let socket = Framed::new(socket)?;
        Ok(Self { socket })
    }

    /// Reads one message. To be called when the socket is readable. `stop` becoming readable ends
    /// the wait for the rest of a message.
    pub(super) fn receive(&mut self, stop: BorrowedFd<'_>) -> Result<Received, Error> {
        let deadline = Framed::deadline();
        let mut header = [0u8; HEADER];
        let files =
            self.socket
                .receive_header::<MAX_ATTACHED_FD_ENTRIES>(&mut header, stop, deadline)?;
        let Some(files) = files else {
            return Ok(Received::Closed);
        };
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
        self.socket.fill(&mut message.body, stop, deadline)?;
        Ok(Received::Message(message))
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
        let fds: Vec<_> = file.iter().map(|file| file.as_raw_fd()).collect();
        Ok(self.socket.send(&bytes, &fds, stop)?)
    }

    /// Sends a message of ours, without waiting for anything: one that does not fit into the
    /// socket's buffer at once is an error.
    pub(super) fn notify(&self, request: u32) -> io::Result<()> {
        let bytes = encode(request, VERSION, &[]).map_err(|_| io::ErrorKind::InvalidData)?;
        self.socket.send_now(&bytes)
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
