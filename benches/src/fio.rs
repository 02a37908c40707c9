//! fio as a side: what the host can do with the same file and the same operations.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;

use crate::{
    Direction, Result, Work,
    cpu::{self, Of},
    side::{Side, Slice},
};

/// fio with its io_uring engine. Registered files, no page cache invalidation, no clock reads for
/// latencies, and as many submissions and completions at a time as there are: what costs least.
pub struct Fio {
    file: PathBuf,
    work: Work,
    /// Processor time of a run that does nothing.
    overhead: Duration,
}

impl Fio {
    /// fio on a file that exists.
    ///
    /// # Errors
    /// When fio does not run.
    pub fn new(file: &Path, work: Work) -> Result<Self> {
        let mut fio = Self {
            file: file.to_owned(),
            work,
            overhead: Duration::ZERO,
        };
        let mut idle: Vec<Duration> = Vec::new();
        for _ in 0..5 {
            let before = cpu::time(Of::Children);
            fio.run(&["--number_ios=1".to_owned()])?;
            idle.push(cpu::time(Of::Children) - before);
        }
        idle.sort_unstable();
        fio.overhead = idle[idle.len() / 2];
        Ok(fio)
    }

    fn run(&self, more: &[String]) -> Result<Value> {
        let work = &self.work;
        let rw = match work.direction {
            Direction::Read => "randread",
            Direction::Write => "randwrite",
        };
        let output = Command::new("fio")
            .args([
                "--name=spine",
                "--ioengine=io_uring",
                "--output-format=json",
            ])
            .args(["--registerfiles=1", "--invalidate=0", "--gtod_reduce=1"])
            .args(["--norandommap", "--allow_file_create=0", "--fallocate=none"])
            .args(["--iodepth_batch_complete_min=1", "--thread=1"])
            .arg(format!("--filename={}", self.file.display()))
            .arg(format!("--rw={rw}"))
            .arg(format!("--bs={}", work.block))
            .arg(format!("--size={}", work.size))
            .arg(format!("--direct={}", u8::from(work.direct)))
            .arg(format!("--iodepth={}", work.depth))
            .arg(format!("--iodepth_batch_submit={}", work.depth))
            .arg(format!("--iodepth_batch_complete_max={}", work.depth))
            .args(more)
            .output()
            .map_err(|error| format!("fio: {error}; install the package fio"))?;
        if !output.status.success() {
            return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        // Warnings may come before the JSON.
        let text = String::from_utf8(output.stdout)?;
        let start = text.find('{').ok_or("fio: no JSON")?;
        Ok(serde_json::from_str(&text[start..])?)
    }
}

impl Side for Fio {
    fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice> {
        let before = cpu::time(Of::Children);
        let report = self.run(&[
            "--time_based".to_owned(),
            format!("--runtime={}ms", length.as_millis()),
            format!("--randseed={seed}"),
        ])?;
        let all = cpu::time(Of::Children) - before;
        let job = &report["jobs"][0];
        let number = |value: &Value| value.as_f64().ok_or("fio: a number is missing");
        let side = &job[match self.work.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        }];
        if number(&job["error"])? != 0.0 {
            return Err("fio: the job failed".into());
        }
        let percent = number(&job["usr_cpu"])? + number(&job["sys_cpu"])?;
        let job_time = number(&job["job_runtime"])? / 1e3;
        Ok(Slice {
            ios: number(&side["total_ios"])? as u64,
            wall: Duration::from_secs_f64(number(&side["runtime"])? / 1e3),
            thread_cpu: Duration::from_secs_f64(percent / 100.0 * job_time),
            all_cpu: all.saturating_sub(self.overhead),
        })
    }
}
