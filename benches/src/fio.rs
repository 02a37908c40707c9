//! fio as a side: what the host can do with the same file and the same operations.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;

use crate::{
    Direction, Result, Work,
    cpu::{self, Of},
    lanes, patience,
    side::{Side, Slice},
};

/// fio with its io_uring engine. Registered files, no page cache invalidation, no clock reads for
/// latencies, and as many submissions and completions at a time as there are: what costs least.
pub struct Fio {
    file: PathBuf,
    work: Work,
    /// Threads, and whether each has a processor of its own.
    jobs: usize,
    pinned: bool,
    /// `fdatasync` after so many writes; 0: never.
    flush_every: u64,
    /// Percentage of reads between the writes, and their size.
    reads: Option<(u32, u64)>,
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
            jobs: 1,
            pinned: false,
            flush_every: 0,
            reads: None,
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

    /// Lets so many threads do the work, each with as many accesses in flight, pinned to the
    /// first processors.
    #[must_use]
    pub fn jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs;
        self.pinned = true;
        self
    }

    /// Flushes after so many writes; 0: never.
    #[must_use]
    pub fn flush_every(mut self, writes: u64) -> Self {
        self.flush_every = writes;
        self
    }

    /// Puts so many percent of reads of a size between the writes. Only the writes are counted.
    #[must_use]
    pub fn reads(mut self, percent: u32, block: u64) -> Self {
        self.reads = Some((percent, block));
        self
    }

    /// The options of several pinned threads.
    fn threads(&self) -> Result<Vec<String>> {
        let processors = lanes::processors()?;
        let first: Vec<String> = processors
            .iter()
            .take(self.jobs)
            .map(usize::to_string)
            .collect();
        Ok(vec![
            format!("--numjobs={}", self.jobs),
            "--group_reporting".to_owned(),
            format!("--cpus_allowed={}", first.join(",")),
            "--cpus_allowed_policy=split".to_owned(),
        ])
    }

    fn run(&self, more: &[String]) -> Result<Value> {
        let work = &self.work;
        let rw = match (work.direction, self.reads) {
            (Direction::Read, _) => "randread",
            (Direction::Write, None) => "randwrite",
            (Direction::Write, Some(_)) => "randrw",
        };
        let block = match self.reads {
            None => work.block.to_string(),
            Some((_, reads)) => format!("{reads},{}", work.block),
        };
        let mut command = Command::new("fio");
        command
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
            .arg(format!("--bs={block}"))
            .arg(format!("--size={}", work.size))
            .arg(format!("--direct={}", u8::from(work.direct)))
            .arg(format!("--iodepth={}", work.depth))
            .arg(format!("--iodepth_batch_submit={}", work.depth))
            .arg(format!("--iodepth_batch_complete_max={}", work.depth))
            .args(more);
        if let Some((percent, _)) = self.reads {
            command.arg(format!("--rwmixread={percent}"));
        }
        launch(&mut command)
    }
}

/// Runs fio; its report.
fn launch(command: &mut Command) -> Result<Value> {
    let output =
        patience::output(command).map_err(|error| format!("{error}; install the package fio"))?;
    if !output.status.success() {
        return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    // Warnings may come before the JSON.
    let text = String::from_utf8(output.stdout)?;
    let start = text.find('{').ok_or("fio: no JSON")?;
    Ok(serde_json::from_str(&text[start..])?)
}

fn number(value: &Value) -> Result<f64> {
    Ok(value.as_f64().ok_or("fio: a number is missing")?)
}

/// Processor time of the threads of a job, by its own count.
fn own_time(job: &Value) -> Result<Duration> {
    let percent = number(&job["usr_cpu"])? + number(&job["sys_cpu"])?;
    let job_time = number(&job["job_runtime"])? / 1e3;
    Ok(Duration::from_secs_f64(percent / 100.0 * job_time))
}

/// fio with its io_uring engine and reads at given places, from the first to the last.
pub struct Replay {
    log: PathBuf,
    depth: u32,
}

impl Replay {
    /// Reads of a file: offsets and lengths in bytes. `log` is a file that is written.
    ///
    /// # Errors
    /// The host's.
    pub fn new(file: &Path, reads: &[(u64, u64)], depth: u32, log: &Path) -> Result<Self> {
        let file = file.display();
        let mut text = format!("fio version 2 iolog\n{file} add\n{file} open\n");
        for (offset, len) in reads {
            text += &format!("{file} read {offset} {len}\n");
        }
        text += &format!("{file} close\n");
        fs::write(log, text)?;
        Ok(Self {
            log: log.to_owned(),
            depth,
        })
    }
}

impl Side for Replay {
    fn slice(&mut self, _length: Duration, _seed: u64) -> Result<Slice> {
        let mut command = Command::new("fio");
        command
            .args(["--name=replay", "--ioengine=io_uring", "--direct=1"])
            .args(["--output-format=json", "--invalidate=0", "--gtod_reduce=1"])
            .args(["--replay_no_stall=1", "--thread=1"])
            .args(["--iodepth_batch_complete_min=1"])
            .arg(format!("--read_iolog={}", self.log.display()))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--iodepth_batch_submit={}", self.depth))
            .arg(format!("--iodepth_batch_complete_max={}", self.depth));
        let report = launch(&mut command)?;
        let job = &report["jobs"][0];
        let cpu = own_time(job)?;
        let ios = number(&job["read"]["total_ios"])?;
        if number(&job["error"])? != 0.0 || ios == 0.0 {
            return Err("fio: the replay failed".into());
        }
        Ok(Slice {
            ios: ios as u64,
            wall: Duration::from_secs_f64(number(&job["read"]["runtime"])? / 1e3),
            thread_cpu: cpu,
            all_cpu: cpu,
        })
    }
}

impl Side for Fio {
    fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice> {
        let before = cpu::time(Of::Children);
        let mut more = vec![
            "--time_based".to_owned(),
            format!("--runtime={}ms", length.as_millis()),
            format!("--randseed={seed}"),
        ];
        if self.pinned {
            more.extend(self.threads()?);
        }
        if self.flush_every > 0 {
            more.push(format!("--fdatasync={}", self.flush_every));
        }
        let report = self.run(&more)?;
        let all = cpu::time(Of::Children) - before;
        let job = &report["jobs"][0];
        let side = &job[match self.work.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        }];
        if number(&job["error"])? != 0.0 {
            return Err("fio: the job failed".into());
        }
        let thread_cpu = own_time(job)?;
        // What starting fio costs varies by more than a twentieth of a short slice. Its own count of its
        // threads is exact, and misses only workers of the kernel, which buffered writes have.
        let buffered_writes = self.work.direction == Direction::Write && !self.work.direct;
        let all_cpu = if buffered_writes || self.flush_every > 0 {
            all.saturating_sub(self.overhead)
        } else {
            thread_cpu
        };
        Ok(Slice {
            ios: number(&side["total_ios"])? as u64,
            wall: Duration::from_secs_f64(number(&side["runtime"])? / 1e3),
            thread_cpu,
            all_cpu,
        })
    }
}
