//! Programs that may hang: a run of all rows goes on without them.

use std::{
    os::fd::AsFd as _,
    process::{Command, Output, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::Result;

/// How long a program may take for one slice.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs a program to its end, and takes what it prints.
///
/// # Errors
/// When it does not start, or had to be killed because it did not end.
pub fn output(command: &mut Command) -> Result<Output> {
    output_within(command, PATIENCE)
}

fn output_within(command: &mut Command, patience: Duration) -> Result<Output> {
    let name = command.get_program().to_owned();
    let failed = |error| format!("{}: {error}", name.display());
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let pid = Pid::from_child(&child);
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            if late {
                // It may end right now.
                let _ = pidfd_send_signal(process.as_fd(), Signal::KILL);
            }
            late
        });
        let output = child.wait_with_output().map_err(failed);
        drop(end);
        if watch.join().unwrap_or(false) {
            let seconds = patience.as_secs();
            return Err(format!("{}: killed, it ran for {seconds} s", name.display()).into());
        }
        Ok(output?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed() {
        let mut hangs = Command::new("sleep");
        let error = output_within(hangs.arg("1000"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.to_string(), "sleep: killed, it ran for 0 s");
        let done = output(Command::new("echo").arg("words")).unwrap();
        assert!(done.status.success());
        assert_eq!(done.stdout, b"words\n");
        assert!(output(&mut Command::new("/does/not/exist")).is_err());
    }
}
