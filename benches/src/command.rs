//! A command as a side: run once a slice, from start to end.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    Result,
    cpu::{self, Of},
    patience,
    side::{Side, Slice},
};

/// A program with its arguments, and the file it makes anew each time.
pub struct Program {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Removed before each run.
    pub output: Option<PathBuf>,
}

impl Program {
    /// Runs it; its exit status must be 0.
    ///
    /// # Errors
    /// When it does not run, or fails.
    pub fn run(&self) -> Result<()> {
        if let Some(output) = &self.output {
            match std::fs::remove_file(output) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("{}: {error}", output.display()).into());
                }
                _ => {}
            }
        }
        let run = patience::output(Command::new(&self.program).args(&self.arguments))?;
        if run.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&run.stderr);
        let program = self.program.display();
        Err(format!(
            "{program} {}: {}: {text}",
            self.arguments.join(" "),
            run.status
        )
        .into())
    }
}

impl Side for Program {
    fn slice(&mut self, _length: Duration, _seed: u64) -> Result<Slice> {
        let before = cpu::time(Of::Children);
        let start = Instant::now();
        self.run()?;
        let wall = start.elapsed();
        let cpu = cpu::time(Of::Children).saturating_sub(before);
        Ok(Slice {
            ios: 1,
            wall,
            thread_cpu: cpu,
            all_cpu: cpu,
        })
    }
}
