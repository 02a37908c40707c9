//! Disks for plain asynchronous Rust: futures over owned buffers, on any executor.
//!
//! [`HostDisk`] is for programs, not for devices: a device queue drives an
//! [`AsyncIo`](crate::io::AsyncIo) itself, on its own thread, without a message in between.
//!
//! ```
//! # fn block_on<F: std::future::Future>(future: F) -> F::Output {
//! #     use std::{sync::Arc, task::{Context, Poll, Wake, Waker}, thread};
//! #     struct Unpark(thread::Thread);
//! #     impl Wake for Unpark { fn wake(self: Arc<Self>) { self.0.unpark() } }
//! #     let waker = Waker::from(Arc::new(Unpark(thread::current())));
//! #     let mut future = std::pin::pin!(future);
//! #     loop {
//! #         match future.as_mut().poll(&mut Context::from_waker(&waker)) {
//! #             Poll::Ready(output) => return output,
//! #             Poll::Pending => thread::park(),
//! #         }
//! #     }
//! # }
//! # let file = tempfile::NamedTempFile::new().unwrap();
//! # file.as_file().set_len(1 << 20).unwrap();
//! # let path = file.path();
//! use block::{HostDisk, OpenOptions};
//!
//! # block_on(async {
//! let disk = HostDisk::new(OpenOptions::new().open(path)?)?;
//! let written = disk.write_at(b"hello".to_vec(), 512).await?;
//! disk.flush().await?;
//! let read = disk.read_at(vec![0; 5], 512).await?;
//! assert_eq!(read, written);
//! # Ok::<(), block::Error>(())
//! # }).unwrap();
//! ```
//!
//! # Owned buffers
//!
//! A request takes its buffer by value and gives it back at its end. The kernel goes on with an
//! operation that was started, even when the future that waits for it is dropped; a borrowed buffer
//! would be gone by then, one that the request owns is not.
//!
//! # Dropping a future
//!
//! A request is made when its future is first polled. Dropping the future before the request was
//! started takes it back; dropping it later only gives up the answer. Which of the two happens is a
//! race: after dropping a write, the disk has the old bytes or, as soon as the operation has ended,
//! the new ones.
//!
//! # The thread
//!
//! Each [`HostDisk`] has one thread, named `platter-host`, that makes the `AsyncIo` and drives it. At
//! each wake it takes everything that waits, up to the depth of the queue, and submits it to the
//! host together. Requests beyond the depth wait in line and start in order as others end; their
//! futures stay pending meanwhile, which is all the back-pressure there is: the memory in line is
//! that of the futures the program holds.

mod line;
mod pump;
#[cfg(feature = "tokio-uring")]
mod uring;

use std::{
    future::Future,
    sync::{Arc, mpsc},
    task::{Wake, Waker},
    thread::{self, JoinHandle},
};

use self::{line::Line, pump::Pump};
use crate::{
    AsyncDiskFile, DiskFile, Error, ErrorKind, Result,
    io::{Loan, Notifier, RequestOp, lend_source, lend_target},
};

pub use crate::io::{AlignedBuf, IoBuf, IoBufMut};
#[cfg(feature = "tokio-uring")]
pub use uring::TokioUringDisk;

/// Requests in flight on a disk unless the caller says otherwise.
pub const DEFAULT_DEPTH: u32 = 128;

/// A disk whose requests are `Send` futures; see the [module](self).
///
/// Dropping it waits until every request that was made has ended, then closes the disk unless there
/// are other handles. Futures that are polled for the first time after that fail with
/// [`Cancelled`](crate::ErrorKind::Cancelled).
pub struct HostDisk {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
    disk: Box<dyn AsyncDiskFile>,
}

impl std::fmt::Debug for HostDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostDisk")
            .field("path", &self.disk.path())
            .finish_non_exhaustive()
    }
}

impl HostDisk {
    /// A disk with at most [`DEFAULT_DEPTH`] requests in flight.
    ///
    /// # Errors
    /// As [`with_depth`](Self::with_depth).
    pub fn new(disk: impl Into<Box<dyn AsyncDiskFile>>) -> Result<Self> {
        Self::with_depth(disk, DEFAULT_DEPTH)
    }

    /// A disk with at most `depth` requests in flight; more wait in line.
    ///
    /// # Errors
    /// Those of [`create_async_io`](AsyncDiskFile::create_async_io), and the host's error when it
    /// cannot start a thread.
    pub fn with_depth(disk: impl Into<Box<dyn AsyncDiskFile>>, depth: u32) -> Result<Self> {
        let disk = disk.into();
        let line = Line::new(disk.path());
        let (ready, made) = mpsc::channel();
        let work = {
            let (disk, line) = (disk.clone_async(), Arc::clone(&line));
            move || match Worker::new(disk, line, depth) {
                Ok(worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = thread::Builder::new()
            .name("platter-host".to_owned())
            .spawn(work)
            .map_err(|error| named(error.into(), "start thread", &*disk))?;
        let made = made.recv().unwrap_or_else(|_| {
            // It panicked before it could say anything.
            Err(named(ErrorKind::Cancelled.into(), "start thread", &*disk))
        });
        if let Err(error) = made {
            // Its handle of the disk is gone too when the caller hears of this.
            let _ = thread.join();
            return Err(error);
        }
        Ok(Self {
            line,
            thread: Some(thread),
            disk,
        })
    }

    /// Fills all of `buf` from `offset` and gives it back.
    ///
    /// # Errors
    /// As [`DiskFile::read_at`]. The buffer is lost then.
    pub fn read_at<B: IoBufMut>(
        &self,
        buf: B,
        offset: u64,
    ) -> impl Future<Output = Result<B>> + Send + use<B> {
        let line = Arc::clone(&self.line);
        async move {
            let (loan, buffers) = lend_target(buf);
            line.request(RequestOp::Read { offset, buffers }).await?;
            Ok(returned(loan))
        }
    }

    /// Writes all of `buf` at `offset` and gives it back.
    ///
    /// # Errors
    /// As [`DiskFile::write_at`]. The buffer is lost then.
    pub fn write_at<B: IoBuf>(
        &self,
        buf: B,
        offset: u64,
    ) -> impl Future<Output = Result<B>> + Send + use<B> {
        let line = Arc::clone(&self.line);
        async move {
            let (loan, buffers) = lend_source(buf);
            let fua = false;
            let op = RequestOp::Write {
                offset,
                buffers,
                fua,
            };
            line.request(op).await?;
            Ok(returned(loan))
        }
    }

    /// Makes every write that completed before this is first polled durable.
    ///
    /// # Errors
    /// As [`DiskFile::flush`].
    pub fn flush(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        self.line.request(RequestOp::Flush)
    }

    /// Tells the disk that the range is not needed any more; see [`DiskFile::discard`].
    ///
    /// # Errors
    /// As [`DiskFile::discard`].
    pub fn discard(
        &self,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        self.line.request(RequestOp::Discard { offset, len })
    }

    /// Makes the range read as zeroes; with `may_unmap` host space may be given back.
    ///
    /// # Errors
    /// As [`DiskFile::write_zeroes`].
    pub fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        self.line.request(RequestOp::WriteZeroes {
            offset,
            len,
            may_unmap,
        })
    }

    /// The size of the disk, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// The disk itself: topology, capabilities, resize. Its calls block.
    #[must_use]
    pub fn disk_file(&self) -> &dyn AsyncDiskFile {
        &*self.disk
    }
}

impl Drop for HostDisk {
    fn drop(&mut self) {
        self.line.close();
        let Some(thread) = self.thread.take() else {
            return;
        };
        // A waker may drop the disk on its own thread, which then ends by itself.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!(disk = %self.disk.path().display(), "the thread of a disk panicked");
        }
    }
}

/// The buffer of a request that ended well.
fn returned<B>(loan: Loan<B>) -> B {
    loan.end()
        .expect("a request that ended has let go of its buffers")
}

fn named(error: Error, operation: &'static str, disk: &(impl DiskFile + ?Sized)) -> Error {
    error.operation(operation).path(disk.path())
}

/// Wakes the thread of a disk.
struct Bell(Notifier);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.signal();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.signal();
    }
}

/// What the thread of a disk does.
struct Worker {
    pump: Pump,
    bell: Arc<Bell>,
}

impl Worker {
    fn new(disk: Box<dyn AsyncDiskFile>, line: Arc<Line>, depth: u32) -> Result<Self> {
        let io = disk.create_async_io(depth)?;
        let bell =
            Notifier::new().map_err(|error| named(error.into(), "create eventfd", &*disk))?;
        Ok(Self {
            pump: Pump::new(io, disk, line),
            bell: Arc::new(Bell(bell)),
        })
    }

    fn run(mut self) {
        if let Err(error) = self.serve() {
            // The pump fails what is left when it is dropped.
            tracing::error!(%error, "the thread of a disk gives up");
        }
    }

    fn serve(&mut self) -> Result<()> {
        let waker = Waker::from(Arc::clone(&self.bell));
        self.watch()?;
        loop {
            if self.pump.advance() {
                if self.pump.take_bell() {
                    self.bell.0.clear();
                    self.watch()?;
                }
                continue;
            }
            if self.pump.is_finished() {
                return Ok(());
            }
            if !self.pump.sleep(&waker) {
                continue;
            }
            self.pump.io().wait(None)?;
            self.pump.awake();
        }
    }

    fn watch(&mut self) -> Result<()> {
        let bell = Arc::clone(&self.bell);
        self.pump
            .io()
            .watch(std::os::fd::AsFd::as_fd(&bell.0), pump::BELL)
    }
}
