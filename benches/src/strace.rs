//! strace, which counts the system calls of a program.

use std::{fs, path::Path, process::Command};

use crate::Result;

/// Runs a command under strace; how often it flushed a file. `report` is a file that is written.
///
/// # Errors
/// When strace does not run, or the command fails.
pub fn flushes(command: &Command, report: &Path) -> Result<u64> {
    let output = Command::new("strace")
        .args(["-f", "-c", "-e", "trace=fsync,fdatasync", "-o"])
        .arg(report)
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .map_err(|error| format!("strace: {error}; install the package strace"))?;
    if !output.status.success() {
        return Err(format!("strace: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(calls(&fs::read_to_string(report)?))
}

/// The sum of the calls in a summary.
fn calls(summary: &str) -> u64 {
    summary
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.last() {
                Some(&("fsync" | "fdatasync")) => words.get(3)?.parse::<u64>().ok(),
                _ => None,
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_added_up() {
        let summary = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 90.00    0.009000          15       600           fdatasync
 10.00    0.001000          10       100         2 fsync
------ ----------- ----------- --------- --------- ----------------
100.00    0.010000          14       700         2 total
";
        assert_eq!(calls(summary), 700);
        assert_eq!(calls(""), 0);
    }
}
