//! vfio-user messages on a socket: 16 bytes of header, a body, and descriptors with the first byte.
//!
//! Commands go both ways on the one socket: those of the client, and ours for memory that it has not
//! shared. Whoever waits for something reads: the session while it is idle, otherwise a worker that
//! waits for a reply. What is read for others is put aside for them, so that neither waits for a thread
//! that waits for it.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
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
/// The most bytes of guest memory in a message of ours, and in a reply to it.
const MAX_PIECE: usize = 32 << 10;
/// The most bytes of replies that may be on their way at once: QEMU 11.1 sends no more of a reply than
/// fits into its socket's buffer at once, which is 208 KiB with a usual kernel, and forgets the rest.
const MAX_ASKED: usize = 64 << 10;
/// The most descriptors of a message.
pub(super) const MAX_FDS: usize = 16;

const TYPE: u32 = 15;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// How long the client may take to answer a command of ours.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same while it waits for us itself: it may be unable to answer before we have.
const HURRY: Duration = Duration::from_secs(1);
/// How often a waiting thread looks at the time.
const TICK: Duration = Duration::from_millis(50);
/// The most commands, and bytes of them, that are put aside while the session is busy.
const MAX_ASIDE: usize = 4096;
const MAX_ASIDE_BYTES: usize = 8 << 20;

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

/// A reply of ours.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) body: Vec<u8>,
    /// A descriptor that goes with it.
    pub(super) file: Option<Arc<File>>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self { body, file: None }
    }
}

/// The body of a reply of the client, or its error.
type Replied = Result<Vec<u8>, i32>;

/// What was read.
enum Incoming {
    Command(Message),
    Reply(u16, Replied),
    /// Nothing in that time.
    Nothing,
    /// The client is gone, or the server is to stop.
    End,
}

#[derive(Default)]
struct State {
    /// Somebody reads.
    reading: bool,
    /// Commands that were read while the session was busy.
    aside: VecDeque<Message>,
    aside_bytes: usize,
    /// Commands of ours without a reply yet, and replies that were not taken yet.
    waiting: HashMap<u16, Option<Replied>>,
    /// Bytes of data that these replies are to have.
    asked: usize,
    next: u16,
    /// Since when the session executes a command.
    busy_since: Option<Instant>,
    over: bool,
    error: Option<Error>,
}

/// What the header of a message of ours has, besides its size.
#[derive(Clone, Copy, Debug)]
struct Header {
    id: u16,
    command: u16,
    flags: u32,
    errno: i32,
}

/// One end of a connection.
pub(super) struct Channel {
    socket: Framed,
    stop: File,
    sending: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
    /// The most bytes of data that the client takes in a message.
    max_data: AtomicUsize,
    /// Bytes that went through messages.
    moved: AtomicU64,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    /// `stop` becoming readable ends every wait.
    pub(super) fn new(socket: UnixStream, stop: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            socket: Framed::new(socket)?,
            stop: stop.try_clone_to_owned()?.into(),
            sending: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            max_data: AtomicUsize::new(MAX_DATA),
            moved: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client has said how many bytes of data it takes in a message.
    pub(super) fn limit_data(&self, bytes: u64) {
        let bytes = usize::try_from(bytes).unwrap_or(MAX_DATA);
        self.max_data
            .store(bytes.clamp(1, MAX_DATA), Ordering::Relaxed);
    }

    /// The most bytes of data of a message to the client.
    pub(super) fn max_data(&self) -> usize {
        self.max_data.load(Ordering::Relaxed)
    }

    /// The most bytes of guest memory in a message of ours.
    pub(super) fn piece(&self) -> usize {
        self.max_data().min(MAX_PIECE)
    }

    /// Bytes of guest memory that went through messages since this was asked last.
    pub(super) fn take_moved(&self, at_least: u64) -> bool {
        let enough = self.moved.load(Ordering::Relaxed) >= at_least;
        if enough {
            self.moved.store(0, Ordering::Relaxed);
        }
        enough
    }

    /// Waits for a command, for the session; `None` when the client is gone or the server stops.
    pub(super) fn receive(&self) -> Result<Option<Message>, Error> {
        let mut state = self.state();
        state.busy_since = None;
        loop {
            if let Some(message) = state.aside.pop_front() {
                state.aside_bytes -= message.body.len();
                state.busy_since = Some(Instant::now());
                return Ok(Some(message));
            }
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if state.over {
                return Ok(None);
            }
            state = if state.reading {
                self.changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                self.read_in_turn(state, None)
            };
        }
    }

    /// Reads one message and puts it where it belongs.
    fn read_in_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        state.reading = true;
        drop(state);
        let read = self.read(until);
        let mut state = self.state();
        state.reading = false;
        match read {
            Ok(Incoming::Nothing) => {}
            Ok(Incoming::End) => state.over = true,
            Ok(Incoming::Reply(id, reply)) => match state.waiting.get_mut(&id) {
                Some(place) => *place = Some(reply),
                None => tracing::debug!(id, "a reply that nobody waits for any more"),
            },
            Ok(Incoming::Command(message)) => {
                state.aside_bytes += message.body.len();
                state.aside.push_back(message);
                if state.aside.len() > MAX_ASIDE || state.aside_bytes > MAX_ASIDE_BYTES {
                    let text = "more commands than can be put aside".to_owned();
                    state.error.get_or_insert(Error::Client(text));
                    state.over = true;
                }
            }
            Err(error) => {
                state.error.get_or_insert(error);
                state.over = true;
            }
        }
        if !state.waiting.is_empty() || state.over {
            self.changed.notify_all();
        }
        state
    }

    fn read(&self, until: Option<Instant>) -> Result<Incoming, Error> {
        let stop = self.stop.as_fd();
        let fds = [(self.socket.as_fd(), libc::POLLIN), (stop, libc::POLLIN)];
        let [ready, stopped] = sys::poll(fds, until)?;
        if stopped != 0 {
            return Ok(Incoming::End);
        }
        if ready == 0 {
            return Ok(Incoming::Nothing);
        }
        let deadline = Framed::deadline();
        let mut header = [0; HEADER];
        let socket = &self.socket;
        let Some(files) = socket.receive_header::<MAX_FDS>(&mut header, stop, deadline)? else {
            return Ok(Incoming::End);
        };
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let (size, flags) = (word(4) as usize, word(8));
        if !matches!(flags & TYPE, TYPE_COMMAND | TYPE_REPLY) {
            return Err(Error::Client(format!("message type {}", flags & TYPE)));
        }
        if !(HEADER..=HEADER + 64 + MAX_DATA).contains(&size) {
            return Err(Error::Client(format!("a message of {size} bytes")));
        }
        let mut body = vec![0; size - HEADER];
        socket.fill(&mut body, stop, deadline)?;
        if flags & TYPE == TYPE_REPLY {
            let failed = flags & ERROR != 0;
            let reply = if failed {
                Err(word(12) as i32)
            } else {
                Ok(body)
            };
            return Ok(Incoming::Reply(half(0), reply));
        }
        Ok(Incoming::Command(Message {
            id: half(0),
            command: half(2),
            no_reply: flags & NO_REPLY != 0,
            body,
            files,
        }))
    }

    /// Answers a command, unless it asked for no answer.
    pub(super) fn reply(&self, message: &Message, result: Result<Reply, i32>) -> Result<(), Error> {
        if message.no_reply {
            return Ok(());
        }
        let (flags, errno, reply) = match result {
            Ok(reply) => (TYPE_REPLY, 0, reply),
            Err(errno) => (TYPE_REPLY | ERROR, errno, Reply::default()),
        };
        let header = Header {
            id: message.id,
            command: message.command,
            flags,
            errno,
        };
        self.send(header, &[&reply.body], reply.file.as_deref())
    }

    fn send(&self, header: Header, body: &[&[u8]], file: Option<&File>) -> Result<(), Error> {
        let size = HEADER + body.iter().map(|part| part.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(&header.id.to_ne_bytes());
        bytes.extend_from_slice(&header.command.to_ne_bytes());
        bytes.extend_from_slice(&(size as u32).to_ne_bytes());
        bytes.extend_from_slice(&header.flags.to_ne_bytes());
        bytes.extend_from_slice(&header.errno.to_ne_bytes());
        for part in body {
            bytes.extend_from_slice(part);
        }
        let _alone = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = file.map(AsRawFd::as_raw_fd);
        Ok(self.socket.send(&bytes, fd.as_slice(), self.stop.as_fd())?)
    }

    /// Sends a command of ours and waits for its reply, which is to have `asked` bytes of data. Called by
    /// any thread but the session's.
    ///
    /// # Errors
    /// What the client answers; `TimedOut` when it answers too late: then it loses the connection,
    /// unless it waited for us itself; `BrokenPipe` without a connection.
    pub(super) fn request(
        &self,
        command: u16,
        body: &[&[u8]],
        asked: usize,
    ) -> io::Result<Vec<u8>> {
        let id = {
            let mut state = self.state();
            while !state.over && state.asked > 0 && state.asked + asked > MAX_ASKED {
                let waited = self.changed.wait_timeout(state, TICK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.over {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            while state.waiting.contains_key(&state.next) {
                state.next = state.next.wrapping_add(1);
            }
            let id = state.next;
            state.next = id.wrapping_add(1);
            state.waiting.insert(id, None);
            state.asked += asked;
            id
        };
        let bytes: usize = body.iter().map(|part| part.len()).sum();
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
        let header = Header {
            id,
            command,
            flags: TYPE_COMMAND,
            errno: 0,
        };
        let answer = match self.send(header, body, None) {
            Ok(()) => self.wait_for(id),
            Err(error) => {
                self.fail(error);
                Err(io::ErrorKind::BrokenPipe.into())
            }
        };
        let mut state = self.state();
        state.waiting.remove(&id);
        state.asked -= asked;
        drop(state);
        self.changed.notify_all();
        if let Ok(body) = &answer {
            self.moved.fetch_add(body.len() as u64, Ordering::Relaxed);
        }
        answer
    }

    fn wait_for(&self, id: u16) -> io::Result<Vec<u8>> {
        let started = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(reply) = state.waiting.get_mut(&id).and_then(Option::take) {
                return reply.map_err(io::Error::from_raw_os_error);
            }
            if state.over {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if started.elapsed() >= PATIENCE {
                drop(state);
                let text = "no reply to an access to its memory".to_owned();
                self.fail(Error::Client(text));
                return Err(io::ErrorKind::TimedOut.into());
            }
            let blocked = state.busy_since.is_some_and(|it| it.elapsed() >= HURRY);
            if blocked && started.elapsed() >= HURRY {
                tracing::warn!("the client waits for us and does not answer");
                return Err(io::ErrorKind::TimedOut.into());
            }
            state = if state.reading {
                let waited = self.changed.wait_timeout(state, TICK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.read_in_turn(state, Some(sys::after(TICK)))
            };
        }
    }

    /// Ends the connection: the session finds `error` at its next look.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.state();
        state.over = true;
        state.error.get_or_insert(error);
        drop(state);
        self.socket.shut_down();
        self.changed.notify_all();
    }

    /// The session has ended: nothing is asked of the client any more.
    pub(super) fn close(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }
}
