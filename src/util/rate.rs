//! A limit to how fast a command works.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    create::parse_size,
    util::failure::{Failure, Outcome},
};

/// Bytes a second, counted from when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    bytes: Option<u64>,
    started: Instant,
}

impl Rate {
    /// The rate that an option's value asks for; none, or 0, is no limit.
    pub(crate) fn parse(text: Option<&str>) -> Outcome<Self> {
        let read = |text: &str| {
            parse_size(text)
                .map_err(|_| Failure::new(format!("Invalid rate limit specified: '{text}'.")))
        };
        Ok(Self {
            bytes: text.map(read).transpose()?.filter(|bytes| *bytes > 0),
            started: Instant::now(),
        })
    }

    /// Waits until `done` bytes keep to the rate.
    pub(crate) fn keep(&self, done: u64) {
        let Some(rate) = self.bytes else { return };
        let due = Duration::from_secs_f64(done as f64 / rate as f64);
        if let Some(early) = due.checked_sub(self.started.elapsed()) {
            sleep(early);
        }
    }
}
