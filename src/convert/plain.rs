//! Copies as they are, of page-cached files: a thread reads a chunk and writes it while its processor still has
//! the bytes at hand.

use crate::{
    convert::{
        job::Job,
        scan::{Kind, Run},
        workers::{self, Hand},
    },
    util::{bytes, failure::Outcome, progress::Progress},
};

/// Bytes read and written at a time. A quarter of it cost more processor time than qemu-img takes, twice as much saved
/// none (`docs/performance.md`).
const CHUNK: u64 = 1 << 20;

/// Copies everything.
pub(super) fn run(job: &Job, progress: &Progress) -> Outcome<()> {
    // The work is copying memory: more threads than processors only wait for each other.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = job.parallel.min(processors);
    let look = job.look_for_copy(CHUNK);
    workers::run(job, progress, look, threads, |hand, run, buf| {
        copy(job, hand, run, buf)?;
        Ok(if job.is_work(run) { run.len } else { 0 })
    })
}

fn copy(job: &Job, hand: &Hand<'_>, run: &Run, buf: &mut [u8]) -> Outcome<()> {
    let lost = if run.kind == Kind::Data {
        let source = &*hand.sources[run.source].disk;
        let part = &mut buf[..run.len as usize];
        job.read(source, part, run.offset)?
    } else {
        Vec::new()
    };
    let _turn = if job.in_order {
        let Some(turn) = hand.turn() else {
            return Ok(());
        };
        Some(turn)
    } else {
        None
    };
    if let Some(kind) = run.unknown {
        job.warn("block status at offset", run.offset, kind);
    }
    job.tell_lost(&lost);
    match run.kind {
        Kind::Skip => Ok(()),
        Kind::Zero if job.sparse > 0 => job.zero(run.target, run.len),
        Kind::Zero => write_zero_bytes(job, run, buf),
        Kind::Data => write(job, run.target, &buf[..run.len as usize]),
    }
}

/// Writes data, but for runs of zeroes that are long enough.
fn write(job: &Job, mut offset: u64, mut data: &[u8]) -> Outcome<()> {
    if job.sparse == 0 {
        return write_data(job, offset, data);
    }
    while !data.is_empty() {
        let (len, zero) = bytes::zero_run(data, job.sparse as usize);
        let (run, rest) = data.split_at(len);
        if zero {
            job.zero(offset, len as u64)?;
        } else {
            write_data(job, offset, run)?;
        }
        offset += len as u64;
        data = rest;
    }
    Ok(())
}

/// Writes zeroes as data: everything is to be written.
fn write_zero_bytes(job: &Job, run: &Run, buf: &mut [u8]) -> Outcome<()> {
    buf.fill(0);
    let mut at = 0;
    while at < run.len {
        let len = (run.len - at).min(buf.len() as u64);
        write_data(job, run.target + at, &buf[..len as usize])?;
        at += len;
    }
    Ok(())
}

fn write_data(job: &Job, offset: u64, data: &[u8]) -> Outcome<()> {
    job.target
        .write_at(data, offset)
        .map_err(|error| job.failure("writing", offset, &error))
}
