//! The options of `bench`, with fio's names.

use block::io::EngineKind;
use clap::Args;

use crate::{
    bench::{
        lane::FrontEnd,
        load::{Load, Mix},
    },
    util::{
        failure::{Failure, Outcome},
        persona, size,
    },
};

/// Measure the I/O of an image, or of this machine
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  How fast is this machine? Temporary raw and qcow2 images, through the virtio-blk device and straight,
  on every engine; the data is verified and the images are removed:
    platter bench

  One load on one image, with fio's option names. What --rw writes overwrites the disk:
    platter bench disk.qcow2 --rw randread --bs 4k --iodepth 32 --numjobs 2 --runtime 10 --direct

  The same through the virtio-blk device, for a program:
    platter bench disk.qcow2 --rw randwrite --device virtio-blk --output json

  Write a known pattern first and check everything that is read, and at the end the whole region:
    platter bench scratch.raw --rw randrw --rwmixread 70 --size 256M --verify

Each job is a queue with a thread of its own. lat_ns are percentiles of the time from submission to
completion, and lat_hist_ns counts those times: the number from one time to another, both included; cpu_ns_per_io is the CPU time of the whole process, kernel threads working for it
included, divided by the requests. With --verify (and in the run without an image) jobs have regions of
their own.")]
pub(crate) struct BenchArgs {
    /// Read, write, randread, randwrite, rw or randrw
    #[arg(
        long,
        alias = "readwrite",
        value_name = "PATTERN",
        default_value = "randread"
    )]
    rw: String,
    /// Bytes of a request
    #[arg(long, alias = "blocksize", value_name = "SIZE", default_value = "4k")]
    bs: String,
    /// Requests in flight, each job
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    iodepth: u32,
    /// Queues, each on a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    numjobs: u32,
    /// Seconds; without an image seconds for each row
    #[arg(long, value_name = "SECONDS")]
    runtime: Option<f64>,
    /// Use only the first bytes of the disk; without an image the size of the temporary ones
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Percentage of reads in rw and randrw
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,
    /// Flush after every so many writes
    #[arg(long, value_name = "N", default_value_t = 0)]
    fsync: u32,
    /// Bypass the host's page cache
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "1", default_value = "0", value_parser = switch, value_name = "0|1")]
    pub(super) direct: bool,
    /// Write a known pattern first, and check what is read
    #[arg(long)]
    pub(super) verify: bool,
    /// The engine: sync, io_uring or linux-aio (fio's names psync and libaio work, too)
    #[arg(long, alias = "ioengine", value_name = "ENGINE", value_parser = engine)]
    pub(super) engine: Option<EngineKind>,
    /// The front end: none (straight through AsyncIo), virtio-blk, nvme, ahci (one port a job, queued
    /// commands, at most 32 at once), or both (none and virtio-blk); without an image both, else none
    #[arg(long, value_name = "none|virtio-blk|nvme|ahci|both")]
    device: Option<String>,
    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE")]
    pub(super) cache: Option<String>,
    /// The format of the image; detected otherwise. Without an image: only this format
    #[arg(short, long, value_name = "FMT")]
    pub(super) format: Option<String>,
    /// The folder of the temporary images; TMPDIR or /var/tmp otherwise
    #[arg(long, value_name = "DIR")]
    pub(super) directory: Option<std::path::PathBuf>,
    /// Print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// Also without an image: show how the latencies of each row lie
    #[arg(long)]
    pub(super) histogram: bool,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    pub(super) image_opts: bool,
    /// The image; temporary ones if not given
    #[arg(value_name = "IMAGE")]
    pub(super) image: Option<String>,
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("expected 0 or 1".into()),
    }
}

fn engine(text: &str) -> Result<EngineKind, String> {
    match text {
        "libaio" => Ok(EngineKind::LinuxAio),
        "psync" | "pvsync" => Ok(EngineKind::Sync),
        text => persona::engine(text),
    }
}

impl BenchArgs {
    /// The pattern of requests.
    pub(super) fn mix(&self) -> Outcome<Mix> {
        let (random, read_percent, name) = match self.rw.as_str() {
            "read" => (false, 100, "read"),
            "write" => (false, 0, "write"),
            "randread" => (true, 100, "randread"),
            "randwrite" => (true, 0, "randwrite"),
            "rw" | "readwrite" => (false, self.rwmixread, "rw"),
            "randrw" => (true, self.rwmixread, "randrw"),
            other => {
                return Err(Failure::new(format!(
                    "--rw '{other}': expected read, write, randread, randwrite, rw or randrw"
                )));
            }
        };
        Ok(Mix {
            name,
            random,
            read_percent,
        })
    }

    /// The load on a disk of `disk_size` bytes.
    pub(super) fn load(&self, mix: Mix, disk_size: u64) -> Outcome<Load> {
        let bs = parse("--bs", &self.bs)?;
        if bs == 0 || !bs.is_multiple_of(512) || bs > 64 << 20 {
            return Err(Failure::new(format!(
                "--bs {}: expected a multiple of 512 up to 64M",
                self.bs
            )));
        }
        let size = self.region()?.unwrap_or(disk_size).min(disk_size);
        let jobs = u64::from(self.numjobs);
        let share = size / jobs / bs * bs;
        if share < bs * u64::from(self.iodepth) {
            return Err(Failure::new(format!(
                "the disk has {size} bytes: too few for {jobs} jobs of {} requests of {bs} bytes",
                self.iodepth
            )));
        }
        Ok(Load {
            mix,
            bs,
            depth: self.iodepth as usize,
            jobs: self.numjobs as usize,
            size: share * jobs,
            runtime: self.seconds(10.0)?,
            flush_every: self.fsync,
        })
    }

    /// The bytes to use, if that was said.
    pub(super) fn region(&self) -> Outcome<Option<u64>> {
        self.size
            .as_deref()
            .map(|text| parse("--size", text))
            .transpose()
    }

    /// How long to measure.
    pub(super) fn seconds(&self, default: f64) -> Outcome<std::time::Duration> {
        let seconds = self.runtime.unwrap_or(default);
        std::time::Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|time| !time.is_zero())
            .ok_or_else(|| Failure::new(format!("--runtime {seconds}: expected seconds")))
    }

    /// The front ends asked for, if any were.
    pub(super) fn chosen_front_ends(&self) -> Outcome<Option<Vec<FrontEnd>>> {
        Ok(Some(match self.device.as_deref() {
            None => return Ok(None),
            Some("none") => vec![FrontEnd::AsyncIo],
            Some("virtio-blk") => vec![FrontEnd::VirtioBlk],
            Some("nvme") => vec![FrontEnd::Nvme],
            Some("ahci") => vec![FrontEnd::Ahci],
            Some("both") => vec![FrontEnd::AsyncIo, FrontEnd::VirtioBlk],
            Some(other) => {
                return Err(Failure::new(format!(
                    "--device '{other}': expected none, virtio-blk, nvme, ahci or both"
                )));
            }
        }))
    }

    /// The front ends to measure on an image.
    pub(super) fn front_ends(&self) -> Outcome<Vec<FrontEnd>> {
        Ok(self
            .chosen_front_ends()?
            .unwrap_or_else(|| vec![FrontEnd::AsyncIo]))
    }

    /// Whether to print JSON.
    pub(super) fn json(&self) -> bool {
        self.output == "json"
    }
}

fn parse(option: &str, text: &str) -> Outcome<u64> {
    size::parse(text).map_err(|_| {
        Failure::new(format!(
            "{option} {text}: expected a size such as 4k, 1M or 2G"
        ))
    })
}
