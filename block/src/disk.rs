//! The disk that every format shares: a control plane, synchronous calls and queues over an image.

mod typed;

use std::{
    any::Any,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    AsyncDiskFile, Capabilities, DiskFile, DiskTopology, Error, ErrorKind, FileId, Format,
    GuestRange, Result,
    crypto::KeyChange,
    extras::DiskExtras,
    hooks::{Hook, Mutation},
    image::{BlockStatus, ImageInfo},
    io::{
        AsyncIo, Contexts, DiskCore, Drained, EngineKind, Io, RequestOp, borrowed, borrowed_mut,
        thread_driver,
    },
    options::DiscardPolicy,
    queue::Queue,
    serve::{self, Served},
    sync::lock,
};

pub use typed::{
    AsyncDisk, Asynchronous, DiskFormat, Drive, LuksAsync, LuksFormat, LuksSync, Qcow2Async,
    Qcow2Format, Qcow2Sync, RawAsync, RawFormat, RawSync, SyncDisk, Synchronous, TypedDisk,
};

type ResizeListener = Box<dyn Fn(u64) + Send + Sync>;

pub(crate) struct Shared {
    pub(crate) core: Arc<DiskCore>,
    pub(crate) served: Arc<Served>,
    pub(crate) contexts: Contexts,
    pub(crate) engine: EngineKind,
    listeners: Mutex<Vec<ResizeListener>>,
    closing: AtomicBool,
    /// Held by who changes the disk while it is drained: drains nest, such sections do not.
    section: Mutex<()>,
}

/// An opened disk of any format. Clones share everything; the last one to go closes the image.
#[derive(Clone)]
pub struct Disk {
    pub(crate) shared: Arc<Shared>,
}

/// No request is in flight on the disk, and new ones wait, until this is dropped.
#[derive(Debug)]
#[must_use = "the disk goes on as soon as this is dropped"]
pub struct DrainGuard {
    _drained: Drained,
}

impl Disk {
    pub(crate) fn new(
        core: Arc<DiskCore>,
        served: Served,
        contexts: Contexts,
        engine: EngineKind,
    ) -> Self {
        if let Some(extras) = served.image.extras()
            && !extras.bitmaps().is_empty()
        {
            served.hooks.attach_once(extras.recorder());
        }
        Self {
            shared: Arc::new(Shared {
                core,
                served: Arc::new(served),
                contexts,
                engine,
                listeners: Mutex::default(),
                closing: AtomicBool::new(false),
                section: Mutex::default(),
            }),
        }
    }

    /// The engine that drives its queues.
    #[must_use]
    pub fn engine(&self) -> EngineKind {
        self.shared.engine
    }

    /// The path of one of its files, as [`BlockStatus::file`] names them.
    #[must_use]
    pub fn file_path(&self, file: FileId) -> Option<std::path::PathBuf> {
        let entry = self.shared.core.file(file).ok()?;
        Some(entry.path().to_owned())
    }

    /// Waits until no request is in flight and keeps new ones waiting while the guard exists.
    ///
    /// # Errors
    /// [`ErrorKind::WouldDeadlock`] on a thread that has requests in flight itself.
    pub fn drain(&self) -> Result<DrainGuard> {
        let pins = Arc::clone(&self.shared.core.pins);
        let drained = self
            .shared
            .contexts
            .block_on(&self.shared.core, async move |_| Ok(pins.drain().await))?;
        Ok(DrainGuard { _drained: drained })
    }

    /// Attaches a hook that sees every later change.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn attach_hook(&self, hook: Arc<dyn Hook>) -> Result<()> {
        let _drained = self.drain()?;
        self.shared.served.hooks.attach(hook);
        Ok(())
    }

    /// Detaches a hook.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn detach_hook(&self, hook: &Arc<dyn Hook>) -> Result<()> {
        let _drained = self.drain()?;
        self.shared.served.hooks.detach(hook);
        Ok(())
    }

    /// The image at the top.
    pub(crate) fn image(&self) -> &Arc<dyn crate::image::Image> {
        &self.shared.served.image
    }

    /// What tells whether two disks have the same file.
    pub(crate) fn identity(&self, file: FileId) -> Option<(u64, u64)> {
        self.shared.core.file(file).ok()?.file.identity()
    }

    /// Serves one request on the calling thread.
    fn serve(&self, op: &RequestOp) -> Result<()> {
        let served = &*self.shared.served;
        self.with_pin(async |io| {
            // Under the pin: the size does not change any more, nor is the disk closed.
            serve::check(served, op)
                .map_err(|kind| describe(kind, op.summary(), served.image.size()))?;
            let mutation = serve::mutation(op);
            served.hooks.begin(mutation);
            let result = serve::serve(served, io, op).await;
            let outcome = result.as_ref().map_err(Error::kind);
            served.hooks.end(mutation, outcome.copied());
            result
        })
        .map_err(|error| error.path(&self.shared.core.path))
    }

    /// Runs a part of the image's work under a pin, so that nothing it looks up is used again
    /// meanwhile.
    pub(crate) fn with_pin<T>(&self, work: impl AsyncFnOnce(&Io) -> Result<T>) -> Result<T> {
        let core = &self.shared.core;
        self.shared.contexts.block_on(core, async move |io| {
            let pin = loop {
                match io.pins.pin(&core.pins) {
                    Some(pin) => break pin,
                    None => core.pins.opened().await,
                }
            };
            let result = work(io).await;
            io.pins.unpin(&core.pins, pin);
            result
        })
    }

    /// Runs a section while no request is in flight.
    pub(crate) fn with_drained<T>(&self, work: impl AsyncFnOnce(&Io) -> Result<T>) -> Result<T> {
        self.shared.with_drained(work)
    }
}

/// The full error for a request of which only the kind of its failure is known.
pub(crate) fn describe(
    kind: ErrorKind,
    (name, offset, len): (&'static str, u64, u64),
    size: u64,
) -> Error {
    let error = match kind {
        ErrorKind::OutOfRange => Error::with_message(
            kind,
            format!("{len} bytes at {offset} reach beyond the end of the disk, {size} bytes"),
        ),
        kind => Error::new(kind),
    };
    let error = error.operation(name);
    if len == 0 {
        error
    } else {
        error.offset(offset)
    }
}

impl Shared {
    fn with_drained<T>(&self, work: impl AsyncFnOnce(&Io) -> Result<T>) -> Result<T> {
        let core = &self.core;
        // Not behind the lock: another section may wait for this thread's requests.
        self.contexts.check_thread(core)?;
        let _section = lock(&self.section);
        self.contexts.block_on(core, async move |io| {
            let _drained = core.pins.drain().await;
            work(io).await
        })
    }

    /// Tells everybody who wants to know.
    pub(crate) fn resized(&self, size: u64) {
        for listener in &*lock(&self.listeners) {
            listener(size);
        }
    }

    fn close(&self) -> Result<()> {
        if self.closing.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let image = &self.served.image;
        let writable = image.capabilities().writable;
        let core = &self.core;
        let result = self.with_drained(async move |io| {
            self.served.closed.store(true, Ordering::Release);
            if writable {
                image.close(io).await
            } else {
                Ok(())
            }
        });
        self.contexts.clear();
        for index in 0..core.file_count() {
            if let Ok(entry) = core.file(FileId(index)) {
                entry.file.unlock();
            }
        }
        result.map_err(|error| error.path(&core.path))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "closing the image failed");
        }
    }
}

impl DiskFile for Disk {
    fn path(&self) -> &Path {
        &self.shared.core.path
    }

    fn format(&self) -> Format {
        self.shared.served.image.format()
    }

    fn size(&self) -> u64 {
        self.shared.served.image.size()
    }

    fn physical_size(&self) -> Result<u64> {
        self.shared.core.file(FileId(0))?.file.allocated()
    }

    fn topology(&self) -> DiskTopology {
        self.shared.served.image.topology()
    }

    fn capabilities(&self) -> Capabilities {
        let served = &self.shared.served;
        let mut capabilities = served.image.capabilities();
        if served.policy.read_only {
            capabilities = Capabilities::default();
        }
        if served.policy.discard == DiscardPolicy::Ignore {
            capabilities.discard = false;
        }
        capabilities
    }

    fn info(&self) -> ImageInfo {
        let mut info = self.shared.served.image.info();
        info.backing_path = info
            .backing_file
            .as_ref()
            .and_then(|name| crate::gate::resolve_name(self.path(), name).ok());
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        // SAFETY: the buffers end with this call, before `buf` is used again.
        let buffers = unsafe { borrowed_mut(buf) };
        self.serve(&RequestOp::Read { offset, buffers })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        // SAFETY: the buffers end with this call and are the source of a write alone.
        let buffers = unsafe { borrowed(buf) };
        self.serve(&RequestOp::Write {
            offset,
            buffers,
            fua: false,
        })
    }

    fn flush(&self) -> Result<()> {
        if self.shared.served.policy.read_only {
            return Ok(());
        }
        self.serve(&RequestOp::Flush)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.serve(&RequestOp::Discard { offset, len })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.serve(&RequestOp::WriteZeroes {
            offset,
            len,
            may_unmap,
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let image = &self.shared.served.image;
        self.with_pin(async |io| {
            let size = image.size();
            let inside = offset
                .checked_add(len)
                .is_some_and(|end| end <= size && len > 0);
            if !inside {
                return Err(Error::invalid_argument(format!(
                    "block status of {len} bytes at {offset}: expected a range inside {size} bytes"
                )));
            }
            io.inject_status(offset, len)?;
            image.block_status(io, GuestRange::new(offset, len)).await
        })
        .map_err(|error| error.path(self.path()))
    }

    fn resize(&self, size: u64) -> Result<()> {
        if !self.capabilities().resize {
            return Err(
                Error::unsupported("this disk cannot be resized as it was opened")
                    .path(self.path()),
            );
        }
        let image = &self.shared.served.image;
        self.with_drained(async |io| image.resize(io, size).await)
            .map_err(|error| error.operation("resize").path(self.path()))?;
        self.shared.resized(size);
        Ok(())
    }

    fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()> {
        let served = &self.shared.served;
        if served.policy.read_only {
            return Err(Error::new(ErrorKind::ReadOnly).path(self.path()));
        }
        let written = self
            .with_pin(async |io| {
                let range = GuestRange::new(offset, data.len() as u64);
                let op = RequestOp::Discard {
                    offset,
                    len: range.len,
                };
                serve::check(served, &op).map_err(Error::new)?;
                let mutation = Some(Mutation::Write(range));
                served.hooks.begin(mutation);
                let result = match served.image.write_compressed(io, range, data).await {
                    Ok(true) => serve::settle(served, io, served.policy.write_through)
                        .await
                        .map(|()| true),
                    other => other,
                };
                let outcome = result.as_ref().map(drop).map_err(Error::kind);
                served.hooks.end(mutation, outcome);
                result
            })
            .map_err(|error| error.operation("write compressed").path(self.path()))?;
        if written {
            return Ok(());
        }
        self.write_at(data, offset)
    }

    fn change_keys(&self, change: &KeyChange) -> Result<()> {
        if self.shared.served.policy.read_only {
            return Err(Error::new(ErrorKind::ReadOnly).path(self.path()));
        }
        let image = &self.shared.served.image;
        self.with_drained(async |io| image.change_keys(io, change).await)
            .map_err(|error| error.operation("change keys").path(self.path()))
    }

    fn extras(&self) -> &dyn DiskExtras {
        self
    }

    fn close(&self) -> Result<()> {
        self.shared.close()
    }

    fn try_clone(&self) -> Result<Box<dyn DiskFile>> {
        Ok(Box::new(self.clone()))
    }
}

impl AsyncDiskFile for Disk {
    fn create_async_io(&self, ring_depth: u32) -> Result<Box<dyn AsyncIo>> {
        let shared = &self.shared;
        let make = || -> Result<Queue> {
            let driver = thread_driver(&*shared.core.host, shared.engine, ring_depth)?;
            let io = Io::new(&driver, &shared.core)?;
            let keep: Arc<dyn Any> = Arc::<Shared>::clone(shared);
            Queue::new(io, Arc::clone(&shared.served), ring_depth, keep)
        };
        Ok(Box::new(make().map_err(|error| error.path(self.path()))?))
    }

    fn clone_async(&self) -> Box<dyn AsyncDiskFile> {
        Box::new(self.clone())
    }

    fn on_resize(&self, listener: ResizeListener) {
        lock(&self.shared.listeners).push(listener);
    }
}

impl From<Disk> for Box<dyn AsyncDiskFile> {
    fn from(disk: Disk) -> Self {
        Box::new(disk)
    }
}
