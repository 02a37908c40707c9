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
        scan::{self, Kind, Run, Scanned},
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
            scan::run(sources, job.target_has_backing, cluster, cluster, &to);
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
                        one(job, &*sources[run.source].disk, &run, &mut buf)?;
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

fn one(job: &Job, source: &dyn DiskFile, run: &Run, buf: &mut [u8]) -> Outcome<()> {
    match run.kind {
        Kind::Skip => Ok(()),
        Kind::Zero => zero(job, run.target, run.len),
        Kind::Data => {
            let buf = &mut buf[..run.len as usize];
            if let Err(error) = source.read_at(buf, run.offset) {
                if !job.salvage {
                    let at = run.offset;
                    return Err(Failure::new(format!(
                        "error while reading at byte {at}: {error}"
                    )));
                }
                buf.fill(0);
            }
            if job.sparse > 0 && bytes::is_zero(buf) {
                return zero(job, run.target, run.len);
            }
            job.target
                .write_compressed(buf, run.target)
                .map_err(|error| write_failed(run.target, &error))
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
