//! Doorbells that a client maps: a page of memory, and a thread that looks at it and never sleeps.

use std::{
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use virtio_devices::nvme::{DoorbellPage, NvmeController};

use crate::{
    pci::Mappable,
    sys::{self, Mapping},
};

/// Where the doorbells are in BAR 0, and so in the file.
const OFFSET: u64 = 0x1000;

/// The page, or pages, with the doorbells.
struct Page(Mapping);

impl Page {
    fn at(&self, index: usize) -> Option<&AtomicU32> {
        let offset = index.checked_mul(4)?;
        if offset + 4 > self.0.len() {
            return None;
        }
        let place = self.0.as_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: the place is inside the mapping, which lives as long as `self` and starts at a page, so
        // that it is aligned; the file is sealed and cannot shrink. Whoever else writes there is another
        // process.
        Some(unsafe { AtomicU32::from_ptr(place) })
    }
}

impl DoorbellPage for Page {
    fn load(&self, index: usize) -> u32 {
        self.at(index)
            .map_or(0, |it| u32::from_le(it.load(Ordering::SeqCst)))
    }

    fn store(&self, index: usize, value: u32) {
        if let Some(place) = self.at(index) {
            place.store(value.to_le(), Ordering::SeqCst);
        }
    }
}

/// Looks at the doorbells of a controller until it is dropped.
pub(super) struct Poller {
    /// The file with the page. A client may keep it for ever, so each has one of its own.
    file: Mutex<Option<Arc<File>>>,
    bytes: u64,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    pub(super) fn start(controller: &Arc<NvmeController>) -> io::Result<Self> {
        let bytes = controller
            .register_bytes()
            .saturating_sub(OFFSET)
            .next_multiple_of(4096);
        let file = new_page(controller, bytes)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, controller) = (Arc::clone(&stop), Arc::clone(controller));
        let thread = thread::Builder::new()
            .name("nvme-poll".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    if !controller.poll_doorbells() {
                        // Whoever else wants the processor has it meanwhile.
                        thread::yield_now();
                    }
                }
            })?;
        Ok(Self {
            file: Mutex::new(Some(Arc::new(file))),
            bytes,
            stop,
            thread: Some(thread),
        })
    }

    fn file(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mappable(&self) -> Option<Mappable> {
        Some(Mappable {
            file: self.file().clone()?,
            offset: OFFSET,
            bytes: self.bytes,
        })
    }

    /// Takes a new page; without one the next client has to send its doorbells.
    pub(super) fn renew(&self, controller: &NvmeController) {
        let mut file = self.file();
        *file = match new_page(controller, self.bytes) {
            Ok(new) => Some(Arc::new(new)),
            Err(error) => {
                tracing::error!(%error, "there is no page for doorbells");
                controller.unwatch_doorbells();
                None
            }
        };
    }
}

fn new_page(controller: &NvmeController, bytes: u64) -> io::Result<File> {
    let file = sys::sealed_memfd(c"doorbells", OFFSET + bytes)?;
    let page = Page(Mapping::new(&file, OFFSET, bytes)?);
    controller.watch_doorbells(Arc::new(page));
    Ok(file)
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that looks at doorbells panicked");
        }
    }
}
