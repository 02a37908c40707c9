//! Compressing copies: one cluster at a time, on several threads.

use block::DiskFile;

use crate::{
    convert::{
        job::Job,
        scan::{Kind, Run, Scanned},
        workers,
    },
    util::{bytes, failure::Outcome, progress::Progress},
};

/// Copies everything.
pub(super) fn run(job: &Job, progress: &Progress) -> Outcome<()> {
    let cluster = job.target.info().cluster_size.unwrap_or(65536);
    let look = job.look(cluster, cluster);
    workers::run(job, progress, look, job.parallel, |hand, run, buf| {
        if let Some(kind) = run.unknown {
            job.warn("block status at offset", run.offset, kind);
        }
        copy_run(job, hand.sources, run, buf)?;
        Ok(run.len)
    })
}

/// Copies the clusters whose first byte is in a run. One that ends in the next source is put together
/// from all of them.
fn copy_run(job: &Job, sources: &[Scanned], run: &Run, buf: &mut [u8]) -> Outcome<()> {
    let cluster = buf.len() as u64;
    let end = run.target + run.len;
    let first = run.target.next_multiple_of(cluster);
    if first >= end {
        return Ok(());
    }
    let total = sources
        .last()
        .map_or(0, |last| last.start + last.disk.size());
    let whole = if end == total {
        end
    } else {
        (end / cluster * cluster).max(first)
    };
    if first < whole {
        let part = Run {
            offset: run.offset + (first - run.target),
            target: first,
            len: whole - first,
            ..*run
        };
        one(job, &*sources[run.source].disk, &part, buf)?;
    }
    if whole == end {
        return Ok(());
    }
    let len = cluster.min(total - whole) as usize;
    let buf = &mut buf[..len];
    for source in sources {
        let from = whole.max(source.start);
        let to = (whole + len as u64).min(source.start + source.disk.size());
        if from < to {
            let part = &mut buf[(from - whole) as usize..(to - whole) as usize];
            let lost = job.read(&*source.disk, part, from - source.start)?;
            job.tell_lost(&lost);
        }
    }
    write(job, buf, whole)
}

/// Writes one cluster; a zero one says so unless everything is to be written.
fn write(job: &Job, buf: &[u8], offset: u64) -> Outcome<()> {
    if job.sparse > 0 && bytes::is_zero(buf) {
        return job.zero(offset, buf.len() as u64);
    }
    job.target
        .write_compressed(buf, offset)
        .map_err(|error| job.failure("writing", offset, &error))
}

fn one(job: &Job, source: &dyn DiskFile, run: &Run, buf: &mut [u8]) -> Outcome<()> {
    match run.kind {
        Kind::Skip => Ok(()),
        Kind::Zero if job.sparse == 0 => {
            buf.fill(0);
            let mut at = 0;
            while at < run.len {
                let len = (run.len - at).min(buf.len() as u64);
                write(job, &buf[..len as usize], run.target + at)?;
                at += len;
            }
            Ok(())
        }
        Kind::Zero => job.zero(run.target, run.len),
        Kind::Data => {
            let buf = &mut buf[..run.len as usize];
            let lost = job.read(source, buf, run.offset)?;
            job.tell_lost(&lost);
            write(job, buf, run.target)
        }
    }
}
