//! The device over real images and every engine, driven by worker threads as a server would.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    thread,
};

use block::{AsyncDiskFile, DiskFile, Format, OpenOptions, io::EngineKind};
use common::{DATA, Memory, OK, Random, memory};
use tempfile::NamedTempFile;
use virtio_devices::{
    Interrupt,
    testing::CountingInterrupt,
    virtio_blk::{
        VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig, Range},
    },
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u64 = 8 << 20;
/// Bytes of the disk that each queue has for itself.
const SHARE: u64 = SIZE / 2;

fn open(image: &NamedTempFile, engine: EngineKind) -> Option<Box<dyn AsyncDiskFile>> {
    let direct = engine == EngineKind::LinuxAio;
    OpenOptions::new()
        .format(Format::Raw)
        .engine(engine)
        .direct(direct)
        .open(image.path())
        .inspect_err(|error| println!("{}: not run: {error}", engine.name()))
        .ok()
}

fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A guest on one queue: random writes, zeroes, discards, flushes and reads of its share of the
/// disk, several in flight, checked against a model. Returns the model.
fn guest(driver: &mut Driver, memory: &Memory, queue: u64, kick: &EventFd) -> Vec<u8> {
    let mut random = Random::seeded(queue + 77);
    let mut model = vec![0u8; SHARE as usize];
    let base = queue * SHARE / 512;
    let buffers = DATA + queue * 0x10_0000;
    for round in 0..20 {
        // Requests of one round are in places of their own, so their order is free.
        let mut reads = Vec::new();
        for index in 0..12u64 {
            let sectors = 1 + random.below(16);
            let sector = 1024 * (index % 8) + 16 * random.below(30) + 512 * (index / 8);
            let at = buffers + 8192 * index;
            let len = (sectors * 512) as usize;
            let bytes = (sector * 512) as usize..(sector * 512) as usize + len;
            let data = [(GuestAddress(at), len as u32)];
            match random.below(8) {
                0..3 => {
                    let byte = random.next() as u8;
                    memory
                        .write_slice(&vec![byte; len], GuestAddress(at))
                        .unwrap();
                    driver.write(base + sector, &data).unwrap();
                    model[bytes].fill(byte);
                }
                3 => {
                    let flags = random.below(2) as u32;
                    let (sector, sectors) = (base + sector, sectors as u32);
                    let range = Range {
                        sector,
                        sectors,
                        flags,
                    };
                    driver.write_zeroes(&[range]).unwrap();
                    model[bytes].fill(0);
                }
                4 => {
                    driver.flush().unwrap();
                }
                _ => {
                    driver.read(base + sector, &data).unwrap();
                    reads.push((at, bytes));
                }
            }
        }
        let mut left = driver.in_flight();
        if driver.publish() {
            kick.write(1).unwrap();
        }
        while left > 0 {
            left -= driver.poll(|used| assert_eq!(used.status, OK, "round {round}"));
            thread::yield_now();
        }
        for (at, bytes) in reads {
            let mut got = vec![0; bytes.len()];
            memory.read_slice(&mut got, GuestAddress(at)).unwrap();
            assert_eq!(got, model[bytes], "queue {queue} round {round}");
        }
    }
    model
}

fn drive(disk: Box<dyn AsyncDiskFile>, write_back: bool) -> Vec<u8> {
    let config = VirtioBlkConfig {
        num_queues: 2,
        write_back,
        pin_memory: write_back,
        ..VirtioBlkConfig::default()
    };
    let device = VirtioBlk::new(disk, config).unwrap();
    device.ack_features(device.features()).unwrap();
    let memory = memory();
    let line: Arc<dyn Interrupt> = Arc::new(CountingInterrupt::new(2).unwrap());
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let kicks: Vec<EventFd> = (0..2)
        .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
        .collect();
    let mut drivers: Vec<Driver> = (0..2u64)
        .map(|queue| {
            let base = GuestAddress(queue * 0x8_0000);
            let config = DriverConfig {
                indirect: queue == 1,
                ..DriverConfig::default()
            };
            Driver::new(&memory, base, config).unwrap()
        })
        .collect();
    let queues: Vec<_> = drivers.iter().map(Driver::queue).collect();
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..2u16)
            .map(|index| {
                let (device, memory, line) = (&device, Arc::clone(&memory), Arc::clone(&line));
                let (queue, kick, stop) = (
                    &queues[usize::from(index)],
                    &kicks[usize::from(index)],
                    &stop,
                );
                scope.spawn(move || {
                    let mut worker = device.queue_worker(index, queue, memory, line).unwrap();
                    worker.run(borrowed(kick), borrowed(stop)).unwrap();
                    worker.stop().unwrap()
                })
            })
            .collect();
        let guests: Vec<_> = drivers
            .iter_mut()
            .enumerate()
            .map(|(index, driver)| {
                let (memory, kick) = (&*memory, &kicks[index]);
                scope.spawn(move || guest(driver, memory, index as u64, kick))
            })
            .collect();
        let models = guests
            .into_iter()
            .map(|guest| guest.join().unwrap())
            .collect();
        stop.write(1).unwrap();
        for worker in workers {
            let state = worker.join().unwrap();
            assert_eq!(state.next_avail, state.next_used);
        }
        models
    });
    device.flush().unwrap();
    models.concat()
}

#[test]
fn every_engine_serves_two_queues_on_threads_of_their_own() {
    for engine in EngineKind::ALL {
        // Write-through costs a sync a write; once is enough.
        let modes: &[bool] = match engine {
            EngineKind::IoUring => &[true, false],
            _ => &[true],
        };
        for &write_back in modes {
            let image = NamedTempFile::new().unwrap();
            File::set_len(image.as_file(), SIZE).unwrap();
            let Some(disk) = open(&image, engine) else {
                continue;
            };
            let model = drive(disk, write_back);
            let disk = open(&image, EngineKind::Sync).unwrap();
            let mut contents = vec![0; SIZE as usize];
            DiskFile::read_at(&*disk, &mut contents, 0).unwrap();
            assert!(
                contents == model,
                "{} write_back {write_back}",
                engine.name()
            );
        }
    }
}
