//! The pool: a folder of images that namespace management makes, and finds again at the next start.

use std::{
    error::Error as Fault,
    path::{Path, PathBuf},
    sync::Arc,
};

use block::AsyncDiskFile;

use crate::{Error, Result};

/// An opened image, or why there is none.
pub type Opened = std::result::Result<Box<dyn AsyncDiskFile>, Box<dyn Fault + Send + Sync>>;

/// Makes and opens an image of that many bytes at that path.
pub type CreateImage = Arc<dyn Fn(&Path, u64) -> Opened + Send + Sync>;

/// Opens an image that was made before.
pub type OpenImage = Arc<dyn Fn(&Path) -> Opened + Send + Sync>;

/// Where namespace management makes its images. Each has a sidecar beside it, with the extension
/// `nvme`; an image without one was never finished, or is being deleted, and is left alone.
#[derive(Clone)]
pub struct PoolConfig {
    /// The folder.
    pub folder: PathBuf,
    /// Bytes that the namespaces in it may have in all.
    pub capacity: u64,
    /// Makes an image.
    pub create: CreateImage,
    /// Opens one that is there.
    pub open: OpenImage,
}

impl std::fmt::Debug for PoolConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolConfig")
            .field("folder", &self.folder)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl PoolConfig {
    /// The image of a namespace.
    pub(super) fn image(&self, nsid: u32) -> PathBuf {
        self.folder.join(format!("namespace-{nsid}.raw"))
    }

    /// Its sidecar.
    pub(super) fn sidecar(&self, nsid: u32) -> PathBuf {
        self.image(nsid).with_extension("nvme")
    }

    /// Whether nothing in the folder has to do with an identifier.
    pub(super) fn is_free(&self, nsid: u32) -> bool {
        // What cannot be looked at is not free.
        let missing = |path: PathBuf| path.try_exists().is_ok_and(|exists| !exists);
        missing(self.image(nsid)) && missing(self.sidecar(nsid))
    }

    /// Opens the image of a namespace of an earlier run; `None` when there is none.
    ///
    /// # Errors
    /// [`Error::Config`] when it cannot be opened.
    pub(super) fn reopen(&self, nsid: u32) -> Result<Option<Box<dyn AsyncDiskFile>>> {
        let path = self.image(nsid);
        let failed = |error: &dyn std::fmt::Display| {
            Error::Config(format!("pool: {}: {error}", path.display()))
        };
        let exists = |path: PathBuf| path.try_exists().map_err(|error| failed(&error));
        match (exists(path.clone())?, exists(self.sidecar(nsid))?) {
            (true, true) => Ok(Some((self.open)(&path).map_err(|error| failed(&error))?)),
            (false, false) => Ok(None),
            (image, _) => {
                let missing = if image { "sidecar" } else { "image" };
                tracing::warn!(path = %path.display(), missing, "the pool has half a namespace");
                Ok(None)
            }
        }
    }
}
