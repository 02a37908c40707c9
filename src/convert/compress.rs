//! Compressing copies: one cluster at a time, on several threads.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
    mpsc,
};

use block::DiskFile;

use crate::{
    convert::{
        Job,
        scan::{self, Kind, Run, SECTOR, Scanned},
    },
    util::{
        bytes,
        failure::{Failure, Outcome},
        interrupt,
        progress::Progress,
    },
};

/// Copies everything.
pub(super) fn run(job: &Job, progress: &Progress) -> Outcome<()> {
    let cluster = job.target.info().cluster_size.unwrap_or(65536);
    let failed = |error: block::Error| Failure::new(error.to_string());
    let scanned = |(start, disk): &(u64, Box<dyn block::AsyncDiskFile>)| {
        let disk = disk.try_clone().map_err(failed)?;
        Ok(Scanned {
            disk,
            start: *start,
        })
    };
    let sources: Vec<Scanned> = job.sources.iter().map(scanned).collect::<Outcome<_>>()?;
    let (to, from) = mpsc::sync_channel(64);
    let from = Mutex::new(from);
    let (done, ended) = mpsc::channel::<Outcome<u64>>();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (sources, from, stop) = (&sources, &from, &stop);
        scope.spawn(move || {
            let look = job.look(cluster, cluster);
            scan::run(sources, look, &mut |run| to.send(run).is_ok());
        });
        for _ in 0..job.parallel {
            let done = done.clone();
            scope.spawn(move || {
                let mut buf = vec![0; cluster as usize];
                while !stop.load(Ordering::Relaxed) {
                    let next = from.lock().map(|from| from.recv());
                    let Ok(Ok(next)) = next else { break };
                    let result = next.and_then(|run| {
                        interrupt::check()?;
                        if let Some(kind) = run.unknown {
                            job.warn("block status at offset", run.offset, kind);
                        }
                        copy_run(job, sources, &run, &mut buf)?;
                        Ok(run.len)
                    });
                    let over = result.is_err();
                    if done.send(result).is_err() || over {
                        break;
                    }
                }
            });
        }
        drop(done);
        let mut sum = 0;
        let mut first = Ok(());
        for result in ended {
            match result {
                Ok(len) => {
                    sum += len;
                    progress.advance(len);
                    job.keep_rate(sum);
                }
                Err(failure) => {
                    stop.store(true, Ordering::Relaxed);
                    first = first.and(Err(failure));
                }
            }
        }
        // The scanner may be waiting for room: what is left is for nobody.
        if let Ok(from) = from.lock() {
            while from.recv().is_ok() {}
        }
        first
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
            read(job, &*source.disk, part, from - source.start)?;
        }
    }
    write(job, buf, whole)
}

fn read(job: &Job, source: &dyn DiskFile, buf: &mut [u8], offset: u64) -> Outcome<()> {
    let Err(error) = source.read_at(buf, offset) else {
        return Ok(());
    };
    if !job.salvage {
        return Err(Failure::new(format!(
            "error while reading at byte {offset}: {error}"
        )));
    }
    // As much as can be had, a sector at a time.
    for (sector, buf) in buf.chunks_mut(SECTOR as usize).enumerate() {
        let at = offset + sector as u64 * SECTOR;
        if let Err(error) = source.read_at(buf, at) {
            job.warn("offset", at, error.kind());
            buf.fill(0);
        }
    }
    Ok(())
}

/// Writes one cluster; a zero one says so unless everything is to be written.
fn write(job: &Job, buf: &[u8], offset: u64) -> Outcome<()> {
    if job.sparse > 0 && bytes::is_zero(buf) {
        return zero(job, offset, buf.len() as u64);
    }
    job.target
        .write_compressed(buf, offset)
        .map_err(|error| write_failed(offset, &error))
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
        Kind::Zero => zero(job, run.target, run.len),
        Kind::Data => {
            let buf = &mut buf[..run.len as usize];
            read(job, source, buf, run.offset)?;
            write(job, buf, run.target)
        }
    }
}

fn zero(job: &Job, offset: u64, len: u64) -> Outcome<()> {
    if job.target_is_zero {
        return Ok(());
    }
    job.target
        .write_zeroes(offset, len, true)
        .map_err(|error| write_failed(offset, &error))
}

fn write_failed(offset: u64, error: &block::Error) -> Failure {
    Failure::new(format!("error while writing at byte {offset}: {error}"))
}
