//! Work on a file that is not opened as a disk: creating, checking and repairing images.

use std::{path::Path, sync::Arc};

use crate::{
    Error, FileId, Result,
    io::{DiskCore, Driver, EngineKind, FileOptions, FileRole, Host, Io, OsHost, Pool},
};

/// Opens the file at `path` of the operating system, alone and without following what it names, and
/// runs `work` on it to its end.
///
/// # Errors
/// The host's, and those of `work`; they name the path.
pub fn with_file<T>(
    path: &Path,
    options: FileOptions,
    engine: EngineKind,
    work: impl AsyncFnOnce(&Io, FileId) -> Result<T>,
) -> Result<T> {
    with_file_on(Arc::new(OsHost::new()), path, options, engine, work)
}

/// [`with_file`] for a file of any host.
///
/// # Errors
/// As [`with_file`].
pub fn with_file_on<T>(
    host: Arc<dyn Host>,
    path: &Path,
    options: FileOptions,
    engine: EngineKind,
    work: impl AsyncFnOnce(&Io, FileId) -> Result<T>,
) -> Result<T> {
    let pool = Pool::global().map_err(|error| Error::from(error).operation("start pool"))?;
    let core = DiskCore::new(path, host, pool);
    let file = core.add_file(core.host.open(path, options)?, FileRole::Clusters);
    let driver = Driver::new(core.host.engine(engine, 64)?)?;
    let io = Io::new(&driver, &core)?;
    driver
        .block_on(work(&io, file))?
        .map_err(|error| error.path(path))
}
