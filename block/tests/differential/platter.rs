//! A turn of Platter: requests in flight together, and what needs a quiet queue in between.

use std::time::{Duration, Instant};

use block::{
    AsyncDiskFile, Disk, DiskFile, ErrorKind,
    io::{AlignedBuf, AsyncIo, Buffers, Request, RequestOp},
};

use crate::{model::assert_same, random::Rng, round::Round};

/// Requests of one turn in flight; none overlaps another.
struct Turn {
    io: Box<dyn AsyncIo>,
    busy: Vec<(u64, u64, u64)>,
    next: u64,
    what: String,
}

impl Turn {
    fn submit(&mut self, op: RequestOp, start: u64, len: u64) {
        while self.io.in_flight() == self.io.capacity() {
            self.reap();
        }
        self.next += 1;
        self.busy.push((self.next, start, start + len));
        let mut batch = vec![Request { id: self.next, op }];
        assert_eq!(self.io.submit(&mut batch), 1);
    }

    fn reap(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut out = Vec::new();
        while self.io.reap(&mut out) == 0 {
            assert!(Instant::now() < deadline, "{}: a request hangs", self.what);
            self.io.wait(Some(Duration::from_secs(5))).unwrap();
        }
        for done in out {
            assert_eq!(done.result, Ok(()), "{}", self.what);
            self.busy.retain(|(id, _, _)| *id != done.id);
        }
    }

    fn wait_for(&mut self, start: u64, len: u64) {
        let overlaps = |(_, first, end): &(u64, u64, u64)| *first < start + len && start < *end;
        while self.busy.iter().any(overlaps) {
            self.reap();
        }
    }

    fn finish(&mut self) {
        while self.io.in_flight() > 0 {
            self.reap();
        }
    }
}

impl Round {
    pub(crate) fn platter_turn(&mut self) {
        let disk = self.image.open(false);
        let mut turn = Turn {
            io: disk.create_async_io(16).unwrap(),
            busy: Vec::new(),
            next: 0,
            what: self.what(),
        };
        for _ in 0..10 + self.rng.below(30) {
            self.request(&disk, &mut turn);
        }
        turn.finish();
        drop(turn);
        disk.close().unwrap();
    }

    fn request(&mut self, disk: &Disk, turn: &mut Turn) {
        let unit = if self.rng.one_in(3) { 1 } else { 512 };
        let (start, len) = self.range(unit);
        if len == 0 {
            return;
        }
        let op = match self.rng.below(12) {
            0 | 1 => {
                self.model.at(start, len).fill(0);
                RequestOp::WriteZeroes {
                    offset: start,
                    len,
                    may_unmap: self.rng.one_in(2),
                }
            }
            2 => {
                let (start, len, unit) = self.model.discardable(start, len);
                self.model.discard(start, len, unit);
                RequestOp::Discard { offset: start, len }
            }
            3 => RequestOp::Flush,
            4 => {
                // Compressed data and changes of the size need a quiet queue.
                turn.finish();
                if self.rng.one_in(4) {
                    self.resize(disk);
                } else {
                    self.compress(disk);
                }
                return;
            }
            5 | 6 => {
                turn.finish();
                let mut bytes = vec![0; len as usize];
                disk.read_at(&mut bytes, start).unwrap();
                let what = format!("{}: read at {start}", self.what());
                assert_same(&bytes, self.model.at(start, len), &what);
                return;
            }
            _ => {
                let bytes = self.data(len);
                self.model.at(start, len).copy_from_slice(&bytes);
                RequestOp::Write {
                    offset: start,
                    buffers: Buffers::owned(AlignedBuf::from_slice(&bytes)),
                    fua: self.rng.one_in(8),
                }
            }
        };
        turn.wait_for(start, len);
        turn.submit(op, start, len);
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        if self.rng.one_in(3) {
            return vec![self.rng.below(256) as u8; len as usize];
        }
        let mut seed = Rng(self.rng.next());
        (0..len.div_ceil(8))
            .flat_map(|_| seed.next().to_le_bytes())
            .take(len as usize)
            .collect()
    }

    fn compress(&mut self, disk: &Disk) {
        let (start, len) = self.clusters();
        let len = len.min(self.model.cluster);
        let bytes = self.data(len);
        if !self.can_compress() {
            let error = disk.write_compressed(&bytes, start).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", self.what());
            return;
        }
        disk.write_compressed(&bytes, start).unwrap();
        self.model.compressed.insert(start / self.model.cluster);
        self.model.at(start, len).copy_from_slice(&bytes);
    }

    fn resize(&mut self, disk: &Disk) {
        if self.snapshot.is_some() {
            // QEMU wants the sizes of disk and snapshot to be the same in what follows.
            return;
        }
        let sectors = self.model.size() / 512;
        let size = (sectors / 2 + self.rng.below(sectors)).max(1) * 512;
        match disk.resize(size) {
            Ok(()) => {
                self.model.bytes.resize(size as usize, 0);
                // The bits of what is cut off are gone, and those of what is new are clear.
                if let Some(old) = &mut self.bitmap {
                    old.truncate(size as usize);
                }
                assert_eq!(disk.size(), size);
            }
            Err(error) => {
                let what = format!("{}: resize: {error}", self.what());
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{what}");
            }
        }
    }
}
