//! vfio-user messages on a socket: 16 bytes of header, a body, and descriptors with the first byte.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use super::Error;
use crate::{
    framed::{Broken, Framed},
    sys,
};

/// Bytes of a header.
const HEADER: usize = 16;
/// The most bytes of data of a region access or version text.
pub(super) const MAX_DATA: usize = 1 << 20;
/// The most descriptors of a message.
pub(super) const MAX_FDS: usize = 16;

const TYPE: u32 = 15;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A command of the client.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) id: u16,
    pub(super) command: u16,
    pub(super) no_reply: bool,
    pub(super) body: Vec<u8>,
    pub(super) files: Vec<File>,
}

impl Message {
    /// The dword at `at` of the body.
    pub(super) fn u32(&self, at: usize) -> Result<u32, i32> {
        let bytes = self.body.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|it| u32::from_ne_bytes(*it)).ok_or(libc::EINVAL)
    }

    /// The quadword at `at` of the body.
    pub(super) fn u64(&self, at: usize) -> Result<u64, i32> {
        let bytes = self.body.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|it| u64::from_ne_bytes(*it)).ok_or(libc::EINVAL)
    }
}

impl From<Broken> for Error {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Stopped => io::Error::from(io::ErrorKind::Interrupted).into(),
            Broken::Io(error) => error.into(),
        }
    }
}

/// One end of a connection.
pub(super) struct Channel {
    socket: Framed,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        let socket = Framed::new(socket)?;
        Ok(Self { socket })
    }

    /// Waits for a command; `None` when the client is gone or `stop` is readable.
    pub(super) fn receive(&mut self, stop: BorrowedFd<'_>) -> Result<Option<Message>, Error> {
        let fds = [(self.socket.as_fd(), libc::POLLIN), (stop, libc::POLLIN)];
        let [_, stopped] = sys::poll(fds, None)?;
        if stopped != 0 {
            return Ok(None);
        }
        let deadline = Framed::deadline();
        let mut header = [0; HEADER];
        let socket = &mut self.socket;
        let Some(files) = socket.receive_header::<MAX_FDS>(&mut header, stop, deadline)? else {
            return Ok(None);
        };
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let (size, flags) = (word(4) as usize, word(8));
        if flags & TYPE != TYPE_COMMAND {
            return Err(Error::Client(format!("message type {}", flags & TYPE)));
        }
        if !(HEADER..=HEADER + 64 + MAX_DATA).contains(&size) {
            return Err(Error::Client(format!("a message of {size} bytes")));
        }
        let mut body = vec![0; size - HEADER];
        self.socket.fill(&mut body, stop, deadline)?;
        Ok(Some(Message {
            id: half(0),
            command: half(2),
            no_reply: flags & NO_REPLY != 0,
            body,
            files,
        }))
    }

    /// Answers a command, unless it asked for no answer.
    pub(super) fn reply(
        &mut self,
        message: &Message,
        result: Result<Vec<u8>, i32>,
        stop: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        if message.no_reply {
            return Ok(());
        }
        let (flags, errno, body) = match result {
            Ok(body) => (TYPE_REPLY, 0, body),
            Err(errno) => (TYPE_REPLY | ERROR, errno, Vec::new()),
        };
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(&message.id.to_ne_bytes());
        bytes.extend_from_slice(&message.command.to_ne_bytes());
        bytes.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&errno.to_ne_bytes());
        bytes.extend_from_slice(&body);
        Ok(self.socket.send(&bytes, &[], stop)?)
    }
}
