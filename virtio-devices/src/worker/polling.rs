//! How long a worker looks before it sleeps.
//!
//! Waking a sleeping thread costs more than a request from the page cache, on both sides: the guest
//! has to ring, the host has to schedule. So a worker whose guest comes back soon looks for a while
//! first. How soon a guest comes back to a worker that looks cannot be told from how long a sleep was,
//! which has the waking of both threads in it. So it is tried after a sleep that was not much longer than the
//! limit, and less often the more tries were in vain. A queue that is used seldom, and an idle one, is
//! never polled.
//!
//! A worker that has to sleep for the disk anyway does not look either: there it made the latency longer,
//! not shorter (`docs/performance.md`). Whether it sleeps for the disk is told by the kernel's count of its
//! voluntary context switches, read once for many waits.

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

/// After a sleep of so many limits and longer looking is not tried.
const LONG_SLEEP: u32 = 4;

/// The most sleeps from one try to the next.
const MOST_SKIPPED: u32 = 256;

/// Waits between two looks at how many of them were sleeps for the disk.
const WAITS: u64 = 64;

/// On one processor looking keeps the guest from what is looked for.
static SEVERAL_PROCESSORS: LazyLock<bool> = LazyLock::new(|| {
    thread::available_parallelism().is_ok_and(|count| count > NonZero::<usize>::MIN)
});

/// How often the worker's thread slept for the disk.
#[derive(Debug, Default)]
struct Host {
    /// Waits for the disk, and for the guest alone, since the last look.
    waits: u64,
    alone: u64,
    /// Sleeps of the thread until the last look, if there was one.
    sleeps: Option<u64>,
    /// A good part of the sleeps are for the disk.
    slow: bool,
}

impl Host {
    /// Whether it is time to look.
    fn is_due(&self) -> bool {
        self.waits + self.alone >= WAITS
    }

    /// The thread slept so often until now.
    fn look(&mut self, sleeps: u64) {
        if let Some(before) = self.sleeps {
            let for_disk = sleeps.saturating_sub(before + self.alone);
            self.slow = 4 * for_disk >= self.waits + self.alone;
        }
        (self.waits, self.alone, self.sleeps) = (0, 0, Some(sleeps));
    }
}

/// Voluntary context switches of the calling thread.
fn sleeps() -> u64 {
    // SAFETY: rusage is plain numbers, for which zeroes are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a rusage and outlives the call.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    debug_assert_eq!(result, 0, "the arguments are valid");
    u64::try_from(usage.ru_nvcsw).unwrap_or(0)
}

/// The polling of one worker.
#[derive(Debug)]
pub(super) struct Polling {
    limit: Duration,
    /// Whether to look before the next sleep.
    looks: bool,
    /// While it looks: until when.
    until: Option<Instant>,
    /// Sleeps to come without a try.
    skip: u32,
    /// Sleeps without a try after the next one that is in vain.
    penalty: u32,
    host: Host,
    /// Somebody sleeps after the worker's turn, and tells how long.
    pub(super) enabled: bool,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            limit: DEFAULT_POLL_MAX,
            looks: false,
            until: None,
            skip: 0,
            penalty: 1,
            host: Host::default(),
            enabled: false,
        }
    }
}

impl Polling {
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit.min(HIGHEST);
        self.looks &= !limit.is_zero();
    }

    /// Nothing was found: whether to look again.
    pub(super) fn goes_on(&mut self) -> bool {
        if !self.enabled || !self.looks {
            return false;
        }
        let now = Instant::now();
        let until = *self.until.get_or_insert_with(|| now + self.limit);
        std::hint::spin_loop();
        if now < until {
            return true;
        }
        self.until = None;
        self.in_vain();
        false
    }

    /// Something was found.
    pub(super) fn found(&mut self) {
        if self.until.take().is_some() {
            self.penalty = (self.penalty / 2).max(1);
        }
    }

    fn in_vain(&mut self) {
        self.looks = false;
        self.skip = self.penalty;
        self.penalty = (2 * self.penalty).min(MOST_SKIPPED);
    }

    /// The worker slept for the guest, after it had looked in vain.
    pub(super) fn slept(&mut self, time: Duration) {
        if self.limit.is_zero() || !*SEVERAL_PROCESSORS {
            return;
        }
        self.host.alone += 1;
        self.look_at_host();
        self.adapt(time);
    }

    /// The worker waited for the disk.
    pub(super) fn waited(&mut self) {
        self.host.waits += 1;
        self.look_at_host();
    }

    fn look_at_host(&mut self) {
        if self.host.is_due() && !self.limit.is_zero() {
            self.host.look(sleeps());
        }
    }

    fn adapt(&mut self, slept: Duration) {
        self.looks = false;
        if self.host.slow || slept >= self.limit * LONG_SLEEP {
            return;
        }
        match self.skip.checked_sub(1) {
            Some(left) => self.skip = left,
            None => self.looks = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    /// Whether it looks after a sleep of so many microseconds.
    fn after(polling: &mut Polling, slept: u64) -> bool {
        polling.adapt(micros(slept));
        polling.looks
    }

    #[test]
    fn looking_follows_the_guest() {
        let mut polling = Polling::default();
        let polling = &mut polling;
        assert!(!after(polling, 1000), "it sleeps long");
        assert!(after(polling, 60));
        polling.until = Some(Instant::now());
        polling.found();
        assert!(polling.looks, "it goes on as long as something is found");
        // The more tries are in vain, the fewer there are.
        let mut skipped = [0; 10];
        for count in &mut skipped {
            polling.in_vain();
            while !after(polling, 60) {
                *count += 1;
            }
        }
        assert_eq!(skipped, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]);
        for _ in 0..8 {
            polling.until = Some(Instant::now());
            polling.found();
        }
        polling.in_vain();
        assert_eq!(polling.skip, 1, "and again more once it pays");
    }

    #[test]
    fn nobody_looks_while_the_disk_is_slept_for() {
        let mut polling = Polling::default();
        let mut waits = |disk, guest, sleeps| {
            polling.host.waits = disk;
            polling.host.alone = guest;
            assert!(polling.host.is_due());
            polling.host.look(sleeps);
            after(&mut polling, 5)
        };
        assert!(waits(32, 32, 1000), "nothing is known yet");
        assert!(!waits(32, 32, 1064), "it sleeps for both");
        assert!(!waits(64, 0, 1128), "the guest is found by looking");
        assert!(waits(64, 0, 1130), "the disk is there at once");
        assert!(waits(0, 64, 1200), "only the guest is waited for");
    }

    #[test]
    fn a_sleep_is_counted() {
        let before = sleeps();
        thread::sleep(micros(100));
        assert!(sleeps() > before);
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
        polling.looks = true;
        polling.set_limit(Duration::ZERO);
        assert!(!polling.goes_on());
    }
}
