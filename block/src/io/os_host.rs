//! The operating system as a host: its files and its engines.

use std::path::Path;

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
