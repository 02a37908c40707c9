//! The open image of a session, and the queue its requests go through.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use block::{
    AsyncDiskFile, ErrorKind,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
};

use crate::{
    image::{open::OpenHow, spec::ImageSpec},
    io::report::{self, Style},
    say,
    util::{bytes, errno, failure::Failure},
};

/// Requests of one session in flight at a time.
const DEPTH: u32 = 128;

/// An asynchronous request, to be reported when it completes.
pub(super) struct Pending {
    /// `readv` or `writev`, for the error.
    pub(super) name: &'static str,
    /// What the report says was done.
    pub(super) verb: &'static str,
    pub(super) style: Style,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// What a read must find.
    pub(super) pattern: Option<u8>,
    pub(super) started: Instant,
}

/// The end of a request: what became of it, and its memory.
pub(super) type Ended = (Result<(), ErrorKind>, Option<AlignedBuf>);

/// The open image.
pub(super) struct Opened {
    // Dropped first: it waits for what is in flight.
    queue: Box<dyn AsyncIo>,
    pub(super) disk: Box<dyn AsyncDiskFile>,
    pub(super) spec: ImageSpec,
    pub(super) how: OpenHow,
    pending: HashMap<u64, Pending>,
    ended: Option<(u64, Ended)>,
    batch: Vec<Request>,
    reaped: Vec<Completion>,
    next_id: u64,
}

impl Opened {
    /// A queue on an opened image.
    pub(super) fn new(
        disk: Box<dyn AsyncDiskFile>,
        spec: ImageSpec,
        how: OpenHow,
    ) -> Result<Self, Failure> {
        let queue = disk
            .create_async_io(DEPTH)
            .map_err(|error| Failure::new(error.to_string()))?;
        Ok(Self {
            queue,
            disk,
            spec,
            how,
            pending: HashMap::new(),
            ended: None,
            batch: Vec::new(),
            reaped: Vec::new(),
            next_id: 0,
        })
    }

    /// Does a request and waits for its end. Asynchronous ones go on meanwhile.
    pub(super) fn perform(&mut self, op: RequestOp) -> Ended {
        let id = self.submit(op);
        loop {
            if let Some((_, ended)) = self.ended.take_if(|(ended, _)| *ended == id) {
                return ended;
            }
            if let Err(kind) = self.turn(true) {
                return (Err(kind), None);
            }
        }
    }

    /// Starts a request that is reported when it ends.
    pub(super) fn start(&mut self, op: RequestOp, pending: Pending) {
        self.pending.insert(self.next_id, pending);
        self.submit(op);
    }

    /// Waits a moment for anything to happen.
    pub(super) fn wait_a_moment(&mut self) {
        self.batch.clear();
        let _ = self.queue.wait(Some(Duration::from_millis(5)));
        self.poll();
    }

    /// Reports what has ended, without waiting.
    pub(super) fn poll(&mut self) {
        if !self.pending.is_empty()
            && let Err(kind) = self.turn(false)
        {
            say!("{}", errno::request_text(kind));
        }
    }

    /// Waits until every asynchronous request has ended and is reported.
    pub(super) fn drain(&mut self) {
        while !self.pending.is_empty() {
            if let Err(kind) = self.turn(true) {
                say!("{}", errno::request_text(kind));
                return;
            }
        }
    }

    /// Ends the session with this image: caches written, locks released.
    pub(super) fn close(self) -> block::Result<()> {
        let Self { queue, disk, .. } = self;
        drop(queue);
        disk.close()
    }

    fn submit(&mut self, op: RequestOp) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.batch.push(Request { id, op });
        while !self.batch.is_empty() {
            self.queue.submit(&mut self.batch);
            if !self.batch.is_empty() && self.turn(true).is_err() {
                break;
            }
        }
        id
    }

    /// Takes completions; waits for one if `wait`.
    fn turn(&mut self, wait: bool) -> Result<(), ErrorKind> {
        let mut reaped = std::mem::take(&mut self.reaped);
        if self.queue.reap(&mut reaped) == 0 && wait {
            self.queue
                .wait(Some(Duration::from_secs(1)))
                .map_err(|error| error.kind())?;
            self.queue.reap(&mut reaped);
        }
        for completion in reaped.drain(..) {
            let buf = completion.buffers.and_then(Buffers::into_owned);
            match self.pending.remove(&completion.id) {
                Some(pending) => finish(&pending, completion.result, buf.as_deref()),
                None => self.ended = Some((completion.id, (completion.result, buf))),
            }
        }
        self.reaped = reaped;
        Ok(())
    }
}

/// Reports the end of an asynchronous request.
fn finish(pending: &Pending, result: Result<(), ErrorKind>, data: Option<&[u8]>) {
    if let Err(kind) = result {
        say!("{} failed: {}", pending.name, errno::request_text(kind));
        return;
    }
    let time = pending.started.elapsed();
    let data = data.unwrap_or_default();
    if pending
        .pattern
        .is_some_and(|pattern| !bytes::all_equal(data, pattern))
    {
        say!(
            "Pattern verification failed at offset {}, {} bytes",
            pending.offset,
            pending.len
        );
    }
    if pending.style.quiet {
        return;
    }
    if pending.style.dump {
        say!(
            "{}",
            report::dump(data, pending.offset).trim_end_matches('\n')
        );
    }
    let (offset, len) = (pending.offset, pending.len);
    say!(
        "{}",
        report::lines(pending.verb, pending.style, offset, len, len, 1, time)
    );
}
