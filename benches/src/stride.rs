//! Accesses at the offsets of `qemu-img bench`: each a step after the one before, around the disk.

use block::{
    AsyncDiskFile,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
};

use crate::{
    Direction, Result, Work,
    side::{Load, Stop},
};

/// What is done, besides the [`Work`].
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Bytes from one access to the next.
    pub step: u64,
    /// A flush after so many writes, once they all ended; 0: none.
    pub flush_every: u64,
}

/// The accesses through [`AsyncIo`].
pub struct Strided {
    io: Box<dyn AsyncIo>,
    work: Work,
    pattern: Pattern,
    start: u64,
    offset: u64,
    spare: Vec<Buffers>,
    batch: Vec<Request>,
    completions: Vec<Completion>,
}

impl Strided {
    /// A load on a disk, on the calling thread.
    ///
    /// # Errors
    /// The disk's.
    pub fn new(disk: &dyn AsyncDiskFile, work: Work, pattern: Pattern) -> Result<Self> {
        Self::from(0, disk, work, pattern)
    }

    /// The same on the part of a disk that starts at a byte.
    ///
    /// # Errors
    /// The disk's.
    pub fn from(
        start: u64,
        disk: &dyn AsyncDiskFile,
        work: Work,
        pattern: Pattern,
    ) -> Result<Self> {
        let buffer = |byte| {
            let mut buffer = AlignedBuf::zeroed(work.block as usize);
            buffer.fill(byte as u8 + 1);
            Buffers::owned(buffer)
        };
        Ok(Self {
            io: disk.create_async_io(work.depth)?,
            work,
            pattern,
            start,
            offset: 0,
            spare: (0..work.depth).map(buffer).collect(),
            batch: Vec::with_capacity(work.depth as usize),
            completions: Vec::with_capacity(work.depth as usize),
        })
    }

    fn push(&mut self, buffers: Buffers) {
        let offset = self.start + self.offset;
        self.offset = (self.offset + self.pattern.step) % self.work.size;
        let op = match self.work.direction {
            Direction::Read => RequestOp::Read { offset, buffers },
            Direction::Write => RequestOp::Write {
                offset,
                buffers,
                fua: false,
            },
        };
        self.batch.push(Request { id: 0, op });
    }

    fn reap(&mut self) -> Result<u64> {
        self.io.wait(None)?;
        self.io.reap(&mut self.completions);
        let mut reaped = 0;
        for completion in self.completions.drain(..) {
            completion.result.map_err(|kind| kind.to_string())?;
            reaped += u64::from(completion.buffers.is_some());
            self.spare.extend(completion.buffers);
        }
        Ok(reaped)
    }

    fn flush(&mut self) -> Result<()> {
        let op = RequestOp::Flush;
        self.batch.push(Request { id: 1, op });
        self.io.submit(&mut self.batch);
        while self.io.in_flight() > 0 {
            self.reap()?;
        }
        Ok(())
    }
}

impl Load for Strided {
    fn run(&mut self, stop: Stop, _seed: u64) -> Result<u64> {
        let (mut started, mut ended, mut unflushed) = (0, 0, 0);
        loop {
            let over = stop.reached(started);
            let every = self.pattern.flush_every;
            if !over && (every == 0 || unflushed < every) {
                let most = match stop {
                    Stop::After(ios) => ios - started,
                    Stop::At(_) => u64::MAX,
                };
                let most = if every == 0 {
                    most
                } else {
                    most.min(every - unflushed)
                };
                for _ in 0..most.min(self.spare.len() as u64) {
                    if let Some(buffers) = self.spare.pop() {
                        self.push(buffers);
                        started += 1;
                        unflushed += 1;
                    }
                }
                self.io.submit(&mut self.batch);
            } else if self.io.in_flight() == 0 {
                if over {
                    return Ok(ended);
                }
                self.flush()?;
                unflushed = 0;
                continue;
            }
            ended += self.reap()?;
        }
    }
}
