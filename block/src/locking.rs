//! Image locks, compatible with those of QEMU: each sees the other.

use std::time::{Duration, Instant};

use crate::{
    Error, ErrorKind, Result,
    io::{HostFile, LockError},
    options::Locking,
};

/// Pause between attempts to lock an image that another process still holds.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How long a conflict may last before it is one: a process that was killed keeps its locks until the
/// kernel is done with what it had in flight.
const LINGER: Duration = Duration::from_millis(300);

/// Permissions as QEMU numbers them.
mod permission {
    pub(super) const CONSISTENT_READ: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const RESIZE: u64 = 1 << 3;
}

/// Locks a file for reading or writing; a writer excludes readers and writers. Waits up to `wait`
/// for another process.
pub(crate) fn lock_image(
    file: &HostFile,
    write: bool,
    locking: Locking,
    wait: Duration,
) -> Result<()> {
    if locking == Locking::Off {
        return Ok(());
    }
    let held = if write {
        permission::CONSISTENT_READ | permission::WRITE | permission::RESIZE
    } else {
        permission::CONSISTENT_READ
    };
    let not_shared = permission::WRITE | permission::RESIZE;
    let deadline = Instant::now() + wait.max(LINGER);
    loop {
        match file.lock(held, not_shared) {
            Ok(()) => return Ok(()),
            Err(LockError::NotShared(_) | LockError::InUse(_)) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(LockError::NotShared(name)) => return Err(in_use(file, name, "")),
            Err(LockError::InUse(name)) => return Err(in_use(file, name, "shared ")),
            Err(LockError::Unsupported(error)) if locking == Locking::Auto => {
                tracing::warn!(path = %file.path().display(), %error, "the file system has no locks; going on without");
                return Ok(());
            }
            Err(LockError::Unsupported(error) | LockError::Io(error)) => {
                return Err(Error::from(error).operation("lock").path(file.path()));
            }
        }
    }
}

/// The error for an image that another process uses, in QEMU's words.
fn in_use(file: &HostFile, permission: &str, shared: &str) -> Error {
    Error::with_message(
        ErrorKind::Locked,
        format!(
            "Failed to get {shared}\"{permission}\" lock (is another process using the image?)"
        ),
    )
    .path(file.path())
}
