//! Work on a file that is not opened as a disk: creating, checking and repairing images.

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    Error, FileId, Result,
    io::{DiskCore, Driver, EngineKind, FileOptions, FileRole, Host, Io, OsHost, Pool},
    locking::lock_image,
    options::Locking,
};

/// How to open a file for such work.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfflineOptions {
    /// How the file itself is opened.
    pub file: FileOptions,
    /// The engine that does the work.
    pub engine: EngineKind,
    /// Whether the image is locked against other processes meanwhile.
    pub locking: Locking,
}

impl OfflineOptions {
    /// For reading, on the calling thread alone, locked.
    #[must_use]
    pub fn read() -> Self {
        Self {
            engine: EngineKind::Sync,
            ..Self::default()
        }
    }

    /// For writing, on the calling thread alone, locked.
    #[must_use]
    pub fn write() -> Self {
        let mut options = Self::read();
        options.file.write = true;
        options
    }

    /// For making a new file, or an existing one empty.
    #[must_use]
    pub fn create() -> Self {
        let mut options = Self::write();
        options.file.create = true;
        options.file.truncate = true;
        options
    }
}

/// Opens the file at `path` of the operating system, alone and without following what it names, and
/// runs `work` on it to its end. A file that is made empty is locked before it is cut.
///
/// # Errors
/// The host's, and those of `work`; they name the path.
pub fn with_file<T>(
    path: &Path,
    options: OfflineOptions,
    work: impl AsyncFnOnce(&Io, FileId) -> Result<T>,
) -> Result<T> {
    with_file_on(Arc::new(OsHost::new()), path, options, work)
}

/// [`with_file`] for a file of any host.
///
/// # Errors
/// As [`with_file`].
pub fn with_file_on<T>(
    host: Arc<dyn Host>,
    path: &Path,
    options: OfflineOptions,
    work: impl AsyncFnOnce(&Io, FileId) -> Result<T>,
) -> Result<T> {
    let pool = Pool::global().map_err(|error| Error::from(error).operation("start pool"))?;
    let core = DiskCore::new(path, host, pool, false);
    let file = open_in(&core, path, options)?;
    let driver = Driver::new(core.host.engine(options.engine, 64)?)?;
    let io = Io::new(&driver, &core)?;
    let result = driver.block_on(work(&io, file));
    // Closing is not enough: a process that another thread is just starting still has the file.
    for index in 0..core.file_count() {
        core.file(FileId(index))?.file.unlock();
    }
    result?.map_err(|error| error.path(path))
}

/// Opens one more file for the work that [`with_file`] runs: a data file, for instance.
///
/// # Errors
/// The host's; [`Locked`](crate::ErrorKind::Locked).
pub fn open_beside(io: &Io, path: &Path, options: OfflineOptions) -> Result<FileId> {
    open_in(&io.core, path, options).map_err(|error| error.path(path))
}

/// Opens a file and locks it before it is cut, if it is to be made empty.
fn open_in(core: &DiskCore, path: &Path, options: OfflineOptions) -> Result<FileId> {
    let truncate = options.file.truncate;
    let file = core.host.open(
        path,
        FileOptions {
            truncate: false,
            ..options.file
        },
    )?;
    lock_image(&file, options.file.write, options.locking, Duration::ZERO)?;
    if truncate && !file.is_block_device() {
        file.set_len(0)?;
    }
    Ok(core.add_file(file, FileRole::Clusters))
}
