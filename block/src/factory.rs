//! Opening disks: path and options in, the right disk out.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use crate::{
    AsyncDiskFile, Disk, Error, ErrorKind, FileId, Format, OpenOptions, Result,
    detect::{self, Probe, RawGuard, Recognised},
    formats::{
        luks::Luks,
        qcow2::{
            Qcow2, Qcow2Options,
            header::{Autoclear, Header, Incompatible},
            snapshot::SnapshotTable,
        },
        raw::{Raw, RawFile},
    },
    hooks::Hooks,
    image::Image,
    io::{Contexts, DiskCore, EngineKind, FileOptions, FileRole, Host, Io, OsHost, Pool},
    locking::lock_image,
    options::{Backing, CacheMode, Locking, SnapshotName},
    serve::{Policy, Served},
    sync::LocalFuture,
};

/// The longest backing chain that opens.
const MAX_CHAIN: usize = 200;

/// Opens the image at `path` with the default options: detected format, writable, io_uring.
///
/// # Errors
/// As [`OpenOptions::open`].
pub fn open_disk_file(path: impl AsRef<Path>) -> Result<Box<dyn AsyncDiskFile>> {
    OpenOptions::new().open(path)
}

impl OpenOptions {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// The error names the file, the field and the value: a missing file, a format that is not
    /// the one named, an invalid header, a feature that is not supported, a locked image, a file
    /// that the gate refuses.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Box<dyn AsyncDiskFile>> {
        Ok(Box::new(self.open_disk(path)?))
    }

    /// Opens the image at `path`, as the concrete type.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_disk(&self, path: impl AsRef<Path>) -> Result<Disk> {
        self.open_on(path, Arc::new(OsHost::new()))
    }

    /// Opens the image at `path` of a host: the operating system, or a simulation.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(&self, path: impl AsRef<Path>, host: Arc<dyn Host>) -> Result<Disk> {
        let path = path.as_ref();
        self.open_named(path, host)
            .map_err(|error| error.path(path))
    }

    fn check(&self) -> Result<()> {
        if self.force_share && !self.read_only {
            return Err(Error::invalid_argument(
                "force-share: expected together with read-only",
            ));
        }
        if self.engine == EngineKind::LinuxAio && !self.is_direct() {
            return Err(Error::invalid_argument(
                "engine linux-aio: expected together with direct I/O (cache mode none or directsync)",
            ));
        }
        Ok(())
    }

    fn open_named(&self, path: &Path, host: Arc<dyn Host>) -> Result<Disk> {
        self.check()?;
        let pool = Pool::global().map_err(|error| Error::from(error).operation("start pool"))?;
        let core = DiskCore::with_faults(
            path,
            host,
            pool,
            self.cache_mode == CacheMode::Unsafe,
            self.faults.clone(),
        );
        let contexts = Contexts::default();
        let file = core.host.open(path, self.file_options(!self.read_only))?;
        lock_image(
            &file,
            !self.read_only,
            self.effective_locking(),
            self.lock_wait,
        )?;
        let id = core.add_file(file, FileRole::Clusters);
        let opened = contexts.block_on(&core, async |io| {
            let opener = Opener { io, options: self };
            opener.open_top(id).await
        })?;
        let served = Served {
            image: opened.image,
            policy: Policy {
                read_only: self.read_only,
                discard: self.discard,
                detect_zeroes: self.detect_zeroes,
                write_through: self.is_write_through(),
                restartable: self.restartable,
            },
            guard: (opened.guessed_raw && !self.read_only).then(RawGuard::default),
            hooks: Hooks::default(),
            closed: AtomicBool::new(false),
        };
        Ok(Disk::new(core, served, contexts, self.engine))
    }

    fn effective_locking(&self) -> Locking {
        if self.force_share {
            Locking::Off
        } else {
            self.locking
        }
    }

    fn file_options(&self, write: bool) -> FileOptions {
        FileOptions {
            write,
            direct: self.is_direct(),
            ..FileOptions::default()
        }
    }
}

/// The image at the top of a chain, and whether its raw format was guessed.
struct OpenedTop {
    image: Arc<dyn Image>,
    guessed_raw: bool,
}

/// Opens the images of one disk.
struct Opener<'a> {
    io: &'a Io,
    options: &'a OpenOptions,
}

impl Opener<'_> {
    async fn open_top(&self, id: FileId) -> Result<OpenedTop> {
        let recognised = match self.options.format {
            Some(format) => Some(Recognised::Known(format)),
            None => self.probe(id).await?,
        };
        match recognised {
            None => {
                let image = self.open_raw(id, true)?;
                Ok(OpenedTop {
                    image,
                    guessed_raw: true,
                })
            }
            Some(Recognised::Known(format)) => Ok(OpenedTop {
                image: self.open_format(id, format, true).await?,
                guessed_raw: false,
            }),
            Some(Recognised::Foreign(name)) => Err(Error::unsupported(format!(
                "format: {name} images are not supported; name the format raw to use its bytes as they are"
            ))),
        }
    }

    /// Whether the image so many levels below the top is opened for writing.
    fn is_writable(&self, depth: usize) -> bool {
        let wanted = depth == 0 || self.options.writable_depth == Some(depth);
        wanted && !self.options.read_only
    }

    async fn probe(&self, id: FileId) -> Result<Option<Recognised>> {
        let mut probe = Probe::default();
        for range in detect::probed_ranges(self.io.file_len(id)?) {
            let bytes = self
                .io
                .read_padded(id, range.start.0, range.len as usize)
                .await?;
            probe.add(range, &bytes);
        }
        Ok(probe.recognise())
    }

    async fn open_format(&self, id: FileId, format: Format, top: bool) -> Result<Arc<dyn Image>> {
        match format {
            Format::Raw => self.open_raw(id, top),
            Format::Qcow2 => self.open_qcow2(id, top, Vec::new()).await,
            Format::Luks => self.open_luks(id, 0).await,
        }
    }

    /// Opens a qcow2 image and what is below it. `above` are the files of the images above, as
    /// many as this one is levels down: by them a chain that names itself is recognised.
    fn open_qcow2(
        &self,
        id: FileId,
        top: bool,
        mut above: Vec<Option<(u64, u64)>>,
    ) -> LocalFuture<'_, Result<Arc<dyn Image>>> {
        Box::pin(async move {
            let path = self.io.file_path(id);
            let named = |error: Error| error.path(&path);
            let writable = self.is_writable(above.len());
            // In boxes: what they need on the stack is not there while the images below are opened.
            let header: LocalFuture<'_, Result<Header>> =
                Box::pin(self.read_header(id, top, writable));
            let header = header.await.map_err(named)?;
            let depth = above.len();
            above.push(self.io.with_file(id, |view| view.entry.file.identity())?);
            let data_file = self.open_data_file(&header, &path, (top, writable), &above)?;
            let backing = self.open_backing(&header, &path, top, above).await?;
            let options = Qcow2Options {
                writable,
                metadata_cache_size: self.options.metadata_cache_size,
                data_file,
                discard_no_unref: top && self.options.discard_no_unref,
                lazy_refcounts: self.options.lazy_refcounts,
                pass_discards: self.options.pass_discards,
                overlap_checks: self.options.overlap_checks,
                unlock: self.options.unlock(depth),
            };
            let image: LocalFuture<'_, Result<Arc<dyn Image>>> = Box::pin(async move {
                let image = Qcow2::open(self.io, id, header, backing, options).await?;
                Ok(Arc::new(image) as Arc<dyn Image>)
            });
            image.await.map_err(named)
        })
    }

    /// The header of an image, or what it was at the snapshot that is to be shown.
    async fn read_header(&self, id: FileId, top: bool, writable: bool) -> Result<Header> {
        let mut header = Header::read(self.io, id).await?;
        header.check_supported(writable)?;
        if let Some(name) = self.options.snapshot.as_ref().filter(|_| top) {
            self.show_snapshot(id, &mut header, name).await?;
        }
        Ok(header)
    }

    /// Turns the header into that of the disk at a snapshot.
    async fn show_snapshot(
        &self,
        id: FileId,
        header: &mut Header,
        name: &SnapshotName,
    ) -> Result<()> {
        if !self.options.read_only {
            return Err(Error::invalid_argument(
                "snapshot: can be shown only when the disk is opened for reading",
            ));
        }
        let table = SnapshotTable::read(self.io, id, header).await?;
        let (found, wanted) = match name {
            SnapshotName::Either(text) => (table.find(text), format!("id or name {text:?}")),
            SnapshotName::Exactly { id, name } => (
                table.find_by(id.as_deref(), name.as_deref()),
                format!("id {id:?} and name {name:?}"),
            ),
        };
        let Some(snapshot) = found.and_then(|at| table.snapshots.get(at)) else {
            return Err(Error::with_message(
                ErrorKind::NotFound,
                format!("snapshot: there is none with the {wanted}"),
            ));
        };
        header.size = snapshot.disk_size().unwrap_or(header.size);
        header.l1_size = snapshot.l1_size;
        header.l1_table_offset = snapshot.l1_table_offset;
        // Bitmaps are about the disk as it is now.
        header.autoclear_features.remove(Autoclear::BITMAPS);
        header.check_l1()
    }

    /// Opens the file that an image keeps its guest's data in, where it has one, for what the image
    /// itself is opened for.
    fn open_data_file(
        &self,
        header: &Header,
        path: &Path,
        (top, writable): (bool, bool),
        above: &[Option<(u64, u64)>],
    ) -> Result<Option<FileId>> {
        let named = |error: Error| {
            Error::with_message(error.kind(), format!("data file: {error}"))
                .path(path)
                .source(error)
        };
        let given = self.options.data_file.as_deref().filter(|_| top);
        if !header.has(Incompatible::DATA_FILE) {
            return match given {
                None => Ok(None),
                Some(_) => Err(Error::invalid_argument(
                    "'data-file' can only be set for images with an external data file",
                )
                .path(path)),
            };
        }
        let host = &*self.io.core.host;
        let options = self.options.file_options(writable);
        let file = match (given, header.data_file_name()) {
            (Some(given), _) => host.open(given, options),
            (None, Some(name)) => self.options.gate.open(host, path, &name, options),
            (None, None) => {
                return Err(
                    Error::invalid_argument("'data-file' is required for this image").path(path),
                );
            }
        }
        .map_err(named)?;
        if file.identity().is_some() && above.contains(&file.identity()) {
            return Err(Error::invalid_image(format!(
                "data file: {} is an image of this chain",
                file.path().display()
            ))
            .path(path));
        }
        let locking = self.options.effective_locking();
        lock_image(&file, writable, locking, self.options.lock_wait)?;
        let raw = header.autoclear_features.contains(Autoclear::DATA_FILE_RAW);
        let role = if raw {
            if writable && file.len()? < header.size && !file.is_block_device() {
                file.set_len(header.size)?;
            }
            FileRole::RawClusters
        } else {
            FileRole::Clusters
        };
        let id = self.io.core.add_file(file, role);
        if top {
            // There is one image on top, and it has one data file.
            let _ = self.io.core.faults.data_file_id.set(id);
        }
        Ok(Some(id))
    }

    async fn open_backing(
        &self,
        header: &Header,
        path: &Path,
        top: bool,
        above: Vec<Option<(u64, u64)>>,
    ) -> Result<Option<Arc<dyn Image>>> {
        let host = &*self.io.core.host;
        let writable = self.is_writable(above.len());
        let options = self.options.file_options(writable);
        let (file, recorded) = match &self.options.backing {
            Backing::None if top => return Ok(None),
            Backing::Override(backing, format) if top => (host.open(backing, options)?, *format),
            _ => {
                let Some(name) = header.backing_file_name() else {
                    return Ok(None);
                };
                let format = match header.backing_format() {
                    _ if top && self.options.backing_format.is_some() => {
                        self.options.backing_format
                    }
                    Some(name) => Some(named_format(&name).map_err(|error| error.path(path))?),
                    None => None,
                };
                let file = self
                    .options
                    .gate
                    .open(host, path, &name, options)
                    .map_err(|error| {
                        Error::with_message(error.kind(), format!("backing file: {error}"))
                            .path(path)
                            .source(error)
                    })?;
                (file, format)
            }
        };
        if above.len() >= MAX_CHAIN {
            return Err(Error::invalid_image(format!(
                "backing chain: more than {MAX_CHAIN} images"
            ))
            .path(path));
        }
        if file
            .identity()
            .is_some_and(|file| above.contains(&Some(file)))
        {
            return Err(Error::invalid_image(format!(
                "backing file: {} is already in the chain above",
                file.path().display()
            ))
            .path(path));
        }
        let locking = self.options.effective_locking();
        lock_image(&file, writable, locking, self.options.lock_wait)?;
        let id = self.io.core.add_file(file, FileRole::Clusters);
        let format = match recorded {
            Some(format) => format,
            // An unrecorded format could be anything that a guest wrote: raw, unless allowed.
            None if self.options.allow_probed_backing => match Box::pin(self.probe(id)).await? {
                None => Format::Raw,
                Some(Recognised::Known(format)) => format,
                Some(Recognised::Foreign(name)) => {
                    return Err(Error::unsupported(format!(
                        "backing file: {name} images are not supported"
                    ))
                    .path(path));
                }
            },
            None => Format::Raw,
        };
        Ok(Some(match format {
            Format::Raw => self.open_raw(id, false)?,
            Format::Qcow2 => self.open_qcow2(id, false, above).await?,
            Format::Luks => self.open_luks(id, above.len()).await?,
        }))
    }

    /// Opens a LUKS volume, `depth` levels down.
    fn open_luks(&self, id: FileId, depth: usize) -> LocalFuture<'_, Result<Arc<dyn Image>>> {
        Box::pin(async move {
            let writable = self.is_writable(depth);
            let image = Luks::open(self.io, id, writable, &self.options.unlock(depth))
                .await
                .map_err(|error| error.path(&self.io.file_path(id)))?;
            Ok(Arc::new(image) as Arc<dyn Image>)
        })
    }

    fn open_raw(&self, id: FileId, top: bool) -> Result<Arc<dyn Image>> {
        let file = self.io.with_file(id, |view| {
            let file = &view.entry.file;
            if top {
                view.entry.set_role(FileRole::RawData);
            }
            Ok::<_, Error>(RawFile {
                file: id,
                len: file.len()?,
                writable: file.is_writable(),
                block_device: file.is_block_device(),
                unit: file.alignment().offset,
                block_sizes: file.block_sizes(),
            })
        })??;
        Ok(Arc::new(Raw::new(file)))
    }
}

/// The format that a header names.
fn named_format(name: &str) -> Result<Format> {
    Format::from_name(name).ok_or_else(|| {
        Error::unsupported(format!(
            "backing file format: {name:?}, expected one of {}",
            Format::ALL.map(Format::name).join(", ")
        ))
    })
}
