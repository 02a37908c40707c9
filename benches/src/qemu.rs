//! QEMU as a side: `qemu-img bench` on an image, or on a disk that somebody serves.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    Direction, Result, Work,
    cpu::{self, Of},
    patience,
    side::{Side, Slice},
    stride::Pattern,
};

/// The ways in which QEMU does host I/O; the first is for direct I/O alone.
const AIO: [&str; 3] = ["native", "io_uring", "threads"];

/// How often each is tried before one is chosen.
const TRIES: usize = 3;

/// The way of host I/O with the highest rate: the median of some tries each, in turn. One alone may meet a
/// moment in which the disk is slow.
///
/// # Errors
/// Those of `rate`.
pub fn fastest_aio(
    direct: bool,
    mut rate: impl FnMut(&'static str) -> Result<f64>,
) -> Result<&'static str> {
    let kinds = if direct { &AIO[..] } else { &AIO[1..] };
    let mut rates = vec![Vec::with_capacity(TRIES); kinds.len()];
    for _ in 0..TRIES {
        for (kind, rates) in kinds.iter().zip(&mut rates) {
            rates.push(rate(kind)?);
        }
    }
    let mut best = (0.0, kinds[0]);
    for (kind, mut rates) in kinds.iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let median = rates[TRIES / 2];
        if median > best.0 {
            best = (median, kind);
        }
    }
    Ok(best.1)
}

/// What does a side's work, when it is not the children of this process.
pub type Worker = Box<dyn Fn() -> Result<Duration>>;

/// A run of `qemu-img bench` a slice.
pub struct QemuBench {
    program: PathBuf,
    /// The image, as `--image-opts` wants it.
    image: String,
    work: Work,
    pattern: Pattern,
    /// Accesses a second, as of the last slice.
    rate: f64,
    /// Processor time of a run that does nothing.
    overhead: Duration,
    /// Whose processor time counts: this one's, or the program's own.
    worker: Option<Worker>,
    /// The number of accesses, where time does not decide.
    count: Option<u64>,
}

impl QemuBench {
    /// A bench of an image that exists.
    ///
    /// # Errors
    /// When the program does not run.
    pub fn new(program: &Path, image: String, work: Work, pattern: Pattern) -> Result<Self> {
        let mut bench = Self::unmeasured(program, image, work, pattern);
        let mut idle = Vec::new();
        for _ in 0..3 {
            idle.push(bench.run(1)?.all_cpu);
        }
        idle.sort_unstable();
        bench.overhead = idle[1];
        bench.rate = bench.run(1000.max(u64::from(work.depth) * 20))?.iops();
        Ok(bench)
    }

    /// A bench of an image that has to stay as it is until the first slice. Of the processor time,
    /// that of `qemu-img info` does not count.
    ///
    /// # Errors
    /// When the program does not run.
    pub fn fresh(program: &Path, image: String, work: Work, pattern: Pattern) -> Result<Self> {
        let mut bench = Self::unmeasured(program, image, work, pattern);
        let before = cpu::time(Of::Children);
        let info = Command::new(program)
            .args(["info", "-U", "--image-opts", &bench.image])
            .output()?;
        if !info.status.success() {
            let error = String::from_utf8_lossy(&info.stderr);
            return Err(format!("qemu-img info on {}: {error}", bench.image).into());
        }
        bench.overhead = cpu::time(Of::Children) - before;
        Ok(bench)
    }

    fn unmeasured(program: &Path, image: String, work: Work, pattern: Pattern) -> Self {
        Self {
            program: program.to_owned(),
            image,
            work,
            pattern,
            rate: 0.0,
            overhead: Duration::ZERO,
            worker: None,
            count: None,
        }
    }

    /// Counts the processor time of somebody else.
    #[must_use]
    pub fn worker(mut self, worker: Worker) -> Self {
        self.worker = Some(worker);
        self.overhead = Duration::ZERO;
        self
    }

    /// Does so many accesses, however long that takes.
    #[must_use]
    pub fn count(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    /// Accesses a second in the last run.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// The command that does so many accesses.
    #[must_use]
    pub fn command(
        program: &Path,
        image: &str,
        (work, pattern): (&Work, &Pattern),
        ios: u64,
    ) -> Command {
        let mut command = Command::new(program);
        command
            .args(["bench", "-c", &ios.to_string()])
            .args(["-d", &work.depth.to_string()])
            .args(["-s", &work.block.to_string()])
            .args(["-S", &pattern.step.to_string()])
            // Of the page cache, and of native AIO, the image's own options decide.
            .args(["-t", if work.direct { "none" } else { "writeback" }]);
        if work.direction == Direction::Write {
            command.args(["-w", "--pattern=5"]);
            if pattern.flush_every > 0 {
                command.arg(format!("--flush-interval={}", pattern.flush_every));
            }
        }
        command.args(["--image-opts", image]);
        command
    }

    fn run(&self, ios: u64) -> Result<Slice> {
        let cpu_now = || match &self.worker {
            Some(worker) => worker(),
            None => Ok(cpu::time(Of::Children)),
        };
        let before = cpu_now()?;
        let mut command =
            Self::command(&self.program, &self.image, (&self.work, &self.pattern), ios);
        let output = patience::output(&mut command)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let seconds = text
            .split("completed in ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        let Some(seconds) = seconds.filter(|_| output.status.success()) else {
            let error = String::from_utf8_lossy(&output.stderr);
            return Err(format!("qemu-img bench on {}: {error}", self.image).into());
        };
        let cpu = cpu_now()?.saturating_sub(before + self.overhead);
        Ok(Slice {
            ios,
            wall: Duration::from_secs_f64(seconds),
            thread_cpu: cpu,
            all_cpu: cpu,
        })
    }
}

impl Side for QemuBench {
    fn slice(&mut self, length: Duration, _seed: u64) -> Result<Slice> {
        let least = u64::from(self.work.depth) * 4;
        let timed = ((self.rate * length.as_secs_f64()) as u64).max(least);
        let slice = self.run(self.count.unwrap_or(timed))?;
        self.rate = slice.iops();
        Ok(slice)
    }
}

/// An image as `--image-opts` wants it, with host I/O of a kind and an L2 cache of so many bytes.
#[must_use]
pub fn image_opts(format: &str, path: &Path, aio: &str, direct: bool, l2_cache: u64) -> String {
    let cache = match format {
        "qcow2" => format!(",l2-cache-size={l2_cache}"),
        _ => String::new(),
    };
    format!(
        "driver={format}{cache},file.driver=file,file.filename={},file.aio={aio},file.locking=off,\
         file.cache.direct={switch},cache.direct={switch}",
        path.display(),
        switch = if direct { "on" } else { "off" },
    )
}
