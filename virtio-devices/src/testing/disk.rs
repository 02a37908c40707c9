//! The control plane of the mock disk, which is also the test's handle on its data planes.

use std::{
    path::Path,
    sync::{Arc, MutexGuard},
};

use super::{
    gate::Gate,
    io::MockIo,
    state::{Logged, Shared, State, slice},
};
use block::{
    AsyncDiskFile, Capabilities, DiskFile, DiskTopology, Error, ErrorKind, Format, Result,
    image::{BlockStatus, ImageInfo},
    io::AsyncIo,
};

/// What a mock disk is like.
#[derive(Clone, Copy, Debug)]
pub struct MockDiskConfig {
    /// Bytes.
    pub size: u64,
    /// Block sizes.
    pub topology: DiskTopology,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The most requests in flight a data plane; 0 is what the caller asks for.
    pub capacity: usize,
}

impl Default for MockDiskConfig {
    fn default() -> Self {
        Self {
            size: 1 << 20,
            topology: DiskTopology::default(),
            capabilities: Capabilities {
                writable: true,
                discard: true,
                write_zeroes: true,
                resize: true,
                discard_granularity: 4096,
                secure_erase: false,
                overwrite: false,
            },
            capacity: 0,
        }
    }
}

/// A disk in memory. Clones are handles on the same disk: give one to the device and keep one.
#[derive(Clone)]
pub struct MockDisk {
    config: MockDiskConfig,
    state: Shared,
    writes: Arc<Gate>,
}

impl MockDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(config: MockDiskConfig) -> Self {
        let state = Shared::default();
        state.lock().data = vec![0; config.size as usize];
        Self {
            config,
            state,
            writes: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// From now on, holds requests back or not. Those already held stay held.
    pub fn hold(&self, hold: bool) {
        self.state().hold = hold;
    }

    /// The number of requests held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Does the held request at `index` (0 is the oldest) and completes it; returns whether there
    /// was one.
    pub fn release(&self, index: usize) -> bool {
        self.state().release(index)
    }

    /// Does and completes everything held, oldest first.
    pub fn release_all(&self) {
        while self.release(0) {}
    }

    /// From now on, synchronous writes wait or do not.
    pub fn hold_writes(&self, hold: bool) {
        self.writes.close(hold);
    }

    /// Lets so many synchronous writes through.
    pub fn let_through(&self, writes: usize) {
        self.writes.permit(writes);
    }

    /// The number of synchronous writes that wait.
    #[must_use]
    pub fn waiting_writes(&self) -> usize {
        self.writes.waiting()
    }

    /// Asks `fail` about each request before it is done, and about each synchronous write; an error
    /// fails it without touching the data.
    pub fn fail_with(&self, fail: impl FnMut(&Logged) -> Option<ErrorKind> + Send + 'static) {
        self.state().fail = Some(Box::new(fail));
    }

    /// Requests so far, in the order in which they were submitted.
    #[must_use]
    pub fn log(&self) -> Vec<Logged> {
        self.state().log.clone()
    }

    /// The sizes of the batches so far.
    #[must_use]
    pub fn batches(&self) -> Vec<usize> {
        self.state().batches.clone()
    }

    /// The number of memory regions of each request to pin memory so far.
    #[must_use]
    pub fn pinned(&self) -> Vec<usize> {
        self.state().pinned.clone()
    }

    /// Forgets the log and the batches.
    pub fn clear_log(&self) {
        let mut state = self.state();
        state.log.clear();
        state.batches.clear();
    }

    /// Changes what is on the disk, behind everybody's back.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.state().data[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Everything on the disk.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.state().data.clone()
    }
}

impl DiskFile for MockDisk {
    fn path(&self) -> &Path {
        Path::new("mock")
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.state().data.len() as u64
    }

    fn physical_size(&self) -> Result<u64> {
        Ok(self.size())
    }

    fn topology(&self) -> DiskTopology {
        self.config.topology
    }

    fn capabilities(&self) -> Capabilities {
        self.config.capabilities
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut state = self.state();
        buf.copy_from_slice(slice(&mut state.data, offset, buf.len() as u64)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writes.pass();
        let (mut state, len) = (self.state(), buf.len() as u64);
        let fua = false;
        state.allow(&Logged::Write { offset, len, fua })?;
        slice(&mut state.data, offset, len)?.copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<()> {
        slice(&mut self.state().data, offset, len)?.fill(0);
        Ok(())
    }

    fn block_status(&self, _offset: u64, _len: u64) -> Result<BlockStatus> {
        Err(Error::unsupported("a mock disk has no map"))
    }

    fn resize(&self, size: u64) -> Result<()> {
        let listeners = {
            let mut state = self.state();
            state.data.resize(size as usize, 0);
            std::mem::take(&mut state.listeners)
        };
        for listener in &listeners {
            listener(size);
        }
        self.state().listeners.extend(listeners);
        Ok(())
    }

    fn write_compressed(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Err(Error::unsupported("a mock disk compresses nothing"))
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn try_clone(&self) -> Result<Box<dyn DiskFile>> {
        Ok(Box::new(self.clone()))
    }
}

impl AsyncDiskFile for MockDisk {
    fn create_async_io(&self, ring_depth: u32) -> Result<Box<dyn AsyncIo>> {
        let capacity = match self.config.capacity {
            0 => ring_depth as usize,
            capacity => capacity,
        };
        Ok(Box::new(MockIo::new(self.state.clone(), capacity)?))
    }

    fn clone_async(&self) -> Box<dyn AsyncDiskFile> {
        Box::new(self.clone())
    }

    fn on_resize(&self, listener: Box<dyn Fn(u64) + Send + Sync>) {
        self.state().listeners.push(listener);
    }
}
