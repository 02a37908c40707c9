//! A folder for the images of one run. Those of runs that were killed are removed by the next.

use std::{
    fs::{self, File, TryLockError},
    path::Path,
};

use tempfile::TempDir;

use crate::Result;

/// How the names of such folders begin.
const PREFIX: &str = "platter-bench.";

/// In each of them, locked for as long as its run lives.
const LOCK: &str = "lock";

/// A folder, gone when dropped.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
    // Released after the folder is gone.
    _alive: File,
}

impl Scratch {
    /// A new folder below `parent`, from which those of runs that live no more are removed.
    ///
    /// # Errors
    /// The host's.
    pub fn new_in(parent: &Path) -> Result<Self> {
        // Nobody else looks while there is a folder without a lock.
        let turn = File::open(parent).map_err(|error| format!("{}: {error}", parent.display()))?;
        turn.lock()?;
        remove_stale(parent)?;
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let alive = File::create_new(folder.path().join(LOCK))?;
        alive.lock()?;
        Ok(Self {
            folder,
            _alive: alive,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Removes the folders whose locks nobody holds.
fn remove_stale(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if !is_ours || !entry.file_type()?.is_dir() {
            continue;
        }
        let folder = entry.path();
        let stale = match File::open(folder.join(LOCK)) {
            Ok(lock) => match lock.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => false,
                Err(TryLockError::Error(error)) => return Err(error.into()),
            },
            // It was killed in between, or is on its way out.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) => return Err(error.into()),
        };
        if stale {
            match fs::remove_dir_all(&folder) {
                Ok(()) => eprintln!("{}: left by a killed run: removed", folder.display()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{}: {error}", folder.display()).into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_runs_left_is_removed_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let path = |name: &str| parent.path().join(name);
        // As a killed run leaves them: with a lock that nobody holds, or before there was one.
        for name in ["platter-bench.a", "platter-bench.b", ".tmpother"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("image.raw"), "data").unwrap();
        }
        fs::write(path("platter-bench.a").join(LOCK), "").unwrap();
        fs::write(path("platter-bench.txt"), "a file").unwrap();
        let first = Scratch::new_in(parent.path()).unwrap();
        fs::write(first.path().join("image.raw"), "data").unwrap();
        let second = Scratch::new_in(parent.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(parent.path())
            .unwrap()
            .map(|it| it.unwrap().path())
            .collect();
        left.sort_unstable();
        let mut expected = vec![
            path(".tmpother"),
            path("platter-bench.txt"),
            first.path().to_owned(),
            second.path().to_owned(),
        ];
        expected.sort_unstable();
        assert_eq!(left, expected);
        assert!(first.path().join("image.raw").exists());
        let gone = first.path().to_owned();
        drop(first);
        assert!(!gone.exists());
    }
}
