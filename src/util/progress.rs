//! Progress: a bar for people, QEMU's percentages for those who expect them.

use std::{cell::Cell, io::Write, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{say, util::persona::Persona};

/// Shows how far a command got.
pub(crate) enum Progress {
    /// Nobody asked.
    Silent,
    /// Platter's bar, on standard error.
    Bar(ProgressBar),
    /// `qemu-img`'s percentages, on standard output.
    Percent {
        /// All the work.
        total: u64,
        /// The work done.
        done: Cell<u64>,
        /// Hundredths of a percent printed last.
        shown: Cell<u64>,
    },
}

impl Progress {
    /// Progress over `total` bytes of work, shown if `wanted`.
    pub(crate) fn bytes(wanted: bool, persona: Persona, what: &str, total: u64) -> Self {
        if !wanted {
            return Progress::Silent;
        }
        if persona.is_qemu() {
            let progress = Progress::Percent {
                total,
                done: Cell::new(0),
                shown: Cell::new(0),
            };
            progress.percent(0);
            return progress;
        }
        let style = ProgressStyle::with_template(
            "{msg} [{bar:32}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
        let bar = ProgressBar::new(total).with_style(style);
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(250));
        Progress::Bar(bar)
    }

    /// `bytes` more are done.
    pub(crate) fn advance(&self, bytes: u64) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => bar.inc(bytes),
            Progress::Percent { total, done, shown } => {
                done.set(done.get().saturating_add(bytes).min(*total));
                let scaled = u128::from(done.get()) * 10_000 / u128::from((*total).max(1));
                let scaled = scaled as u64;
                // One line per percent is what a terminal can follow.
                if scaled >= shown.get() + 100 {
                    shown.set(scaled);
                    self.percent(scaled);
                }
            }
        }
    }

    /// All is done.
    pub(crate) fn finish(self) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => bar.finish(),
            Progress::Percent { .. } => {
                self.percent(10_000);
                say!("");
            }
        }
    }

    fn percent(&self, hundredths: u64) {
        crate::util::out::print(format_args!(
            "    ({}.{:02}/100%)\r",
            hundredths / 100,
            hundredths % 100
        ));
        // A closed standard output must not end the work.
        let _ = std::io::stdout().flush();
    }
}
