//! What the host has to do for an access or a flush of the guest.

use block::{Disk, DiskFile as _, OpenOptions};
use platter_benches::{
    Direction, Result, Work,
    counting::{Counted, CountingHost},
    fio::{Fio, Replay},
    qemu::{QemuBench, image_opts},
    side::{Load as _, Side, Stop},
    strace,
    stride::{Pattern, Strided},
};

use super::{L2_CACHE, Lab, Set, format_of, fresh::Fresh, how};

/// What is written to.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// In place.
    Stays(Set),
    /// To an image made anew.
    Fresh(Fresh),
}

/// Host operations, for each write of the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct PerWrite {
    pub(super) writes: f64,
    pub(super) bytes: f64,
    pub(super) flushes: f64,
    pub(super) reads: f64,
    pub(super) read_bytes: f64,
}

impl PerWrite {
    /// Whether writes read data, as copy on write does. A table now and then is no reading.
    pub(super) fn reads_data(&self) -> bool {
        self.reads >= 0.5
    }
}

/// Host operations of a run.
struct Seen {
    counted: Counted,
    reads: u64,
    read_bytes: u64,
}

/// Writes of the shorter and of the longer run: what both have in common (opening, closing) cancels out.
const SHORT: u64 = 512;
const LONG: u64 = 1536;

/// Accesses whose reads are done again by fio.
const REPLAYED: u64 = 16384;

impl Lab {
    /// The operations that we do; the pattern need not flush.
    pub(super) fn operations(
        &self,
        target: Target,
        work: Work,
        pattern: Pattern,
    ) -> Result<PerWrite> {
        let run = |ios| -> Result<Seen> {
            let (path, format) = match target {
                Target::Stays(set) => (self.path(set, work.direct)?, format_of(set)),
                Target::Fresh(fresh) => self.remake(fresh, "fresh.ours", work.size)?,
            };
            let host = CountingHost::new();
            let counts = host.counts();
            let open: OpenOptions = how(format, work.direct);
            let disk: Disk = open.open_on(&path, host)?;
            let mut load = Strided::new(&disk, work, pattern)?;
            load.run(Stop::After(ios), 1)?;
            drop(load);
            disk.close()?;
            let reads = counts.take_reads();
            Ok(Seen {
                counted: counts.now(),
                reads: reads.len() as u64,
                read_bytes: reads.iter().map(|(_, len)| len).sum(),
            })
        };
        let (short, long) = (run(SHORT)?, run(LONG)?);
        let per_write = |of: fn(&Seen) -> u64| {
            of(&long).saturating_sub(of(&short)) as f64 / (LONG - SHORT) as f64
        };
        Ok(PerWrite {
            writes: per_write(|seen| seen.counted.writes),
            bytes: per_write(|seen| seen.counted.written),
            flushes: per_write(|seen| seen.counted.flushes),
            reads: per_write(|seen| seen.reads),
            read_bytes: per_write(|seen| seen.read_bytes),
        })
    }

    /// What the host can do with the reads that we do: fio, with each of them. And how many of its reads
    /// one of ours is.
    pub(super) fn same_reads(
        &self,
        set: Set,
        work: Work,
        pattern: Pattern,
    ) -> Result<(Box<dyn Side>, f64)> {
        let path = self.path(set, work.direct)?;
        let host = CountingHost::new();
        let counts = host.counts();
        let disk: Disk = how(format_of(set), work.direct).open_on(&path, host)?;
        let mut load = Strided::new(&disk, work, pattern)?;
        let _ = counts.take_reads();
        let ios = load.run(Stop::After(REPLAYED), 1)?;
        let reads = counts.take_reads();
        let log = self.dir.path().join("reads");
        let replay = Replay::new(&path, &reads, work.depth, &log)?;
        Ok((Box::new(replay), reads.len() as f64 / ios as f64))
    }

    /// Host flushes of QEMU for each flush of the guest, as strace counts them.
    pub(super) fn qemu_flushes(&self, target: Target, work: Work, pattern: Pattern) -> Result<f64> {
        let run = |ios| -> Result<u64> {
            let (path, format) = match target {
                Target::Stays(set) => (self.path(set, work.direct)?, format_of(set)),
                Target::Fresh(fresh) => self.remake(fresh, "fresh.qemu", work.size)?,
            };
            // Flushes of a thread are system calls; the ring's are not.
            let image = image_opts(format.name(), &path, "threads", work.direct, L2_CACHE);
            let bench = QemuBench::command(
                &self.options.qemu.join("qemu-img"),
                &image,
                (&work, &pattern),
                ios,
            );
            strace::flushes(&bench, &self.dir.path().join("strace"))
        };
        let flushes = (LONG - SHORT) / pattern.flush_every;
        Ok((run(LONG)?.saturating_sub(run(SHORT)?)) as f64 / flushes as f64)
    }

    /// What the host can do with the operations that we do: fio with as many writes of that size, as many reads
    /// of theirs, and as many flushes, on a file that is there. And how many of its writes one of ours is.
    pub(super) fn same_operations(
        &self,
        work: Work,
        each: PerWrite,
    ) -> Result<(Box<dyn Side>, f64)> {
        let writes = each.writes.max(1.0);
        let block = |bytes: f64| (bytes / 4096.0).round().max(1.0) as u64 * 4096;
        let size = block(each.bytes / writes);
        let work = Work {
            direction: Direction::Write,
            block: size,
            ..work
        };
        let every = if each.flushes > 0.0 {
            (writes / each.flushes).round().max(1.0) as u64
        } else {
            0
        };
        let mut fio: Fio = self.fio(work)?.flush_every(every);
        if each.reads_data() {
            let percent = 100.0 * each.reads / (each.reads + writes);
            fio = fio.reads(percent.round() as u32, block(each.read_bytes / each.reads));
        }
        Ok((Box::new(fio), writes))
    }
}
