//! Host files: what an engine reads and writes.

use std::{
    any::Any,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    Engine, EngineKind,
    file_options::{FileOptions, IoAlignment},
    fsinfo::{self, LockError},
    sys,
};
use crate::{Error, ErrorKind, Result};

/// A file that exists only in a simulation.
pub trait SimulatedFile: Any + Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes its length.
    ///
    /// # Errors
    /// When the simulation injects one.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The `errno` with which the simulated file system refuses locks; `None` where it has them.
    fn lock_errno(&self) -> Option<i32> {
        None
    }

    /// Itself, for the simulated engine.
    fn as_any(&self) -> &dyn Any;
}

/// Where the bytes of a [`HostFile`] are.
pub enum Backend {
    /// A file or block device of the operating system.
    Os(File),
    /// A file of a simulation.
    Simulated(Arc<dyn SimulatedFile>),
}

/// An opened host file or block device.
pub struct HostFile {
    path: PathBuf,
    backend: Backend,
    writable: bool,
    direct: bool,
    block_device: bool,
    alignment: IoAlignment,
    locked: AtomicBool,
    writers: Mutex<()>,
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Closing is not enough: a process forked meanwhile holds the same description until it
        // executes another program.
        self.unlock();
    }
}

impl std::fmt::Debug for HostFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFile")
            .field("path", &self.path)
            .field("writable", &self.writable)
            .field("direct", &self.direct)
            .finish_non_exhaustive()
    }
}

impl HostFile {
    /// Opens a file of the operating system.
    ///
    /// # Errors
    /// The host's error, naming the path; anything but a regular file or block device is refused.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self> {
        let fail = |error: io::Error| Error::from(error).operation("open").path(path);
        let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
        if options.direct {
            flags |= libc::O_DIRECT;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(options.write)
            .create(options.create && options.write)
            .truncate(options.truncate && options.create && options.write)
            .custom_flags(flags)
            .open(path)
            .map_err(fail)?;
        Self::from_file(file, path, options)
    }

    /// Opens the file `name`, relative to `folder`, if it lies inside it: neither `..` nor a link
    /// leads out of it.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] when it lies outside; the host's error otherwise.
    pub fn open_beneath(folder: &Path, name: &Path, options: FileOptions) -> Result<Self> {
        let path = folder.join(name);
        let file = fsinfo::open_beneath(folder, name, options).map_err(|error| {
            let outside = matches!(error.raw_os_error(), Some(libc::EXDEV | libc::ELOOP));
            if outside {
                Error::with_message(ErrorKind::Denied, "lies outside the folder").path(&path)
            } else {
                Error::from(error).operation("open").path(&path)
            }
        })?;
        Self::from_file(file, &path, options)
    }

    /// Takes over an open file; `options` says how it was opened. Its description no longer has
    /// `O_NONBLOCK`, and has `O_NOATIME` where that is allowed.
    ///
    /// # Errors
    /// The host's error; anything but a regular file or block device is refused.
    pub fn from_file(file: File, path: &Path, options: FileOptions) -> Result<Self> {
        let metadata = file
            .metadata()
            .map_err(|error| Error::from(error).operation("stat").path(path))?;
        let kind = metadata.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            return Err(Error::with_message(
                ErrorKind::InvalidArgument,
                "neither a regular file nor a block device",
            )
            .path(path));
        }
        sys::settle_flags(file.as_raw_fd())
            .map_err(|error| Error::from(error).operation("set flags").path(path))?;
        let alignment = if options.direct {
            fsinfo::direct_io_alignment(&file, &metadata)
        } else {
            IoAlignment::NONE
        };
        Ok(Self {
            path: path.to_owned(),
            backend: Backend::Os(file),
            writable: options.write,
            direct: options.direct,
            block_device,
            alignment,
            locked: AtomicBool::new(false),
            writers: Mutex::default(),
        })
    }

    /// A file of a simulation.
    #[must_use]
    pub fn simulated(
        path: &Path,
        file: Arc<dyn SimulatedFile>,
        writable: bool,
        alignment: IoAlignment,
    ) -> Self {
        Self {
            path: path.to_owned(),
            backend: Backend::Simulated(file),
            writable,
            direct: !alignment.is_none(),
            block_device: false,
            alignment,
            locked: AtomicBool::new(false),
            writers: Mutex::default(),
        }
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its bytes are.
    #[must_use]
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The descriptor; `None` for a simulated file.
    #[must_use]
    pub fn raw_fd(&self) -> Option<RawFd> {
        match &self.backend {
            Backend::Os(file) => Some(file.as_raw_fd()),
            Backend::Simulated(_) => None,
        }
    }

    /// Whose turn it is, of the threads that write through the page cache.
    pub(super) fn writers(&self) -> &Mutex<()> {
        &self.writers
    }

    /// Whether it was opened for writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it bypasses the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Logical and physical block size of a block device, in bytes.
    #[must_use]
    pub fn block_sizes(&self) -> Option<(u32, u32)> {
        match &self.backend {
            Backend::Os(file) if self.block_device => fsinfo::block_sizes(file),
            _ => None,
        }
    }

    /// What direct I/O demands.
    #[must_use]
    pub fn alignment(&self) -> IoAlignment {
        self.alignment
    }

    /// What tells whether two paths lead to the same file; `None` for a simulated file.
    #[must_use]
    pub fn identity(&self) -> Option<(u64, u64)> {
        match &self.backend {
            Backend::Os(file) => file
                .metadata()
                .ok()
                .map(|metadata| (metadata.dev(), metadata.ino())),
            Backend::Simulated(_) => None,
        }
    }

    /// The length in bytes now.
    ///
    /// # Errors
    /// The host's error.
    pub fn len(&self) -> Result<u64> {
        match &self.backend {
            Backend::Os(file) => fsinfo::file_len(file, self.block_device)
                .map_err(|error| Error::from(error).operation("get length").path(&self.path)),
            Backend::Simulated(file) => Ok(file.len()),
        }
    }

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// The host's error.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Changes the length. Blocks: for control-plane use, not for a queue.
    ///
    /// # Errors
    /// The host's error.
    pub fn set_len(&self, len: u64) -> Result<()> {
        let result = match &self.backend {
            Backend::Os(file) => file.set_len(len),
            Backend::Simulated(file) => file.set_len(len),
        };
        result.map_err(|error| Error::from(error).operation("set length").path(&self.path))
    }

    /// Host bytes in use.
    ///
    /// # Errors
    /// The host's error.
    pub fn allocated(&self) -> Result<u64> {
        match &self.backend {
            Backend::Os(_) if self.block_device => Ok(0),
            Backend::Os(file) => file
                .metadata()
                .map(|metadata| metadata.blocks().saturating_mul(512))
                .map_err(|error| Error::from(error).operation("stat").path(&self.path)),
            Backend::Simulated(file) => Ok(file.len()),
        }
    }

    /// The next run of data at or after `offset`: start and end. `None` when only a hole follows.
    /// Where the host cannot tell, everything is data.
    ///
    /// # Errors
    /// The host's error.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        match &self.backend {
            Backend::Os(file) if !self.block_device => fsinfo::next_data(file, offset)
                .map_err(|error| Error::from(error).operation("seek").path(&self.path)),
            _ => {
                let len = self.len()?;
                Ok((offset < len).then_some((offset, len)))
            }
        }
    }

    /// Takes QEMU-compatible open file description locks: bytes 100+n for permissions held and
    /// 200+n for permissions not shared.
    ///
    /// # Errors
    /// [`LockError::NotShared`] and [`LockError::InUse`] when another process is in the way.
    pub fn lock(&self, held: u64, not_shared: u64) -> Result<(), LockError> {
        match &self.backend {
            Backend::Os(file) => {
                fsinfo::lock_permissions(file, held, not_shared)?;
                self.locked.store(true, Ordering::Release);
                Ok(())
            }
            Backend::Simulated(file) => match file.lock_errno() {
                None => Ok(()),
                Some(errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    Err(fsinfo::lock_error(error, "consistent read"))
                }
            },
        }
    }

    /// Gives the locks of [`lock`](Self::lock) back.
    pub fn unlock(&self) {
        if let Backend::Os(file) = &self.backend
            && self.locked.swap(false, Ordering::AcqRel)
        {
            fsinfo::unlock_permissions(file);
        }
    }
}

/// Where files come from and which engines drive them: the operating system, or a simulation.
pub trait Host: Send + Sync {
    /// Opens a file.
    ///
    /// # Errors
    /// The host's error, naming the path.
    fn open(&self, path: &Path, options: FileOptions) -> Result<HostFile>;

    /// Opens the file `name`, which may not lie outside `folder`, whatever links say.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] when it lies outside; the host's error otherwise.
    fn open_beneath(&self, folder: &Path, name: &Path, options: FileOptions) -> Result<HostFile>;

    /// The path from the root, with the links of its folder followed; `None` when it has no such
    /// folder.
    fn absolute(&self, path: &Path) -> Option<PathBuf>;

    /// An engine for the calling thread that can hold `depth` operations.
    ///
    /// # Errors
    /// When the host has no such engine; the message says why.
    fn engine(&self, kind: EngineKind, depth: u32) -> Result<Box<dyn Engine>>;

    /// Whether this is the operating system, so that engines may be shared by every disk of a
    /// thread.
    fn is_os(&self) -> bool;
}
