//! SIGINT and SIGTERM end long commands in order, so that nothing half-written is left behind.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use block::ErrorKind;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

use crate::util::failure::{Failure, Outcome};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on the first signal is only noted, for [`check`]; the second ends the program at once.
pub(crate) fn watch() {
    let stop = STOP.get_or_init(|| Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM] {
        // Where a signal cannot be watched it does what it always did.
        let _ = flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(stop));
        let _ = flag::register(signal, Arc::clone(stop));
    }
}

/// [`check`] for work of the library: what it returns ends the work.
pub(crate) fn stop() -> block::Result<()> {
    check().map_err(|_| block::Error::new(ErrorKind::Cancelled))
}

/// The failure that stands for an error of [`stop`].
pub(crate) fn failure(error: &block::Error) -> Option<Failure> {
    (error.kind() == ErrorKind::Cancelled).then(check)?.err()
}

/// Fails once a signal was noted.
pub(crate) fn check() -> Outcome<()> {
    match STOP.get() {
        Some(stop) if stop.load(Ordering::Relaxed) => Err(Failure::new("interrupted").status(130)),
        _ => Ok(()),
    }
}
