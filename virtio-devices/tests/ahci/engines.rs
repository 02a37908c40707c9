//! Real images and every engine, the worker on a thread of its own, and drives that come and go.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use block::{AsyncDiskFile, Format, OpenOptions, io::EngineKind};
use tempfile::NamedTempFile;
use virtio_devices::{
    ahci::{
        Hba, HbaConfig,
        driver::{Driver, Issue, Layout, command, queued},
        regs::{cmd, px},
    },
    ata::{DiskConfig, opcode},
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    common::{BASE, DATA, MEMORY, Memory, pattern},
    life::as_fd,
};

const SIZE: u64 = 4 << 20;

fn image() -> NamedTempFile {
    let image = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(SIZE).unwrap();
    image
}

fn open(image: &NamedTempFile, engine: EngineKind) -> Option<Box<dyn AsyncDiskFile>> {
    OpenOptions::new()
        .format(Format::Raw)
        .engine(engine)
        .direct(engine == EngineKind::LinuxAio)
        .open(image.path())
        .inspect_err(|error| println!("{}: not run: {error}", engine.name()))
        .ok()
}

#[test]
fn every_engine() {
    for engine in [EngineKind::Sync, EngineKind::IoUring, EngineKind::LinuxAio] {
        let image = image();
        let Some(disk) = open(&image, engine) else {
            continue;
        };
        drive(&*disk);
        // What was written is in the file.
        let data = std::fs::read(image.path()).unwrap();
        for tag in 0..32usize {
            assert_eq!(data[tag * 8192..][..8192], pattern(8192, tag as u8 ^ 0x40));
        }
    }
}

fn drive(disk: &dyn AsyncDiskFile) {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    let hba = Arc::new(Hba::new(HbaConfig::default()).unwrap());
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let stopping = stop.try_clone().unwrap();
    let thread = {
        let (hba, memory) = (Arc::clone(&hba), Arc::clone(&memory));
        std::thread::spawn(move || {
            let doorbell = hba.doorbell(0).unwrap();
            let mut worker = hba.port_worker(0, memory).unwrap();
            worker.run(as_fd(&doorbell), as_fd(&stop)).unwrap();
            worker.drain().unwrap();
        })
    };
    // The worker runs before there is a drive.
    let config = DiskConfig::of(disk);
    let layout = Layout {
        base: BASE,
        descriptors: 4,
    };
    let mut driver = Driver::new(Arc::clone(&hba), 0, memory, layout);
    driver.receive();
    hba.plug_disk(0, disk.clone_async(), config.clone())
        .unwrap();
    wait(|| driver.get(px::TFD) == 0x150);
    driver.set(px::SERR, u32::MAX);
    driver.start();
    for round in 0..4u8 {
        transfer(&mut driver, true, round);
        transfer(&mut driver, false, round);
        if round == 1 {
            // Out and in again.
            hba.unplug(0).unwrap();
            driver.stop();
            wait(|| driver.get(px::CMD) & cmd::CR == 0);
            hba.plug_disk(0, disk.clone_async(), config.clone())
                .unwrap();
            driver.set(px::SERR, u32::MAX);
            driver.start();
        }
    }
    transfer(&mut driver, true, 0x40);
    driver.prepare(
        0,
        &Issue {
            task: command(opcode::FLUSH_CACHE_EXT, 0, 0),
            ..Issue::default()
        },
    );
    driver.issue();
    finish(&mut driver, 1);
    hba.unplug(0).unwrap();
    stopping.write(1).unwrap();
    thread.join().unwrap();
}

/// 32 queued commands of 8 KiB.
fn transfer(driver: &mut Driver<Memory>, write: bool, round: u8) {
    for tag in 0..32u8 {
        let at = DATA + u64::from(tag) * 16384;
        if write {
            driver.put(at, &pattern(8192, tag ^ round));
        } else {
            driver.put(at, &[0; 8192]);
        }
        driver.prepare(
            u32::from(tag),
            &Issue {
                task: queued(tag, write, u64::from(tag) * 16, 16),
                write,
                data: &[(at, 4096), (at + 4096, 4096)],
                ..Issue::default()
            },
        );
    }
    driver.issue();
    finish(driver, u32::MAX);
    for tag in 0..32u8 {
        let at = DATA + u64::from(tag) * 16384;
        assert_eq!(driver.take(at, 8192), pattern(8192, tag ^ round));
    }
}

fn finish(driver: &mut Driver<Memory>, slots: u32) {
    let mut ended = 0;
    wait(|| {
        ended |= driver.ended();
        assert_eq!(driver.get(px::TFD) & 1, 0);
        ended == slots
    });
}

fn wait(mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it takes too long"
        );
        std::thread::yield_now();
    }
}

/// The host resizes while the port is busy: what is in flight ends, and IDENTIFY shows the new size.
#[test]
fn a_disk_is_resized_under_load() {
    let image = image();
    let disk = open(&image, EngineKind::IoUring)
        .or_else(|| open(&image, EngineKind::Sync))
        .unwrap();
    let mut machine = crate::common::Machine::new(crate::common::Setup::default());
    let hba = Arc::clone(&machine.hba);
    machine.driver.stop();
    machine.work();
    let config = DiskConfig::of(&*disk);
    hba.plug_disk(0, disk, config).unwrap();
    machine.work();
    machine.driver.set(px::SERR, u32::MAX);
    machine.driver.start();
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let stopping = stop.try_clone().unwrap();
    let memory = Arc::clone(&machine.memory);
    drop(machine.worker);
    let thread = {
        let hba = Arc::clone(&hba);
        std::thread::spawn(move || {
            let doorbell = hba.doorbell(0).unwrap();
            let mut worker = hba.port_worker(0, memory).unwrap();
            worker.run(as_fd(&doorbell), as_fd(&stop)).unwrap();
            worker.drain().unwrap();
        })
    };
    let (done, resized) = std::sync::mpsc::channel();
    let resizer = {
        let hba = Arc::clone(&hba);
        std::thread::spawn(move || {
            for round in 1..=20u64 {
                hba.resize_disk(0, SIZE + round * 512).unwrap();
            }
            done.send(()).unwrap();
        })
    };
    let mut round = 0u8;
    let started = Instant::now();
    while resized.try_recv().is_err() {
        assert!(started.elapsed() < Duration::from_secs(60), "resize hangs");
        transfer(&mut machine.driver, true, round);
        transfer(&mut machine.driver, false, round);
        round = round.wrapping_add(1);
    }
    resizer.join().unwrap();
    machine.driver.prepare(
        0,
        &Issue {
            task: command(opcode::IDENTIFY_DEVICE, 0, 0),
            data: &[(DATA, 512)],
            ..Issue::default()
        },
    );
    machine.driver.issue();
    finish(&mut machine.driver, 1);
    let sectors = machine.driver.take(DATA + 200, 8);
    let expected = (SIZE + 20 * 512) / 512;
    assert_eq!(u64::from_le_bytes(sectors.try_into().unwrap()), expected);
    assert_eq!(hba.disk_size(0), Some(expected * 512));
    assert!(hba.resize_disk(0, 1000).is_err());
    assert!(hba.resize_disk(0, 0).is_err());
    assert!(hba.resize_disk(1, SIZE).is_err(), "an empty port");
    assert!(hba.resize_disk(99, SIZE).is_err());
    stopping.write(1).unwrap();
    thread.join().unwrap();
}
