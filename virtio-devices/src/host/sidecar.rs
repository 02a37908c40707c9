//! What a device has to remember beside its image: one file, always whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    marker::PhantomData,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// A file larger than this is not ours.
const MAX_BYTES: u64 = 16 << 20;

/// What is in a sidecar file. It is untrusted when it is read. The default is a file that is not there yet.
pub(crate) trait Content: Clone + Default + Serialize + DeserializeOwned {
    /// Who may read and write the file, as far as the umask lets them.
    const MODE: u32 = 0o666;

    /// Whether it can have been written by this program; an error names field and value.
    fn check(&self) -> std::result::Result<(), String>;
}

/// A sidecar file.
#[derive(Debug)]
pub(crate) struct Sidecar<C> {
    path: PathBuf,
    /// Held while the file is replaced; set once it was removed.
    removed: Mutex<bool>,
    content: PhantomData<fn() -> C>,
}

impl<C: Content> Sidecar<C> {
    /// Reads the file, if there is one, and makes sure that it can be written.
    pub(crate) fn open(path: &Path) -> Result<(Self, C)> {
        let sidecar = Self {
            path: path.to_owned(),
            removed: Mutex::default(),
            content: PhantomData,
        };
        let content = match fs::metadata(path) {
            Ok(meta) if meta.len() > MAX_BYTES => {
                return Err(sidecar.failed(format!("{} bytes, too large", meta.len())));
            }
            Ok(_) => sidecar.read()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => C::default(),
            Err(error) => return Err(sidecar.failed(error)),
        };
        sidecar.write(|| content.clone())?;
        Ok((sidecar, content))
    }

    /// What the file says now.
    pub(crate) fn read(&self) -> Result<C> {
        let bytes = fs::read(&self.path).map_err(|error| self.failed(error))?;
        let content: C = serde_json::from_slice(&bytes).map_err(|error| self.failed(error))?;
        content.check().map_err(|reason| self.failed(reason))?;
        Ok(content)
    }

    /// Replaces the file by what there is to remember now: whatever happens, it holds the old content or
    /// the new. A file that was removed stays away.
    pub(crate) fn write(&self, content: impl FnOnce() -> C) -> Result<()> {
        let removed = self.removed();
        if *removed {
            return Ok(());
        }
        self.replace(&content()).map_err(|error| self.failed(error))
    }

    fn removed(&self) -> MutexGuard<'_, bool> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, content: &C) -> io::Result<()> {
        let bytes = serde_json::to_vec(content)?;
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let fresh = self.path.with_file_name(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(C::MODE)
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
    pub(crate) fn remove(&self) -> Result<()> {
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
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Words(Vec<String>);

    impl Content for Words {
        const MODE: u32 = 0o600;

        fn check(&self) -> std::result::Result<(), String> {
            match self.0.iter().find(|word| word.is_empty()) {
                Some(_) => Err("an empty word".to_owned()),
                None => Ok(()),
            }
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.words");
        let (sidecar, mut content) = Sidecar::<Words>::open(&path).unwrap();
        content.0.push("one".to_owned());
        sidecar.write(|| content.clone()).unwrap();
        assert_eq!(Sidecar::<Words>::open(&path).unwrap().1, content);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_removed_stays_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.words");
        let (sidecar, content) = Sidecar::<Words>::open(&path).unwrap();
        sidecar.remove().unwrap();
        // What was in flight comes to its end afterwards.
        sidecar.write(|| content).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(sidecar.remove().is_err());
    }

    #[test]
    fn a_file_that_is_not_ours_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.words");
        for text in ["", "{}", r#"["one",""]"#] {
            fs::write(&path, text).unwrap();
            let error = Sidecar::<Words>::open(&path).unwrap_err().to_string();
            assert!(error.contains("a.words"), "{error}");
        }
    }

    #[test]
    fn who_may_read_it_is_said_by_its_content() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.words");
        Sidecar::<Words>::open(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}
