//! Synchronous calls: a small driver over the sync engine, kept with the disk and used by one call at
//! a time.

use std::{
    any::Any,
    cell::RefCell,
    rc::{Rc, Weak},
    sync::{Arc, Mutex, OnceLock},
};

use super::{
    Buffers, EngineKind, Host, Io, busy::thread_is_busy_with, core::DiskCore, driver::Driver,
};
use crate::sync::lock;
use crate::{ErrorKind, Result};

/// Operations a synchronous context holds; its engine has none in flight anyway.
const CONTEXT_DEPTH: u32 = 64;

/// Contexts kept for reuse.
const MAX_SPARE: usize = 16;

/// A context on its way between threads.
struct Parked(Io);

// SAFETY: a parked context is idle: no task, operation or queue of its driver exists, so the `Rc`s
// inside it are reachable through it alone and move with it; whoever unparks it owns all of it.
unsafe impl Send for Parked {}

/// The synchronous contexts of a disk.
#[derive(Default)]
pub(crate) struct Contexts {
    spare: Mutex<Vec<Parked>>,
}

impl Contexts {
    /// Runs a future of the disk to its end on the calling thread.
    pub(crate) fn block_on<T>(
        &self,
        core: &Arc<DiskCore>,
        work: impl AsyncFnOnce(&Io) -> Result<T>,
    ) -> Result<T> {
        let io = self.take(core)?;
        let result = io.driver.block_on(work(&io));
        let idle = io.driver.operations() == 0 && Rc::strong_count(&io.driver) == 1;
        let mut spare = lock(&self.spare);
        if idle && spare.len() < MAX_SPARE {
            spare.push(Parked(io));
        }
        result?
    }

    /// Refuses a thread that would wait for requests of its own.
    pub(crate) fn check_thread(&self, core: &DiskCore) -> Result<()> {
        if thread_is_busy_with(core.id) {
            return Err(crate::Error::new(ErrorKind::WouldDeadlock).path(&core.path));
        }
        Ok(())
    }

    fn take(&self, core: &Arc<DiskCore>) -> Result<Io> {
        self.check_thread(core)?;
        let parked = lock(&self.spare).pop();
        if let Some(Parked(io)) = parked {
            return Ok(io);
        }
        let engine = core.host.engine(EngineKind::Sync, CONTEXT_DEPTH)?;
        Io::new(&Driver::new(engine)?, core)
    }

    /// Drops what is kept: the files of the disk are closed with it.
    pub(crate) fn clear(&self) {
        let parked = std::mem::take(&mut *lock(&self.spare));
        drop(parked);
    }
}

/// The buffers of a synchronous read: `bytes` for as long as the call lasts.
///
/// # Safety
/// The result and everything made from it is gone before `bytes` is used again.
pub(crate) unsafe fn borrowed_mut(bytes: &mut [u8]) -> Buffers {
    // SAFETY: the caller keeps the bytes alone for these buffers while they exist.
    unsafe { Buffers::from_raw([(bytes.as_mut_ptr(), bytes.len())], no_guard()) }
}

/// The buffers of a synchronous write; nothing writes to them.
///
/// # Safety
/// The result and everything made from it is gone before `bytes` ends, and is used for writes to
/// the disk alone.
pub(crate) unsafe fn borrowed(bytes: &[u8]) -> Buffers {
    // SAFETY: the caller uses the buffers as the source of a write alone, which only reads.
    unsafe { Buffers::from_raw([(bytes.as_ptr().cast_mut(), bytes.len())], no_guard()) }
}

fn no_guard() -> Arc<dyn Any + Send + Sync> {
    static GUARD: OnceLock<Arc<()>> = OnceLock::new();
    let guard: Arc<()> = Arc::clone(GUARD.get_or_init(|| Arc::new(())));
    guard
}

thread_local! {
    /// The drivers of this thread, one an engine: its queues share the ring, its wait and its batch.
    static DRIVERS: RefCell<Vec<(EngineKind, Weak<Driver>)>> = const { RefCell::new(Vec::new()) };
}

/// The least operations a shared driver's engine holds.
const MIN_SHARED_DEPTH: u32 = 256;

/// The driver of the calling thread for an engine, made if there is none.
pub(crate) fn thread_driver(host: &dyn Host, kind: EngineKind, depth: u32) -> Result<Rc<Driver>> {
    let make = || Driver::new(host.engine(kind, depth.max(MIN_SHARED_DEPTH).next_power_of_two())?);
    if !host.is_os() {
        return make();
    }
    DRIVERS.with_borrow_mut(|drivers| {
        drivers.retain(|(_, driver)| driver.strong_count() > 0);
        let shared = drivers
            .iter()
            .find(|(other, _)| *other == kind)
            .and_then(|(_, driver)| driver.upgrade());
        if let Some(driver) = shared {
            return Ok(driver);
        }
        let driver = make()?;
        drivers.push((kind, Rc::downgrade(&driver)));
        Ok(driver)
    })
}
