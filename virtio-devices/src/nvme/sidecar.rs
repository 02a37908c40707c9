//! What a namespace has to remember beside its image: one file, always whole.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{identity::Identity, reservation::SavedReservations, sanitize::SavedSanitize};
use crate::{Error, Result};

/// The version of the file that is written here.
const VERSION: u32 = 1;
/// A file larger than this is not ours.
const MAX_BYTES: u64 = 16 << 20;

/// The content of a sidecar file. It is untrusted when it is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Content {
    pub(super) version: u32,
    /// Bytes of a logical block; 0: as configured.
    #[serde(default)]
    pub(super) lba_size: u32,
    /// Blocks marked uncorrectable: first byte and length.
    #[serde(default)]
    pub(super) uncorrectable: Vec<(u64, u64)>,
    #[serde(default)]
    pub(super) reservations: Option<SavedReservations>,
    #[serde(default)]
    pub(super) sanitize: Option<SavedSanitize>,
    /// Of a namespace in the pool: what names it for ever.
    #[serde(default)]
    pub(super) identity: Option<Identity>,
    /// Of a namespace in the pool: the controllers that it is attached to.
    #[serde(default)]
    pub(super) attached: BTreeSet<u16>,
}

/// A sidecar file.
#[derive(Debug)]
pub(super) struct Sidecar {
    path: PathBuf,
    /// Held while the file is replaced; set once it was removed.
    removed: Mutex<bool>,
}

impl Sidecar {
    /// Reads the file, if there is one, and makes sure that it can be written.
    pub(super) fn open(path: &Path) -> Result<(Self, Content)> {
        let sidecar = Self {
            path: path.to_owned(),
            removed: Mutex::default(),
        };
        let content = match fs::metadata(path) {
            Ok(meta) if meta.len() > MAX_BYTES => {
                return Err(sidecar.failed(format!("{} bytes, too large", meta.len())));
            }
            Ok(_) => sidecar.read()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content {
                version: VERSION,
                ..Content::default()
            },
            Err(error) => return Err(sidecar.failed(error)),
        };
        sidecar.write(|| content.clone())?;
        Ok((sidecar, content))
    }

    fn read(&self) -> Result<Content> {
        let bytes = fs::read(&self.path).map_err(|error| self.failed(error))?;
        let content: Content =
            serde_json::from_slice(&bytes).map_err(|error| self.failed(error))?;
        if content.version != VERSION {
            return Err(self.failed(format!(
                "version is {}, this is version {VERSION}",
                content.version
            )));
        }
        if !matches!(content.lba_size, 0 | 512 | 4096) {
            return Err(self.failed(format!(
                "lba_size is {}, expected 512 or 4096",
                content.lba_size
            )));
        }
        Ok(content)
    }

    /// Replaces the file by what there is to remember now: whatever happens, it holds the old content or
    /// the new. A file that was removed stays away.
    pub(super) fn write(&self, content: impl FnOnce() -> Content) -> Result<()> {
        let removed = self.removed();
        if *removed {
            return Ok(());
        }
        self.replace(&content()).map_err(|error| self.failed(error))
    }

    fn removed(&self) -> MutexGuard<'_, bool> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, content: &Content) -> io::Result<()> {
        let bytes = serde_json::to_vec(content)?;
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let fresh = self.path.with_file_name(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)?.sync_all()
    }

    /// Removes the file, with the namespace it belongs to.
    pub(super) fn remove(&self) -> Result<()> {
        let mut removed = self.removed();
        *removed = true;
        fs::remove_file(&self.path).map_err(|error| self.failed(error))
    }

    fn failed(&self, reason: impl std::fmt::Display) -> Error {
        Error::Config(format!("sidecar {}: {reason}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.nvme");
        let (sidecar, mut content) = Sidecar::open(&path).unwrap();
        content.lba_size = 4096;
        content.uncorrectable = vec![(0, 4096)];
        sidecar.write(|| content.clone()).unwrap();
        assert_eq!(Sidecar::open(&path).unwrap().1, content);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_removed_stays_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.nvme");
        let (sidecar, content) = Sidecar::open(&path).unwrap();
        sidecar.remove().unwrap();
        // What was in flight comes to its end afterwards.
        sidecar.write(|| content).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(sidecar.remove().is_err());
    }

    #[test]
    fn a_file_that_is_not_ours_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.nvme");
        for text in [
            "",
            "[]",
            r#"{"version":9}"#,
            r#"{"version":1,"lba_size":513}"#,
        ] {
            fs::write(&path, text).unwrap();
            let error = Sidecar::open(&path).unwrap_err().to_string();
            assert!(error.contains("a.nvme"), "{error}");
        }
    }
}
