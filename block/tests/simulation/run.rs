//! One run: random requests on several queues, faults, power cuts, checked all along.

mod verify;

use std::{collections::HashMap, path::PathBuf, process::Command};

use block::{
    AsyncDiskFile, Disk, DiskFile, ErrorKind, Format,
    formats::qcow2::header::Header,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp, sim::SimHost},
};

use crate::{
    extras::Extras,
    model::{self, Cut, Flushing, Fua, Id, Model, Reading, ZERO},
    setup::{Below, IMAGE, Mode, Rng, Setup, is_marked},
};

enum Pending {
    Read(Reading),
    Change {
        id: Id,
        start: u64,
        end: u64,
        fua: Option<Fua>,
    },
    Flush(Flushing),
}

struct Queue {
    io: Box<dyn AsyncIo>,
    number: usize,
}

pub(crate) struct Run {
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) host: SimHost,
    disk: Option<Disk>,
    queues: Vec<Queue>,
    pending: HashMap<u64, Pending>,
    /// Requests of queues, by queue number, for those that are dropped.
    owners: HashMap<u64, usize>,
    pub(crate) model: Model,
    next_id: Id,
    next_request: u64,
    /// Errors of the host may have left clusters that nothing names.
    pub(crate) may_leak: bool,
    judged_by_qemu: bool,
    traced: bool,
    /// A sync may have failed: what the page cache shows is not what the disk will ever get.
    lost: bool,
    /// The size of a resize that failed.
    half_done: Option<u64>,
    /// Snapshots and bitmaps.
    pub(crate) extras: Extras,
}

pub(crate) fn run(seed: u64, mode: Mode, judged_by_qemu: bool) -> u64 {
    let setup = Setup::random(seed, mode);
    let mut rng = Rng::new(seed.wrapping_add(77));
    let host = setup.host();
    setup.make(&host);
    let model = Model::new(cut_points(&setup, &mut rng), setup.guest_size(), |at| {
        setup.held(at)
    });
    let mut run = Run {
        setup,
        rng,
        host,
        disk: None,
        queues: Vec::new(),
        pending: HashMap::new(),
        owners: HashMap::new(),
        model,
        next_id: 10,
        next_request: 0,
        may_leak: false,
        judged_by_qemu,
        traced: std::env::var_os("PLATTER_SIM_TRACE").is_some(),
        lost: false,
        half_done: None,
        extras: Extras::default(),
    };
    run.tell(|| format!("{:#?}", run.setup));
    for life in 0..run.setup.lives {
        run.open();
        run.live();
        let last = life + 1 == run.setup.lives;
        match run.rng.below(3) {
            0 => run.close(),
            1 => run.cut(true),
            _ => run.cut(false),
        }
        if last {
            run.open();
            run.verify();
            run.close();
        }
    }
    run.host.trace()
}

fn cut_points(setup: &Setup, rng: &mut Rng) -> Vec<u64> {
    let size = setup.guest_size();
    let mut points = vec![0, size, setup.max_size.next_multiple_of(512)];
    let end = points[2].max(size);
    points.push(end);
    match setup.below {
        Below::Nothing => {}
        Below::Raw { len } | Below::Qcow2 { len, .. } => points.push(len.min(end)),
    }
    // Every boundary of a cluster, for what discards do.
    if setup.format == Format::Qcow2 {
        let unit = setup.cluster_size / if setup.extended { 32 } else { 1 };
        points.extend((0..end).step_by(unit as usize));
    }
    for _ in 0..30 {
        let any = rng.below(end);
        points.push(match rng.below(3) {
            0 => any,
            1 => any / 512 * 512,
            _ => any / 4096 * 4096,
        });
    }
    points
}

impl Run {
    /// Tells the story of a run, for `PLATTER_SIM_TRACE=1`.
    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        if self.traced {
            eprintln!("{:>9.3?} {}", self.host.now(), what());
        }
    }

    pub(crate) fn fail(&self, what: &str) -> ! {
        panic!(
            "seed {} ({:?}): {what}\nreplay: PLATTER_SIM_SEED={} PLATTER_SIM_MODE={:?}\n{:#?}",
            self.setup.seed, self.setup.mode, self.setup.seed, self.setup.mode, self.setup
        );
    }

    pub(crate) fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    pub(crate) fn open(&mut self) {
        self.setup.end_trouble(&self.host);
        let disk = match self.setup.open(&self.host) {
            Ok(disk) => disk,
            Err(error) => self.fail(&format!("does not open: {error}")),
        };
        if self.half_done == Some(disk.size()) {
            // A resize that failed had been written all the same.
            self.extras
                .resized(&self.model, self.model.size(), disk.size());
            self.model.resize(disk.size());
        }
        self.half_done = None;
        if disk.size() != self.model.size() {
            self.fail(&format!("opens with {} bytes", disk.size()));
        }
        self.disk = Some(disk);
        for number in 0..self.setup.queues as usize {
            self.add_queue(number);
        }
        self.setup.start_trouble(&self.host, &mut self.rng);
    }

    fn add_queue(&mut self, number: usize) {
        let io = self.disk().create_async_io(self.setup.depth).unwrap();
        self.queues.push(Queue { io, number });
    }

    fn live(&mut self) {
        for _ in 0..self.setup.steps {
            match self.rng.below(20) {
                0..10 => self.submit(),
                10..14 => {
                    for _ in 0..=self.rng.below(6) {
                        let _ = self.host.step();
                    }
                }
                14..18 => self.reap_some(),
                18 => {
                    self.quiesce();
                    self.between();
                }
                _ => self.reap_all(),
            }
        }
    }

    /// A range between two cut points, mostly a short one.
    fn range(&mut self) -> (u64, u64) {
        let size = self.model.size();
        let points = self.model.points();
        let inside = points.partition_point(|point| *point <= size) - 1;
        let first = self.rng.below(inside as u64) as usize;
        let most = if self.rng.one_in(10) { inside } else { 6 };
        let last = (first + 1 + self.rng.below(most as u64) as usize).min(inside);
        let points = self.model.points();
        (points[first], points[last])
    }

    fn submit(&mut self) {
        let which = self.rng.below(self.queues.len() as u64) as usize;
        self.submit_on(which);
    }

    fn submit_on(&mut self, which: usize) {
        let mut batch = Vec::new();
        let room = self.queues[which].io.capacity() - self.queues[which].io.in_flight();
        for _ in 0..(1 + self.rng.below(3)).min(room as u64) {
            if let Some(op) = self.request() {
                let id = self.next_request - 1;
                self.owners.insert(id, self.queues[which].number);
                batch.push(Request { id, op });
            }
        }
        let wanted = batch.len();
        let took = self.queues[which].io.submit(&mut batch);
        if took != wanted {
            self.fail(&format!(
                "took {took} of {wanted} requests with room for {room}"
            ));
        }
    }

    fn request(&mut self) -> Option<RequestOp> {
        let (start, end) = self.range();
        let overlap = self.setup.mode == Mode::Overlap;
        let kind = self.rng.below(20);
        let (op, pending) = match kind {
            0..5 => {
                let reading = self.model.read(start, end);
                let buffers = Buffers::owned(AlignedBuf::zeroed((end - start) as usize));
                (
                    RequestOp::Read {
                        offset: start,
                        buffers,
                    },
                    Pending::Read(reading),
                )
            }
            5 | 6 => (RequestOp::Flush, Pending::Flush(self.model.flush())),
            _ => {
                let (first, last) = match kind {
                    7 | 8 => self.setup.discarded(start, end, self.model.size()),
                    _ => (start, end),
                };
                if !overlap && self.model.is_busy(start, end) {
                    return None;
                }
                let zeroes = kind <= 11 || self.rng.one_in(30);
                let id = if zeroes { ZERO } else { self.next_id };
                self.next_id += 1;
                self.model.begin(id, first, last);
                self.extras.changes(&self.model, first, last);
                let op = match kind {
                    7 | 8 => RequestOp::Discard {
                        offset: start,
                        len: end - start,
                    },
                    9..=11 => RequestOp::WriteZeroes {
                        offset: start,
                        len: end - start,
                        may_unmap: self.rng.one_in(2),
                    },
                    _ => RequestOp::Write {
                        offset: start,
                        buffers: Buffers::owned(AlignedBuf::from_slice(&model::bytes(
                            id,
                            start,
                            end - start,
                        ))),
                        fua: self.rng.one_in(6),
                    },
                };
                let durable = matches!(op, RequestOp::Write { fua: true, .. })
                    || self.setup.options_are_write_through();
                let fua = durable.then(|| self.model.fua(id, first, last));
                let pending = Pending::Change {
                    id,
                    start: first,
                    end: last,
                    fua,
                };
                (op, pending)
            }
        };
        self.tell(|| {
            let id = match &pending {
                Pending::Change { id, .. } => *id,
                _ => 0,
            };
            let what = match &op {
                RequestOp::Read { .. } => "read".into(),
                RequestOp::Write { fua, .. } => format!("write {id}, fua {fua}"),
                other => format!("{other:?}"),
            };
            format!("request {}: {start}..{end}: {what}", self.next_request)
        });
        self.pending.insert(self.next_request, pending);
        self.next_request += 1;
        Some(op)
    }

    fn reap_some(&mut self) {
        let which = self.rng.below(self.queues.len() as u64) as usize;
        self.reap(which);
    }

    fn reap_all(&mut self) {
        for which in 0..self.queues.len() {
            self.reap(which);
        }
    }

    fn reap(&mut self, which: usize) -> usize {
        let mut out = Vec::new();
        let count = self.queues[which].io.reap(&mut out);
        for completion in out {
            self.completed(completion);
        }
        count
    }

    fn completed(&mut self, completion: Completion) {
        let Some(pending) = self.pending.remove(&completion.id) else {
            self.fail("a request completed twice");
        };
        let succeeded = completion.result.is_ok();
        self.tell(|| format!("completed {}: {:?}", completion.id, completion.result));
        if let Err(kind) = completion.result {
            self.may_leak = true;
            self.lost |= matches!(kind, ErrorKind::Io(_) | ErrorKind::SyncFailed);
            let expected = self.setup.mode == Mode::Faults
                && matches!(
                    kind,
                    ErrorKind::Io(libc::EIO)
                        | ErrorKind::NoSpace
                        | ErrorKind::SyncFailed
                        | ErrorKind::Corrupt
                );
            if !expected {
                self.fail(&format!("a request failed: {kind:?}"));
            }
        }
        match pending {
            Pending::Read(reading) => {
                let bytes = completion.buffers.unwrap().into_owned().unwrap();
                if succeeded && let Err(why) = self.model.check_read(&reading, &bytes) {
                    self.fail(&why);
                }
            }
            Pending::Change {
                id,
                start,
                end,
                fua,
            } => {
                self.model.end(id, start, end, succeeded);
                if succeeded && let Some(fua) = fua {
                    self.model.fua_done(fua);
                }
            }
            Pending::Flush(flush) => {
                if succeeded {
                    self.model.flushed(flush);
                }
            }
        }
    }

    /// Waits for everything in flight.
    fn quiesce(&mut self) {
        let mut idle = 0;
        while self.queues.iter().any(|queue| queue.io.in_flight() > 0) {
            let moved = self.host.step();
            let reaped: usize = (0..self.queues.len()).map(|which| self.reap(which)).sum();
            if moved || reaped > 0 || !self.host.idle() {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle > 20 {
                let left: Vec<_> = self.queues.iter().map(|q| q.io.in_flight()).collect();
                self.fail(&format!("requests hang: {left:?} in flight"));
            }
        }
    }

    /// What needs quiet queues.
    fn between(&mut self) {
        match self.rng.below(9) {
            6 | 7 => self.change_extras(),
            8 => {
                if self.rng.one_in(4) {
                    self.cut_in_extras();
                }
            }
            0 => self.resize(),
            1 => self.compress(),
            2 => self.drop_queue(),
            3 => self.read_all(),
            4 => {
                let flush = self.model.flush();
                let flushed = self.disk().flush();
                self.tell(|| format!("flush: {flushed:?}"));
                match flushed {
                    Ok(()) => self.model.flushed(flush),
                    Err(error) => self.tolerate(&error, "flush"),
                }
            }
            _ => {
                if self.rng.one_in(3) {
                    self.queues.clear();
                    self.close();
                    self.open();
                }
            }
        }
    }

    pub(crate) fn tolerate(&mut self, error: &block::Error, what: &str) {
        self.may_leak = true;
        self.lost |= matches!(error.kind(), ErrorKind::Io(_) | ErrorKind::SyncFailed);
        if self.setup.mode != Mode::Faults {
            self.fail(&format!("{what}: {error}"));
        }
    }

    fn resize(&mut self) {
        if self.setup.mode == Mode::Faults && self.setup.format == Format::Raw {
            // A file whose length could not be synced has any.
            return;
        }
        let unit = self.setup.size_unit();
        if self.extras.forbids_resize() {
            return;
        }
        let sizes: Vec<u64> = self
            .model
            .points()
            .iter()
            .copied()
            .filter(|point| point.is_multiple_of(unit) && *point > 0)
            .collect();
        if sizes.is_empty() {
            return;
        }
        let size = self.rng.pick(&sizes);
        let resized = self.disk().resize(size);
        self.tell(|| format!("resize to {size}: {resized:?}"));
        match resized {
            Ok(()) => {
                self.half_done = None;
                self.extras.resized(&self.model, self.model.size(), size);
                self.model.resize(size);
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(error) => {
                self.tolerate(&error, "resize");
                self.half_done = Some(size);
                self.resize_failed(size);
            }
        }
        if self.disk().size() != self.model.size() {
            self.fail("a resize left another size");
        }
    }

    /// It may have happened in part: the clusters beyond a smaller size may be gone.
    fn resize_failed(&mut self, size: u64) {
        let end = self.model.size();
        if size < end {
            self.model.begin(ZERO, size, end);
            self.model.end(ZERO, size, end, false);
            // And a backing file may show through.
            let base = crate::setup::BASE;
            self.model.begin(base, size, end);
            self.model.end(base, size, end, false);
        }
    }

    fn compress(&mut self) {
        // A data file cannot have compressed clusters; of one with subclusters a discard leaves parts.
        let setup = &self.setup;
        if setup.format != Format::Qcow2 || setup.extended || setup.data_file.is_some() {
            return;
        }
        let cluster = self.setup.cluster_size;
        let size = self.model.size();
        for _ in 0..=self.rng.below(4) {
            let start = self.rng.below(size.div_ceil(cluster)) * cluster;
            let end = (start + cluster).min(size);
            // One that can be compressed, and is unlike any other.
            let id = if self.rng.one_in(6) {
                ZERO
            } else {
                self.next_id
            };
            self.next_id += 1;
            self.model.begin(id, start, end);
            self.extras.changes(&self.model, start, end);
            let bytes = model::bytes(id, start, end - start);
            let result = self.disk().write_compressed(&bytes, start);
            self.tell(|| format!("write {id} compressed at {start}..{end}: {result:?}"));
            self.model.end(id, start, end, result.is_ok());
            if let Err(error) = result {
                self.tolerate(&error, "write compressed");
            }
        }
    }

    /// A queue goes, with what it had in flight, and another comes.
    fn drop_queue(&mut self) {
        // Nothing else is in flight: on the simulation each queue has a driver of its own, and a
        // drop cannot move those of others.
        let which = self.rng.below(self.queues.len() as u64) as usize;
        for _ in 0..6 {
            self.submit_on(which);
        }
        let queue = self.queues.swap_remove(which);
        drop(queue.io);
        let lost: Vec<u64> = self
            .pending
            .keys()
            .copied()
            .filter(|id| self.owners[id] == queue.number)
            .collect();
        for id in lost {
            // It ended, and nobody knows how.
            if let Some(Pending::Change { id, start, end, .. }) = self.pending.remove(&id) {
                self.model.end(id, start, end, false);
            }
        }
        self.add_queue(queue.number);
    }
}
