//! Processor time, as the kernel accounts it.

use std::{mem::MaybeUninit, time::Duration};

/// Whose processor time.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// The calling thread.
    Thread,
    /// The whole process: also the kernel's workers for its rings.
    Process,
    /// Child processes that ended and were waited for.
    Children,
}

/// User and system time used so far.
#[must_use]
pub fn time(of: Of) -> Duration {
    let who = match of {
        Of::Thread => libc::RUSAGE_THREAD,
        Of::Process => libc::RUSAGE_SELF,
        Of::Children => libc::RUSAGE_CHILDREN,
    };
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills a `rusage`, and `usage` is one.
    let result = unsafe { libc::getrusage(who, usage.as_mut_ptr()) };
    debug_assert_eq!(result, 0, "getrusage takes these three");
    // SAFETY: all zero bytes are a valid `rusage`, and so is what the kernel wrote.
    let usage = unsafe { usage.assume_init() };
    let part = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs())
            + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    part(usage.ru_utime) + part(usage.ru_stime)
}
