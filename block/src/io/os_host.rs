//! The operating system as a host: its files and its engines.

use std::path::{Path, PathBuf};

use super::{
    AioEngine, Engine, EngineKind, FileOptions, Host, HostFile, SyncEngine, UringEngine,
    UringOptions,
};
use crate::Result;

/// The operating system: files by path, engines by kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsHost {
    /// How its io_uring engines work.
    pub uring: UringOptions,
}

impl OsHost {
    /// The operating system with default engine options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl Host for OsHost {
    fn open(&self, path: &Path, options: FileOptions) -> Result<HostFile> {
        HostFile::open(path, options)
    }

    fn open_beneath(&self, folder: &Path, name: &Path, options: FileOptions) -> Result<HostFile> {
        HostFile::open_beneath(folder, name, options)
    }

    fn absolute(&self, path: &Path) -> Option<PathBuf> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = folder.canonicalize().ok()?;
        Some(match path.file_name() {
            Some(name) => folder.join(name),
            None => path.canonicalize().ok()?,
        })
    }

    fn engine(&self, kind: EngineKind, depth: u32) -> Result<Box<dyn Engine>> {
        match kind {
            EngineKind::Sync => Ok(Box::new(SyncEngine::new()?)),
            EngineKind::IoUring => Ok(Box::new(UringEngine::new(depth, self.uring)?)),
            EngineKind::LinuxAio => Ok(Box::new(AioEngine::new(depth)?)),
        }
    }

    fn is_os(&self) -> bool {
        true
    }
}
