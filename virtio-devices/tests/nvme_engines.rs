//! A controller over real images and real engines: how its worker waits for several disks.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use block::{AsyncDiskFile, ErrorKind, Format, OpenOptions, io::EngineKind};
use nvme_common::{DATA, Guest, Memory, queue_addresses};
use tempfile::NamedTempFile;
use virtio_devices::nvme::{
    NamespaceConfig, NvmeConfig, NvmeController, Subsystem, SubsystemConfig,
    driver::{Entry, QueuePair},
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u64 = 1 << 20;

struct Image {
    file: NamedTempFile,
}

impl Image {
    fn new() -> Self {
        let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(SIZE).unwrap();
        Self { file }
    }

    fn open(&self, engine: EngineKind) -> Option<Box<dyn AsyncDiskFile>> {
        OpenOptions::new()
            .format(Format::Raw)
            .engine(engine)
            .open(self.file.path())
            .inspect_err(|error| println!("{}: not run: {error}", engine.name()))
            .ok()
    }
}

fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The guest on a thread of its own, while the worker runs on that of the test.
struct Driver<'a> {
    controller: &'a NvmeController,
    memory: Arc<Memory>,
    queue: QueuePair,
    round: u8,
}

impl Driver<'_> {
    /// Executes commands together.
    fn execute(&mut self, entries: &[Entry]) {
        for (cid, entry) in (0..).zip(entries) {
            self.queue.push(&entry.cid(cid));
        }
        self.queue.ring(self.controller);
        let (started, mut left) = (Instant::now(), entries.len());
        while left > 0 {
            left -= self.queue.poll(|done| {
                assert!(done.status.is_success(), "{done:x?}");
            });
            self.queue.release(self.controller);
            assert!(started.elapsed() < Duration::from_secs(60), "{left} left");
            thread::yield_now();
        }
    }

    /// Writes to namespaces, all at once, and reads back.
    fn use_all(&mut self, namespaces: &[u32]) {
        for depth in [1, 8] {
            self.round += 1;
            let mut entries = [Vec::new(), Vec::new()];
            let mut expected = Vec::new();
            for (at, nsid) in (0..).zip(namespaces) {
                for block in 0..depth {
                    let data = DATA + (at * 16 + block) * 4096;
                    let byte = self.round ^ (block as u8) << 4 ^ (*nsid as u8) << 2;
                    let place = GuestAddress(data);
                    self.memory.write_slice(&[byte; 512], place).unwrap();
                    let entry = |opcode| Entry::new(opcode).nsid(*nsid).blocks(block, 1);
                    entries[0].push(entry(1).data(data, 0));
                    entries[1].push(entry(2).data(data + 512, 0));
                    expected.push((data + 512, byte));
                }
            }
            self.execute(&entries[0]);
            self.execute(&entries[1]);
            for (address, byte) in expected {
                let mut got = [0; 512];
                let place = GuestAddress(address);
                self.memory.read_slice(&mut got, place).unwrap();
                assert!(got == [byte; 512], "{namespaces:?}: {:#x}", got[0]);
            }
        }
    }
}

/// Runs the worker of queue 1 here, and `guest` beside it; then `after`, on the worker's thread.
fn run(
    subsystem: &Arc<Subsystem>,
    guest: impl FnOnce(&mut Driver<'_>) + Send,
    after: impl FnOnce(),
) {
    let config = NvmeConfig {
        io_queues: 1,
        workers: 1,
        vectors: 2,
        ..NvmeConfig::default()
    };
    let mut seat = Guest::of(subsystem, Vec::new(), config);
    seat.enable();
    seat.create_pair(1, 64);
    let (sq, cq) = queue_addresses(1);
    let mut driver = Driver {
        controller: &seat.controller,
        queue: QueuePair::new(&seat.memory, 1, sq, cq, 64),
        memory: Arc::clone(&seat.memory),
        round: 0,
    };
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut worker = seat.workers.remove(1);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _stop = AtEnd(&stop);
            guest(&mut driver);
        });
        worker
            .run(seat.controller.kick(1).unwrap(), fd(&stop))
            .unwrap();
        after();
        worker.drain().unwrap();
    });
}

/// Ends the worker, also when the guest panics.
struct AtEnd<'a>(&'a EventFd);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.write(1).unwrap();
    }
}

fn subsystem() -> Arc<Subsystem> {
    Subsystem::new(SubsystemConfig::default()).unwrap()
}

fn add(subsystem: &Arc<Subsystem>, disk: Box<dyn AsyncDiskFile>) -> u32 {
    let config = NamespaceConfig {
        lba_size: 512,
        ..NamespaceConfig::default()
    };
    subsystem.add_namespace(disk, &config).unwrap()
}

/// Whether somebody on this thread has asked for the notifier of the engine of `disk`.
fn is_told(disk: &dyn AsyncDiskFile) -> bool {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut io = disk.create_async_io(1).unwrap();
    match io.watch(fd(&event), 1) {
        Ok(()) => false,
        Err(error) if error.kind() == ErrorKind::Unsupported => true,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn disks_of_one_engine_are_waited_for_in_it() {
    let images = [Image::new(), Image::new(), Image::new()];
    let engine = EngineKind::IoUring;
    let Some(other) = Image::new().open(engine) else {
        return;
    };
    let open = |at: usize| images[at].open(engine).unwrap();
    let subsystem = subsystem();
    assert_eq!([add(&subsystem, open(0)), add(&subsystem, open(1))], [1, 2]);
    let guest = |driver: &mut Driver<'_>| {
        driver.use_all(&[1]);
        driver.use_all(&[1, 2]);
        // The disk goes that the worker has been sleeping in.
        subsystem.remove_namespace(1).unwrap();
        driver.use_all(&[2]);
        assert_eq!(add(&subsystem, open(2)), 1);
        driver.use_all(&[2, 1]);
        // All go, and one comes.
        subsystem.remove_namespace(1).unwrap();
        subsystem.remove_namespace(2).unwrap();
        thread::sleep(Duration::from_millis(5));
        assert_eq!(add(&subsystem, open(0)), 1);
        driver.use_all(&[1]);
    };
    run(&subsystem, guest, || assert!(!is_told(&*other)));
}

#[test]
fn disks_of_several_engines_are_waited_for_side_by_side() {
    let images = [Image::new(), Image::new()];
    let (Some(first), Some(other)) = (
        images[0].open(EngineKind::IoUring),
        Image::new().open(EngineKind::IoUring),
    ) else {
        return;
    };
    let second = || images[1].open(EngineKind::Sync).unwrap();
    let subsystem = subsystem();
    assert_eq!(add(&subsystem, first), 1);
    let guest = |driver: &mut Driver<'_>| {
        driver.use_all(&[1]);
        assert_eq!(add(&subsystem, second()), 2);
        driver.use_all(&[1, 2]);
        subsystem.remove_namespace(2).unwrap();
        driver.use_all(&[1]);
        assert_eq!(add(&subsystem, second()), 2);
        driver.use_all(&[2, 1]);
    };
    run(&subsystem, guest, || assert!(is_told(&*other)));
}
