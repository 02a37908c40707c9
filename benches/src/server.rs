//! Servers of a disk over vhost-user, as children.

use std::{
    fs, io,
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
    /// Starts a server that listens on a socket.
    ///
    /// # Errors
    /// When it ends instead, or takes longer than ten seconds.
    pub fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).spawn()?;
        let start = Instant::now();
        while !listening(socket)? {
            if let Some(status) = child.try_wait()? {
                return Err(format!("{command:?}: {status}").into());
            }
            if start.elapsed() > Duration::from_secs(10) {
                child.kill()?;
                let path = socket.display();
                return Err(format!("{command:?} does not listen on {path}").into());
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

/// Set in the flags of a socket that takes connections (`__SO_ACCEPTCON`).
const TAKES_CONNECTIONS: u32 = 1 << 16;

/// Whether somebody listens on a socket: it is there before that.
fn listening(socket: &Path) -> Result<bool> {
    let sockets = fs::read("/proc/net/unix")?;
    let sockets = String::from_utf8_lossy(&sockets);
    let path = socket.to_str().ok_or("the path of a socket is not UTF-8")?;
    Ok(sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        let flags = words
            .nth(3)
            .and_then(|word| u32::from_str_radix(word, 16).ok());
        line.ends_with(path) && flags.is_some_and(|flags| flags & TAKES_CONNECTIONS != 0)
    }))
}

/// Processor time of a process: of all its threads, those that ended and those of the kernel that
/// work for its rings included.
///
/// # Errors
/// When the process is gone.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    // SAFETY: the call writes a clock's number, and `clock` is one.
    let result = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) };
    if result != 0 {
        return Err(format!("process {pid}: {}", io::Error::from_raw_os_error(result)).into());
    }
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes a time, and `now` is one.
    if unsafe { libc::clock_gettime(clock, &raw mut now) } != 0 {
        return Err(format!("process {pid}: {}", io::Error::last_os_error()).into());
    }
    let nanoseconds = u32::try_from(now.tv_nsec)?;
    Ok(Duration::new(now.tv_sec.unsigned_abs(), nanoseconds))
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn processor_time_of_threads_that_ended_counts() {
        let before = cpu_of(process::id()).unwrap();
        let spin = || {
            let end = Instant::now() + Duration::from_millis(30);
            while Instant::now() < end {}
            crate::cpu::time(crate::cpu::Of::Thread)
        };
        let of_thread = thread::spawn(spin).join().unwrap();
        assert!(of_thread > Duration::ZERO);
        assert!(cpu_of(process::id()).unwrap() >= before + of_thread);
    }

    #[test]
    fn a_socket_is_known_to_listen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        assert!(!listening(&path).unwrap());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(listening(&path).unwrap());
        drop(listener);
        assert!(path.exists() && !listening(&path).unwrap());
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(cpu_of(child.id()).is_err());
    }
}
