//! The way requests take to the disk: straight through `AsyncIo`, or through a device model.

use std::{
    fmt,
    time::{Duration, Instant},
};

use block::{
    AsyncDiskFile, ErrorKind,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
};

use crate::util::failure::{Failure, Outcome};

/// A way to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrontEnd {
    /// Straight.
    AsyncIo,
    /// Split rings in guest memory, and the device model behind them.
    VirtioBlk,
    /// A command list in guest memory, and an AHCI host bus adapter behind it.
    Ahci,
}

impl fmt::Display for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            FrontEnd::AsyncIo => "async-io",
            FrontEnd::VirtioBlk => "virtio-blk",
            FrontEnd::Ahci => "ahci",
        })
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
}

/// The end of the request that used a slot.
pub(super) type Ended = (usize, Result<(), ErrorKind>);

/// A queue of one job. Every slot has a buffer of its own.
pub(super) trait Lane {
    /// Adds a request, which [`kick`](Self::kick) starts.
    fn push(&mut self, slot: usize, op: Op, offset: u64) -> Outcome<()>;

    /// Starts what was added.
    fn kick(&mut self) -> Outcome<()>;

    /// Appends what has ended.
    fn reap(&mut self, ended: &mut Vec<Ended>) -> Outcome<()>;

    /// Waits until something may have ended.
    fn wait(&mut self) -> Outcome<()>;

    /// Changes the buffer of a slot that is not in flight.
    fn put(&mut self, slot: usize, at: usize, bytes: &[u8]);

    /// Looks at the buffer of a slot that is not in flight.
    fn get(&self, slot: usize, at: usize, bytes: &mut [u8]);
}

/// How long a request may take before the run is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Straight through `AsyncIo`.
pub(super) struct AsyncLane {
    queue: Box<dyn AsyncIo>,
    buffers: Vec<Option<AlignedBuf>>,
    batch: Vec<Request>,
    reaped: Vec<Completion>,
}

impl AsyncLane {
    /// A queue of the disk.
    pub(super) fn new(disk: &dyn AsyncDiskFile, depth: usize, bs: u64) -> Outcome<Self> {
        let queue = disk
            .create_async_io(depth as u32)
            .map_err(|error| Failure::new(error.to_string()))?;
        Ok(Self {
            queue,
            buffers: (0..depth)
                .map(|_| Some(AlignedBuf::zeroed(bs as usize)))
                .collect(),
            batch: Vec::with_capacity(depth),
            reaped: Vec::with_capacity(depth),
        })
    }

    fn take(&mut self, slot: usize) -> Outcome<Buffers> {
        let buf = self.buffers[slot].take();
        buf.map(Buffers::owned)
            .ok_or_else(|| Failure::new(format!("slot {slot} is in flight already")))
    }
}

impl Lane for AsyncLane {
    fn push(&mut self, slot: usize, op: Op, offset: u64) -> Outcome<()> {
        let op = match op {
            Op::Read => RequestOp::Read {
                offset,
                buffers: self.take(slot)?,
            },
            Op::Write => RequestOp::Write {
                offset,
                buffers: self.take(slot)?,
                fua: false,
            },
            Op::Flush => RequestOp::Flush,
        };
        self.batch.push(Request {
            id: slot as u64,
            op,
        });
        Ok(())
    }

    fn kick(&mut self) -> Outcome<()> {
        self.queue.submit(&mut self.batch);
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Outcome<()> {
        if !self.batch.is_empty() {
            self.queue.submit(&mut self.batch);
        }
        self.queue.reap(&mut self.reaped);
        for completion in self.reaped.drain(..) {
            let slot = completion.id as usize;
            if let Some(buf) = completion.buffers.and_then(Buffers::into_owned) {
                self.buffers[slot] = Some(buf);
            }
            ended.push((slot, completion.result));
        }
        Ok(())
    }

    fn wait(&mut self) -> Outcome<()> {
        let started = Instant::now();
        match self.queue.wait(Some(PATIENCE)) {
            // Waking up for nothing is allowed.
            Ok(ready) if ready || started.elapsed() < PATIENCE => Ok(()),
            Ok(_) => Err(Failure::new("no request ended within a minute")),
            Err(error) => Err(Failure::new(error.to_string())),
        }
    }

    fn put(&mut self, slot: usize, at: usize, bytes: &[u8]) {
        if let Some(buf) = &mut self.buffers[slot] {
            buf[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn get(&self, slot: usize, at: usize, bytes: &mut [u8]) {
        if let Some(buf) = &self.buffers[slot] {
            bytes.copy_from_slice(&buf[at..at + bytes.len()]);
        }
    }
}
