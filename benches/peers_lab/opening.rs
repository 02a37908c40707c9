//! Opening an image, and a disk that nobody uses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use block::{DiskFile as _, Format, OpenOptions};
use platter_benches::{
    Direction, Result, Work, command::Program, maintenance::Images, server::cpu_of,
};

use super::{Lab, Set, client::Client};

/// The option of this program that opens an image and tells the memory that this took.
pub(crate) const OPEN: &str = "--open";

/// Resident memory of this process, in KiB.
fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(number.ok_or("/proc/self/status: no VmRSS")?)
}

/// Opens an image, and prints by how many KiB the memory of this process grew. Another one is opened
/// first, so that the program's own pages do not count.
pub(crate) fn open_and_tell(first: &Path, second: &Path) -> Result<()> {
    let open = |path| {
        let options = OpenOptions::new().format(Format::Qcow2).read_only(true);
        options.open_disk(path)
    };
    let warm = open(first)?;
    let before = resident()?;
    let disk = open(second)?;
    let after = resident()?;
    println!("{}", after.saturating_sub(before));
    disk.close()?;
    warm.close()?;
    Ok(())
}

/// What a disk that nobody used did, a second.
pub(super) struct Idle {
    pub(super) switches: f64,
    pub(super) cpu_us: f64,
}

/// The kernel's own workers for a ring go after five seconds without work, which is a switch each.
const SETTLE: Duration = Duration::from_secs(7);
const WATCHED: Duration = Duration::from_secs(10);

impl Lab {
    /// An image with this many bytes of disk and nothing in it.
    pub(super) fn empty_image(&self, size: u64) -> Result<PathBuf> {
        let path = self.dir.path().join(format!("open.{size}.qcow2"));
        if !path.exists() {
            self.make(Format::Qcow2, &path, size, &[])?;
        }
        Ok(path)
    }

    /// By how many KiB a process grows that opens an image.
    pub(super) fn growth(&self, image: &Path) -> Result<f64> {
        let small = self.empty_image(1 << 20)?;
        let output = Command::new(std::env::current_exe()?)
            .arg(OPEN)
            .args([&small, image])
            .stdin(Stdio::null())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.trim().parse() {
            Ok(number) if output.status.success() => Ok(number),
            _ => {
                let error = String::from_utf8_lossy(&output.stderr);
                Err(format!("opening {}: {error}", image.display()).into())
            }
        }
    }

    /// Images for the maintenance commands.
    pub(super) fn maintenance(&self) -> Result<Images> {
        let peer = self.options.qemu.join("qemu-img");
        Images::new(
            self.dir.path(),
            self.options.size,
            &self.options.platter,
            &peer,
        )
    }

    /// `info` of an image, by us and by QEMU.
    pub(super) fn infos(&self, image: &Path) -> (Program, Program) {
        let info = |program: &Path| Program {
            program: program.to_owned(),
            arguments: vec!["info".to_owned(), image.display().to_string()],
            output: None,
        };
        (
            info(&self.options.platter),
            info(&self.options.qemu.join("qemu-img")),
        )
    }

    /// A served disk that was used, and then is not.
    pub(super) fn idle(&self, format: Format) -> Result<(Idle, Idle)> {
        let work = Work {
            direction: Direction::Read,
            direct: false,
            block: 4096,
            depth: 1,
            size: self.size(),
        };
        let (mut ours, mut peer) = self.one_by_one(Set::Plain(format), work)?;
        ours.slice(Duration::from_millis(200), 1)?;
        peer.slice(Duration::from_millis(200), 1)?;
        thread::sleep(SETTLE);
        let now = |client: &Client| -> Result<(u64, Duration)> {
            Ok((switches(client.pid())?, cpu_of(client.pid())?))
        };
        let before = [now(&ours)?, now(&peer)?];
        thread::sleep(WATCHED);
        let after = [now(&ours)?, now(&peer)?];
        let idle = |at: usize| {
            let seconds = WATCHED.as_secs_f64();
            let cpu = after[at].1.saturating_sub(before[at].1);
            Idle {
                switches: after[at].0.abs_diff(before[at].0) as f64 / seconds,
                cpu_us: cpu.as_nanos() as f64 / 1e3 / seconds,
            }
        };
        Ok((idle(0), idle(1)))
    }
}

/// How often the threads of a process were given a processor, so far.
fn switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        sum += status
            .lines()
            .filter(|line| line.contains("voluntary_ctxt_switches:"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum::<u64>();
    }
    Ok(sum)
}
