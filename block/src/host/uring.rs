//! Disks inside a tokio-uring runtime.

use std::{future::Future, os::fd::OwnedFd, sync::Arc, task::Poll};

use tokio::{io::unix::AsyncFd, task::JoinHandle};
use tokio_uring::buf::{BoundedBuf, BoundedBufMut};

use super::{DEFAULT_DEPTH, line::Line, named, pump::Pump};
use crate::{
    AsyncDiskFile, ErrorKind, Result,
    io::{LocalLoan, RequestOp, filled, lend_uring_source, lend_uring_target, watch},
};

/// A disk for programs that run in a `tokio_uring` runtime, with that crate's buffers and its habit
/// of giving them back whatever happened. Needs the cargo feature `tokio-uring`.
///
/// tokio-uring is not an engine of this crate, and this type does not hand operations to its ring:
/// its ring belongs to its own runtime, its writes take no flags, so that a durable write is not to
/// be had, and it is no longer maintained. This is an adapter: the disk's own engine does the work,
/// driven by a task on the runtime's thread, which sleeps on the queue's notifier. There is no
/// further thread.
///
/// Requests that are made before that task runs are submitted together. Dropping a future is as
/// [described](super) for [`HostDisk`](super::HostDisk). A blocking call of [`disk_file`] on the
/// runtime's thread is refused while requests are in flight: it would wait for itself.
///
/// ```
/// # let file = tempfile::NamedTempFile::new().unwrap();
/// # file.as_file().set_len(1 << 20).unwrap();
/// # let path = file.path();
/// use block::{OpenOptions, host::TokioUringDisk};
///
/// tokio_uring::start(async {
///     let disk = TokioUringDisk::new(OpenOptions::new().open(path)?)?;
///     let (result, buf) = disk.write_at(b"hello".to_vec(), 512).await;
///     assert_eq!(result?, 5);
///     disk.flush().await?;
///     let (result, read) = disk.read_at(Vec::with_capacity(5), 512).await;
///     assert_eq!(result?, 5);
///     assert_eq!(read, buf);
///     disk.close().await
/// }).unwrap();
/// ```
///
/// [`disk_file`]: Self::disk_file
pub struct TokioUringDisk {
    line: Arc<Line>,
    disk: Box<dyn AsyncDiskFile>,
    task: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for TokioUringDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokioUringDisk")
            .field("path", &self.disk.path())
            .finish_non_exhaustive()
    }
}

impl TokioUringDisk {
    /// A disk with at most [`DEFAULT_DEPTH`] requests in flight.
    ///
    /// # Errors
    /// As [`with_depth`](Self::with_depth).
    ///
    /// # Panics
    /// Outside a tokio-uring runtime.
    pub fn new(disk: impl Into<Box<dyn AsyncDiskFile>>) -> Result<Self> {
        Self::with_depth(disk, DEFAULT_DEPTH)
    }

    /// A disk with at most `depth` requests in flight; more wait in line.
    ///
    /// # Errors
    /// Those of [`create_async_io`](AsyncDiskFile::create_async_io), and the host's error when the
    /// notifier cannot be watched.
    ///
    /// # Panics
    /// Outside a tokio-uring runtime.
    pub fn with_depth(disk: impl Into<Box<dyn AsyncDiskFile>>, depth: u32) -> Result<Self> {
        let disk = disk.into();
        let line = Line::new(disk.path());
        let io = disk.create_async_io(depth)?;
        let notifier = io
            .notifier()
            .try_clone_to_owned()
            .and_then(watch)
            .map_err(|error| named(error.into(), "watch notifier", &*disk))?;
        let pump = Pump::new(io, disk.clone_async(), Arc::clone(&line));
        let task = tokio_uring::spawn(async move {
            if let Err(error) = drive(pump, notifier).await {
                tracing::error!(%error, "the task of a disk gives up");
            }
        });
        Ok(Self {
            line,
            disk,
            task: Some(task),
        })
    }

    /// Fills all of `buf` from `offset`, a vector up to its capacity; returns the number of bytes,
    /// and the buffer. A shorter read is one into a slice of the buffer.
    pub fn read_at<B: BoundedBufMut>(
        &self,
        buf: B,
        offset: u64,
    ) -> impl Future<Output = (Result<usize>, B)> + use<B> {
        let line = Arc::clone(&self.line);
        async move {
            let bounds = buf.bounds();
            let (loan, buffers) = lend_uring_target(buf.slice_full());
            let bytes = buffers.len() as usize;
            let result = line.request(RequestOp::Read { offset, buffers }).await;
            let mut slice = returned(loan);
            let result = result.map(|()| {
                filled(&mut slice);
                bytes
            });
            (result, B::from_buf_bounds(slice.into_inner(), bounds))
        }
    }

    /// Writes all of `buf` at `offset`; returns the number of bytes, and the buffer.
    pub fn write_at<B: BoundedBuf>(
        &self,
        buf: B,
        offset: u64,
    ) -> impl Future<Output = (Result<usize>, B)> + use<B> {
        let line = Arc::clone(&self.line);
        async move {
            let bounds = buf.bounds();
            let (loan, buffers) = lend_uring_source(buf.slice_full());
            let bytes = buffers.len() as usize;
            let op = RequestOp::Write {
                offset,
                buffers,
                fua: false,
            };
            let result = line.request(op).await;
            let buf = B::from_buf_bounds(returned(loan).into_inner(), bounds);
            (result.map(|()| bytes), buf)
        }
    }

    /// As [`HostDisk::flush`](super::HostDisk::flush).
    ///
    /// # Errors
    /// As [`DiskFile::flush`](crate::DiskFile::flush).
    pub fn flush(&self) -> impl Future<Output = Result<()>> + use<> {
        self.line.request(RequestOp::Flush)
    }

    /// As [`HostDisk::discard`](super::HostDisk::discard).
    ///
    /// # Errors
    /// As [`DiskFile::discard`](crate::DiskFile::discard).
    pub fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<()>> + use<> {
        self.line.request(RequestOp::Discard { offset, len })
    }

    /// As [`HostDisk::write_zeroes`](super::HostDisk::write_zeroes).
    ///
    /// # Errors
    /// As [`DiskFile::write_zeroes`](crate::DiskFile::write_zeroes).
    pub fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> impl Future<Output = Result<()>> + use<> {
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

    /// Waits until every request that was made has ended and closes this handle of the disk.
    /// Dropping the disk does so too, but some time later, as its task ends.
    ///
    /// # Errors
    /// [`Cancelled`](ErrorKind::Cancelled) when the task panicked.
    pub async fn close(mut self) -> Result<()> {
        self.line.close();
        match self.task.take() {
            Some(task) => task
                .await
                .map_err(|error| crate::Error::new(ErrorKind::Cancelled).source(error)),
            None => Ok(()),
        }
    }
}

impl Drop for TokioUringDisk {
    fn drop(&mut self) {
        self.line.close();
    }
}

/// The buffer of a request that ended.
fn returned<B: 'static>(loan: LocalLoan<B>) -> B {
    loan.end()
        .expect("a request that ended has let go of its buffers")
}

/// Serves the line until it is closed.
async fn drive(mut pump: Pump, notifier: AsyncFd<OwnedFd>) -> Result<()> {
    loop {
        if pump.advance() {
            continue;
        }
        if pump.is_finished() {
            return Ok(());
        }
        std::future::poll_fn(|context| {
            if !pump.sleep(context.waker()) {
                return Poll::Ready(Ok(()));
            }
            notifier.poll_read_ready(context).map_ok(|mut guard| {
                // Before the queue is looked at: what is written from now on is seen again.
                guard.clear_ready();
            })
        })
        .await
        .map_err(|error| crate::Error::from(error).operation("wait for notifier"))?;
        pump.awake();
    }
}
