//! Host operations as the driver keeps them: what they do, who waits, how far they got.

use std::{task::Waker, time::Duration};

use super::{AlignedBuf, EngineFile, FallocateMode, HostOp, Segment, Segments, buffers, slab::Key};
use crate::{ErrorKind, Result};

/// Retries of one operation that was interrupted without progress before it is given up.
const MAX_INTERRUPTIONS: u32 = 10_000;

/// What a read does at the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Eof {
    /// What is missing reads as zeroes: data clusters and backing images.
    Zeroes,
    /// What is missing is an error: tables, and raw data inside the declared size.
    Error,
}

/// What an operation does, with what is needed to go on after a short transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OpKind {
    Read { eof: Eof },
    Write { dsync: bool },
    Sync,
    Fallocate { mode: FallocateMode, len: u64 },
    Timer { after: Duration },
    PollReadable { fd: i32 },
}

/// Who waits for an operation.
pub(crate) enum Owner {
    /// A future; its waker once it was polled.
    Future(Option<Waker>),
    /// A request that hit the map: queue and slot.
    Request { queue: Key, slot: Key },
    /// A watch of a queue.
    Watch { queue: Key, id: u64 },
    /// Nobody any more; the operation still owns its buffer.
    Detached,
}

/// An operation to start.
pub(crate) struct NewOp {
    pub(crate) kind: OpKind,
    pub(crate) file: EngineFile,
    pub(crate) offset: u64,
    pub(crate) segments: Segments,
    /// The unit that direct I/O on the file moves; 1 for buffered.
    pub(crate) unit: u32,
    /// Memory of the segments, where the operation owns it.
    pub(crate) buffer: Option<AlignedBuf>,
}

/// A transfer to start whose memory somebody else keeps.
pub(crate) struct Transfer<'a> {
    pub(crate) kind: OpKind,
    pub(crate) file: EngineFile,
    pub(crate) offset: u64,
    pub(crate) segments: &'a [Segment],
    /// The unit that direct I/O on the file moves; 1 for buffered.
    pub(crate) unit: u32,
}

/// An operation that was started.
pub(super) struct Op {
    pub(super) new: NewOp,
    pub(super) owner: Owner,
    /// How it ended.
    pub(super) result: Option<Result<(), ErrorKind>>,
    total: u64,
    done: u64,
    interruptions: u32,
}

impl Op {
    pub(super) fn new(new: NewOp, owner: Owner) -> Self {
        Self {
            total: total(&new.segments),
            new,
            owner,
            result: None,
            done: 0,
            interruptions: 0,
        }
    }

    pub(super) fn transfer(transfer: &Transfer<'_>, owner: Owner) -> Self {
        let new = NewOp {
            kind: transfer.kind,
            file: transfer.file,
            offset: transfer.offset,
            segments: Segments::from_slice(transfer.segments),
            unit: transfer.unit,
            buffer: None,
        };
        Self::new(new, owner)
    }

    /// Makes it another operation, in the same place.
    pub(super) fn renew(&mut self, new: NewOp, owner: Owner) {
        self.new = new;
        self.begin(owner);
    }

    /// [`renew`](Self::renew) for a transfer: field by field, since copies of what was just written wait for it.
    #[inline]
    pub(super) fn renew_transfer(&mut self, transfer: &Transfer<'_>, owner: Owner) {
        self.new.kind = transfer.kind;
        self.new.file = transfer.file;
        self.new.offset = transfer.offset;
        self.new.segments.clear();
        self.new.segments.extend_from_slice(transfer.segments);
        self.new.unit = transfer.unit;
        self.new.buffer = None;
        self.begin(owner);
    }

    fn begin(&mut self, owner: Owner) {
        self.total = total(&self.new.segments);
        self.owner = owner;
        self.result = None;
        self.done = 0;
        self.interruptions = 0;
    }

    /// What is left of it, for an engine.
    pub(super) fn rest(&self) -> HostOp<'_> {
        let file = self.new.file;
        let offset = self.new.offset.wrapping_add(self.done);
        let segments = &self.new.segments;
        match self.new.kind {
            OpKind::Read { .. } => HostOp::Read {
                file,
                offset,
                segments,
            },
            OpKind::Write { dsync } => HostOp::Write {
                file,
                offset,
                segments,
                dsync,
            },
            OpKind::Sync => HostOp::Sync { file },
            OpKind::Fallocate { mode, len } => HostOp::Fallocate {
                file,
                mode,
                offset,
                len,
            },
            OpKind::Timer { after } => HostOp::Timer { after },
            OpKind::PollReadable { fd } => HostOp::PollReadable { fd },
        }
    }

    /// Takes an engine's result into account; `None` when the operation must go on.
    #[inline]
    pub(super) fn advance(&mut self, raw: i32) -> Option<Result<(), ErrorKind>> {
        let Ok(moved) = u32::try_from(raw) else {
            let errno = raw.wrapping_neg();
            if (errno == libc::EINTR || errno == libc::EAGAIN)
                && self.interruptions < MAX_INTERRUPTIONS
            {
                self.interruptions += 1;
                return None;
            }
            // A timer that ran out says so with an error.
            if matches!(self.new.kind, OpKind::Timer { .. }) && errno == libc::ETIME {
                return Some(Ok(()));
            }
            return Some(Err(ErrorKind::from_errno(errno)));
        };
        let eof = match self.new.kind {
            OpKind::Read { eof } => Some(eof),
            OpKind::Write { .. } => None,
            _ => return Some(Ok(())),
        };
        self.done += u64::from(moved);
        if self.done >= self.total {
            return Some(Ok(()));
        }
        // Direct I/O that stopped inside a unit has met the end of the file.
        let at_end = moved == 0 || !self.done.is_multiple_of(u64::from(self.new.unit.max(1)));
        buffers::advance(&mut self.new.segments, u64::from(moved));
        match eof {
            Some(Eof::Zeroes) if at_end => {
                buffers::zero(&self.new.segments);
                Some(Ok(()))
            }
            Some(Eof::Error) if at_end => Some(Err(ErrorKind::ShortTransfer)),
            None if moved == 0 => Some(Err(ErrorKind::Io(libc::EIO))),
            _ => None,
        }
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len() as u64).sum()
}

/// Receives the end of operations that requests started without a task.
pub(crate) trait RequestSink {
    /// An operation of the request in `slot` ended.
    fn operation_ended(&self, slot: Key, result: Result<(), ErrorKind>);
    /// A watched descriptor became readable, or could not be watched.
    fn watch_fired(&self, id: u64, result: Result<(), ErrorKind>);
}
