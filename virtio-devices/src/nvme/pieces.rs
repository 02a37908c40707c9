//! How far commands are whose data passes through memory of ours in pieces.

use std::collections::VecDeque;

/// Bytes of a piece.
const CHUNK: u64 = 128 << 10;

/// What is done with each piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamKind {
    /// It has to be what the guest has.
    Compare,
    /// It has to be readable.
    Verify,
    /// The guest gets the parts that are not thrown away.
    Scatter,
}

/// A stream on its way.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) kind: StreamKind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) done: u64,
}

impl Stream {
    pub(super) fn new(kind: StreamKind, offset: u64, len: u64) -> Self {
        Self {
            kind,
            offset,
            len,
            done: 0,
        }
    }

    pub(super) fn piece(&self) -> u64 {
        (self.len - self.done).min(CHUNK)
    }
}

/// A copy on its way.
#[derive(Debug)]
pub(super) struct CopyState {
    /// First byte and length of what is left of each source range.
    pub(super) sources: VecDeque<(u64, u64)>,
    /// Where the next byte goes.
    pub(super) to: u64,
    pub(super) writing: bool,
}

impl CopyState {
    pub(super) fn piece(&self) -> Option<(u64, u64)> {
        let (offset, len) = *self.sources.front()?;
        Some((offset, len.min(CHUNK)))
    }

    /// A piece was written.
    pub(super) fn step(&mut self, len: u64) {
        self.to += len;
        if let Some(front) = self.sources.front_mut() {
            front.0 += len;
            front.1 -= len;
            if front.1 == 0 {
                self.sources.pop_front();
            }
        }
    }
}
