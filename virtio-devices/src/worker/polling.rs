//! How long a worker looks before it sleeps.
//!
//! Waking a sleeping thread costs more than a request from the page cache, on both sides: the guest
//! has to ring, the host has to schedule. So a worker whose guest comes back soon goes on looking
//! for a while. The while follows the guest: it grows as long as sleeps end within the limit, and
//! is nothing again after one that did not. A queue that is used seldom, and an idle one, is
//! never polled.

use std::{
    num::NonZero,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

/// The limit that a worker starts with.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(32);

/// The highest limit: nobody stops a worker while it looks.
const HIGHEST: Duration = Duration::from_secs(1);

/// The first while after sleeps that were short.
const FIRST: Duration = Duration::from_micros(4);

/// On one processor looking keeps the guest from what is looked for.
static SEVERAL_PROCESSORS: LazyLock<bool> = LazyLock::new(|| {
    thread::available_parallelism().is_ok_and(|count| count > NonZero::<usize>::MIN)
});

/// The polling of one worker.
#[derive(Debug)]
pub(super) struct Polling {
    limit: Duration,
    /// How long to look now.
    window: Duration,
    until: Option<Instant>,
    /// Somebody sleeps after the worker's turn, and tells how long.
    pub(super) enabled: bool,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            limit: DEFAULT_POLL_MAX,
            window: Duration::ZERO,
            until: None,
            enabled: false,
        }
    }
}

impl Polling {
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit.min(HIGHEST);
        self.window = self.window.min(limit);
    }

    /// Nothing was found: whether to look again.
    pub(super) fn goes_on(&mut self) -> bool {
        if !self.enabled || self.window.is_zero() {
            return false;
        }
        let now = Instant::now();
        let until = *self.until.get_or_insert_with(|| now + self.window);
        std::hint::spin_loop();
        now < until
    }

    /// Something was found, or it is time to sleep: the next look is a new one.
    pub(super) fn restart(&mut self) {
        self.until = None;
    }

    /// The worker slept, after it had looked in vain.
    pub(super) fn slept(&mut self, time: Duration) {
        if self.limit.is_zero() || !*SEVERAL_PROCESSORS {
            return;
        }
        self.adapt(time);
    }

    fn adapt(&mut self, slept: Duration) {
        self.window = if self.window + slept > self.limit {
            Duration::ZERO
        } else {
            (2 * self.window).clamp(FIRST.min(self.limit), self.limit)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn the_window_follows_the_guest() {
        let mut polling = Polling::default();
        let mut after = |slept| {
            polling.adapt(micros(slept));
            polling.window
        };
        assert_eq!(after(1000), micros(0), "it sleeps long");
        assert_eq!(after(20), micros(4));
        assert_eq!(after(20), micros(8));
        assert_eq!(after(10), micros(16));
        assert_eq!(after(10), micros(32));
        assert_eq!(after(1), micros(0), "the limit was not enough");
        assert_eq!(after(5), micros(4));
    }

    #[test]
    fn nobody_looks_without_being_asked() {
        let mut polling = Polling::default();
        polling.adapt(micros(5));
        assert!(!polling.goes_on(), "nobody sleeps afterwards");
        polling.enabled = true;
        assert!(polling.goes_on());
        polling.until = Instant::now().checked_sub(micros(1));
        assert!(!polling.goes_on());
        polling.set_limit(Duration::MAX);
        assert_eq!(polling.limit, HIGHEST);
        polling.set_limit(Duration::ZERO);
        polling.restart();
        assert!(!polling.goes_on());
    }
}
