//! Servers of a disk over vhost-user, as children.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::Result;

/// A server, killed when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Server {
    /// Starts a server that makes a socket.
    ///
    /// # Errors
    /// When it ends instead, or takes longer than ten seconds.
    pub fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).spawn()?;
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = child.try_wait()? {
                return Err(format!("{command:?}: {status}").into());
            }
            if start.elapsed() > Duration::from_secs(10) {
                child.kill()?;
                return Err(format!("{command:?} makes no {}", socket.display()).into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Self {
            child,
            socket: socket.to_owned(),
        })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of a process: of all its threads, those of the kernel that work for its rings
/// included. Threads that ended do not count.
///
/// # Errors
/// When the process is gone.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        sum += text
            .split(' ')
            .next()
            .and_then(|nanos| nanos.parse::<u64>().ok())
            .ok_or("schedstat: no number")?;
    }
    Ok(Duration::from_nanos(sum))
}
