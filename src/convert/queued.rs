//! Copies as they are, past the page cache or with an engine that was asked for: several reads and writes in
//! flight on two queues of one thread.

use std::{
    collections::{HashMap, VecDeque},
    sync::mpsc::{self, Receiver, TryRecvError},
    time::Duration,
};

use block::{
    AsyncDiskFile, ErrorKind,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    convert::{
        job::Job,
        scan::{self, Kind, Run, SECTOR},
        transfer::failed,
    },
    util::{
        bytes,
        failure::{Failure, Outcome},
        interrupt,
        progress::Progress,
    },
};

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;
/// Pieces that one chunk is written in at most, so that a queue always has room.
const QUEUE_DEPTH: u32 = 256;

enum State {
    Reading,
    /// The chunk could not be read as a whole: it is read by sectors, and so far the buffer is filled.
    Salvaging(AlignedBuf, u64),
    Read(AlignedBuf),
    /// Writing; so many pieces are not done.
    Writing(usize),
}

struct Chunk {
    run: Run,
    state: State,
    /// Sectors that could not be read, by their offsets in the source.
    lost: Vec<(u64, ErrorKind)>,
}

struct Copy<'a> {
    job: &'a Job,
    progress: &'a Progress,
    sources: Vec<Box<dyn AsyncIo>>,
    target: Box<dyn AsyncIo>,
    runs: Receiver<Outcome<Run>>,
    scanned: bool,
    /// Chunks in the order of the source, from `first` on.
    chunks: VecDeque<Chunk>,
    first: u64,
    /// The chunk that a write belongs to.
    writes: HashMap<u64, u64>,
    next_write: u64,
    reads: Vec<Vec<Request>>,
    to_write: Vec<Request>,
    done: u64,
    reaped: Vec<Completion>,
    /// Buffers of a whole chunk, to be filled again: new ones cost a page fault a page.
    spare: Vec<AlignedBuf>,
}

/// Copies everything.
pub(super) fn run(job: &Job, progress: &Progress) -> Outcome<()> {
    let failed = |error: block::Error| Failure::new(error.to_string());
    let scanned = scan::sources(&job.sources)?;
    let (to, runs) = mpsc::sync_channel(256);
    let look = job.look_for_copy(CHUNK);
    std::thread::scope(|scope| {
        scope.spawn(move || scan::run(&scanned, look, &mut |run| to.send(run).is_ok()));
        let queue = |disk: &dyn AsyncDiskFile| disk.create_async_io(QUEUE_DEPTH).map_err(failed);
        let sources: Vec<_> = job
            .sources
            .iter()
            .map(|(_, disk)| queue(&**disk))
            .collect::<Outcome<_>>()?;
        let mut copy = Copy {
            reads: sources.iter().map(|_| Vec::new()).collect(),
            sources,
            target: queue(&*job.target)?,
            job,
            progress,
            runs,
            scanned: false,
            chunks: VecDeque::new(),
            first: 0,
            writes: HashMap::new(),
            next_write: 0,
            to_write: Vec::new(),
            done: 0,
            reaped: Vec::new(),
            spare: Vec::new(),
        };
        copy.run()
    })
}

impl Chunk {
    /// A read has ended. Where a whole chunk fails, and what can be had is to be had, each sector is read
    /// alone; what cannot be had is zeroes.
    fn has_read(
        &mut self,
        id: u64,
        result: Result<(), ErrorKind>,
        buf: Option<AlignedBuf>,
        salvage: bool,
        reads: &mut Vec<Request>,
    ) -> Outcome<()> {
        let buf = buf.unwrap_or_else(|| AlignedBuf::zeroed(0));
        let state = std::mem::replace(&mut self.state, State::Reading);
        let (whole, filled) = match (state, result) {
            (State::Salvaging(mut whole, filled), result) => {
                match result {
                    Ok(()) => whole[filled as usize..][..buf.len()].copy_from_slice(&buf),
                    Err(kind) => self.lost.push((self.run.offset + filled, kind)),
                }
                (whole, filled + SECTOR)
            }
            (_, Ok(())) => {
                self.state = State::Read(buf);
                return Ok(());
            }
            (_, Err(_)) if salvage => (AlignedBuf::zeroed(self.run.len as usize), 0),
            (_, Err(kind)) => return Err(failed("reading", self.run.offset, kind)),
        };
        if filled >= self.run.len {
            self.state = State::Read(whole);
            return Ok(());
        }
        let len = SECTOR.min(self.run.len - filled);
        let op = RequestOp::Read {
            offset: self.run.offset + filled,
            buffers: Buffers::owned(AlignedBuf::zeroed(len as usize)),
        };
        reads.push(Request { id, op });
        self.state = State::Salvaging(whole, filled);
        Ok(())
    }
}

impl Copy<'_> {
    fn run(&mut self) -> Outcome<()> {
        loop {
            interrupt::check()?;
            self.take_runs()?;
            self.start_writes();
            self.submit();
            let moved = self.reap()?;
            self.retire();
            if self.scanned && self.chunks.is_empty() {
                return Ok(());
            }
            if !moved && self.to_write.is_empty() {
                self.wait()?;
            }
        }
    }

    /// Starts reading what the scanner found, as far as the parallelism goes.
    fn take_runs(&mut self) -> Outcome<()> {
        while !self.scanned && self.chunks.len() < self.job.parallel {
            // With nothing in flight there is nothing else to wait for.
            let next = if self.chunks.is_empty() {
                self.runs.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.runs.try_recv()
            };
            let run = match next {
                Ok(run) => run?,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    self.scanned = true;
                    return Ok(());
                }
            };
            let state = match run.kind {
                Kind::Skip => State::Writing(0),
                Kind::Zero if self.job.sparse > 0 && self.job.target_is_zero => State::Writing(0),
                Kind::Zero if self.job.sparse > 0 => State::Read(AlignedBuf::zeroed(0)),
                // Everything is to be written: zeroes, too, a piece at a time.
                Kind::Zero if run.len > CHUNK => {
                    self.push_zero_pieces(&run);
                    continue;
                }
                Kind::Zero => State::Read(AlignedBuf::zeroed(run.len as usize)),
                Kind::Data => {
                    let id = self.first + self.chunks.len() as u64;
                    let buffers = Buffers::owned(self.buffer(run.len));
                    let offset = run.offset;
                    let op = RequestOp::Read { offset, buffers };
                    self.reads[run.source].push(Request { id, op });
                    State::Reading
                }
            };
            self.chunks.push_back(Chunk {
                run,
                state,
                lost: Vec::new(),
            });
        }
        Ok(())
    }

    fn buffer(&mut self, len: u64) -> AlignedBuf {
        let spare = if len == CHUNK { self.spare.pop() } else { None };
        spare.unwrap_or_else(|| AlignedBuf::zeroed(len as usize))
    }

    fn keep(&mut self, buf: AlignedBuf) {
        if buf.len() as u64 == CHUNK && self.spare.len() < self.job.parallel {
            self.spare.push(buf);
        }
    }

    fn push_zero_pieces(&mut self, run: &Run) {
        let mut at = 0;
        while at < run.len {
            let len = CHUNK.min(run.len - at);
            self.chunks.push_back(Chunk {
                run: Run {
                    offset: run.offset + at,
                    target: run.target + at,
                    len,
                    ..*run
                },
                state: State::Read(AlignedBuf::zeroed(len as usize)),
                lost: Vec::new(),
            });
            at += len;
        }
    }

    fn start_writes(&mut self) {
        for at in 0..self.chunks.len() {
            let chunk = &mut self.chunks[at];
            match &mut chunk.state {
                State::Read(buf) => {
                    let buf = std::mem::replace(buf, AlignedBuf::zeroed(0));
                    let run = chunk.run;
                    let pieces = self.write(self.first + at as u64, &run, buf);
                    self.chunks[at].state = State::Writing(pieces);
                }
                State::Reading | State::Salvaging(..) if self.job.in_order => return,
                State::Reading | State::Salvaging(..) | State::Writing(_) => {}
            }
        }
    }

    /// Starts writing a chunk; returns the number of requests that takes.
    fn write(&mut self, chunk: u64, run: &Run, buf: AlignedBuf) -> usize {
        let before = self.to_write.len();
        if run.kind == Kind::Zero && buf.is_empty() {
            self.push_write(
                chunk,
                RequestOp::WriteZeroes {
                    offset: run.target,
                    len: run.len,
                    may_unmap: true,
                },
            );
            return 1;
        }
        if self.job.sparse == 0 {
            self.push_data(chunk, run.target, buf);
            return 1;
        }
        let unit = self.job.sparse as usize;
        let (first, zero) = bytes::zero_run(&buf, unit);
        if first == buf.len() && !zero {
            self.push_data(chunk, run.target, buf);
            return 1;
        }
        let mut at = 0;
        while at < buf.len() {
            let (len, zero) = bytes::zero_run(&buf[at..], unit);
            let offset = run.target + at as u64;
            if !zero {
                self.push_data(chunk, offset, AlignedBuf::from_slice(&buf[at..at + len]));
            } else if !self.job.target_is_zero {
                let op = RequestOp::WriteZeroes {
                    offset,
                    len: len as u64,
                    may_unmap: true,
                };
                self.push_write(chunk, op);
            }
            at += len;
        }
        self.keep(buf);
        self.to_write.len() - before
    }

    fn push_data(&mut self, chunk: u64, offset: u64, buf: AlignedBuf) {
        let op = RequestOp::Write {
            offset,
            buffers: Buffers::owned(buf),
            fua: false,
        };
        self.push_write(chunk, op);
    }

    fn push_write(&mut self, chunk: u64, op: RequestOp) {
        let id = self.next_write;
        self.next_write += 1;
        self.writes.insert(id, chunk);
        self.to_write.push(Request { id, op });
    }

    fn submit(&mut self) {
        for (queue, batch) in self.sources.iter_mut().zip(&mut self.reads) {
            if !batch.is_empty() {
                queue.submit(batch);
            }
        }
        if !self.to_write.is_empty() {
            self.target.submit(&mut self.to_write);
        }
    }

    /// Takes completions; whether there were any.
    fn reap(&mut self) -> Outcome<bool> {
        let mut reaped = std::mem::take(&mut self.reaped);
        for source in &mut self.sources {
            source.reap(&mut reaped);
        }
        let mut moved = !reaped.is_empty();
        for completion in reaped.drain(..) {
            let Some(chunk) = self.chunks.get_mut((completion.id - self.first) as usize) else {
                continue;
            };
            let buf = completion.buffers.and_then(Buffers::into_owned);
            let batch = &mut self.reads[chunk.run.source];
            chunk.has_read(
                completion.id,
                completion.result,
                buf,
                self.job.salvage,
                batch,
            )?;
        }
        self.target.reap(&mut reaped);
        moved |= !reaped.is_empty();
        for completion in reaped.drain(..) {
            let Some(id) = self.writes.remove(&completion.id) else {
                continue;
            };
            let Some(chunk) = self.chunks.get_mut((id - self.first) as usize) else {
                continue;
            };
            if let Err(kind) = completion.result {
                return Err(failed("writing", chunk.run.target, kind));
            }
            if let State::Writing(left) = &mut chunk.state {
                *left -= 1;
            }
            if let Some(buf) = completion.buffers.and_then(Buffers::into_owned) {
                self.keep(buf);
            }
        }
        self.reaped = reaped;
        Ok(moved)
    }

    /// Forgets the chunks at the front that are done.
    fn retire(&mut self) {
        while let Some(Chunk {
            state: State::Writing(0),
            run,
            lost,
        }) = self.chunks.front()
        {
            self.done += run.len;
            if self.job.is_work(run) {
                self.progress.advance(run.len);
            }
            if let Some(kind) = run.unknown {
                self.job.warn("block status at offset", run.offset, kind);
            }
            for (offset, kind) in lost {
                self.job.warn("offset", *offset, *kind);
            }
            self.job.keep_rate(self.done);
            self.chunks.pop_front();
            self.first += 1;
        }
    }

    /// Waits until a queue has something, or the scanner may have.
    fn wait(&self) -> Outcome<()> {
        let waiting = |queue: &dyn AsyncIo| queue.in_flight() > 0;
        let queues = self.sources.iter().chain([&self.target]);
        let mut fds: Vec<_> = queues
            .filter(|queue| waiting(&***queue))
            .map(|queue| PollFd::from_borrowed_fd(queue.notifier(), PollFlags::IN))
            .collect();
        if fds.is_empty() {
            return Ok(());
        }
        let room = !self.scanned && self.chunks.len() < self.job.parallel;
        let millis = Duration::from_millis(if room { 1 } else { 1000 });
        let timeout = Timespec {
            tv_sec: millis.as_secs().cast_signed(),
            tv_nsec: millis.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Failure::new(format!("waiting for I/O: {error}"))),
        }
    }
}
