//! A disk that does nothing, at once: what remains is the cost of the device.

use std::{
    mem,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
    time::Duration,
};

use block::{
    AsyncDiskFile, Capabilities, DiskFile, DiskTopology, Error, Format, Result,
    image::{BlockStatus, ImageInfo},
    io::{AsyncIo, Completion, Request, RequestOp},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A disk of that many bytes whose requests all succeed without moving any.
#[derive(Clone, Copy, Debug)]
pub struct NullDisk(pub u64);

impl DiskFile for NullDisk {
    fn path(&self) -> &Path {
        Path::new("null")
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.0
    }

    fn physical_size(&self) -> Result<u64> {
        Ok(0)
    }

    fn topology(&self) -> DiskTopology {
        DiskTopology::default()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: true,
            ..Capabilities::default()
        }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _may_unmap: bool) -> Result<()> {
        Ok(())
    }

    fn block_status(&self, _offset: u64, _len: u64) -> Result<BlockStatus> {
        Err(Error::unsupported("a null disk has no map"))
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Err(Error::unsupported("a null disk has one size"))
    }

    fn write_compressed(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn try_clone(&self) -> Result<Box<dyn DiskFile>> {
        Ok(Box::new(*self))
    }
}

impl AsyncDiskFile for NullDisk {
    fn create_async_io(&self, ring_depth: u32) -> Result<Box<dyn AsyncIo>> {
        Ok(Box::new(NullIo {
            ready: Vec::with_capacity(ring_depth as usize),
            capacity: ring_depth as usize,
            event: EventFd::new(EFD_NONBLOCK)?,
        }))
    }

    fn clone_async(&self) -> Box<dyn AsyncDiskFile> {
        Box::new(*self)
    }

    fn on_resize(&self, _listener: Box<dyn Fn(u64) + Send + Sync>) {}
}

struct NullIo {
    ready: Vec<Completion>,
    capacity: usize,
    event: EventFd,
}

impl AsyncIo for NullIo {
    fn submit(&mut self, batch: &mut Vec<Request>) -> usize {
        let taken = batch.len().min(self.capacity - self.ready.len());
        for request in batch.drain(..taken) {
            let buffers = match request.op {
                RequestOp::Read { buffers, .. } | RequestOp::Write { buffers, .. } => Some(buffers),
                _ => None,
            };
            self.ready.push(Completion {
                id: request.id,
                result: Ok(()),
                buffers,
            });
        }
        taken
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let count = self.ready.len();
        if out.is_empty() {
            mem::swap(out, &mut self.ready);
        } else {
            out.append(&mut self.ready);
        }
        count
    }

    fn in_flight(&self) -> usize {
        self.ready.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self.event` lives.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    fn watch(&mut self, _fd: BorrowedFd<'_>, _id: u64) -> Result<()> {
        Err(Error::unsupported("a null disk is polled"))
    }

    fn wait(&mut self, _timeout: Option<Duration>) -> Result<bool> {
        Ok(!self.ready.is_empty())
    }
}
