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
