//! Interrupts, coalescing, save and restore, a worker on its own thread.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use virtio_devices::{
    ahci::{
        HbaConfig, HbaState, Quirks,
        driver::{Driver, Issue, command, queued},
        regs::{self, is, px},
    },
    ata::opcode,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::{DATA, Machine, Setup, pattern};

#[test]
fn messages_and_the_line() {
    let mut machine = Machine::new(Setup::default());
    let messages = |machine: &Machine| machine.sink.messages.load(Ordering::Acquire);
    let line = |machine: &Machine| machine.sink.line.load(Ordering::Acquire);
    let flush = command(opcode::FLUSH_CACHE, 0, 0);
    let before = messages(&machine);
    machine.plain(flush).ok();
    assert_eq!((messages(&machine) - before, line(&machine)), (1, true));
    assert_eq!(machine.driver.global(regs::IS), 1);
    // Clearing IS while PxIS is set brings it back, and tells it again.
    machine.driver.set_global(regs::IS, 1);
    assert_eq!(machine.driver.global(regs::IS), 1);
    assert_eq!(messages(&machine) - before, 2);
    machine.driver.set(px::IS, u32::MAX);
    assert!(line(&machine), "IS is a latch");
    machine.driver.set_global(regs::IS, 1);
    assert!(!line(&machine));
    // Masked in PxIE, then in GHC.
    machine.driver.set(px::IE, 0);
    machine.plain(flush).ok();
    assert_eq!(messages(&machine) - before, 2);
    machine.driver.set(px::IE, 1);
    assert_eq!(messages(&machine) - before, 3);
    machine.driver.set(px::IS, u32::MAX);
    machine.driver.set_global(regs::IS, 1);
    machine.driver.set_global(regs::GHC, 0x8000_0000);
    machine.plain(flush).ok();
    assert_eq!((messages(&machine) - before, line(&machine)), (3, false));
    machine.driver.set_global(regs::GHC, 0x8000_0002);
    assert_eq!((messages(&machine) - before, line(&machine)), (4, true));
    let stats = machine.hba.stats(0).unwrap();
    assert_eq!(
        (stats.interrupts(), stats.interrupt_errors()),
        (1, 0),
        "by completions"
    );
}

#[test]
fn descriptors_ask_for_interrupts() {
    let mut machine = Machine::new(Setup::default());
    let flagged = |machine: &mut Machine| {
        machine.driver.prepare(
            0,
            &Issue {
                task: command(opcode::READ_DMA_EXT, 0, 1),
                data: &[(DATA, 512)],
                ..Issue::default()
            },
        );
        let at = machine.driver.layout().table(0) + 0x80 + 15;
        machine.driver.put(at, &[0x80]);
        machine.driver.issue();
        machine.work();
        machine.outcome(0).ok().is & is::DPS
    };
    assert_eq!(flagged(&mut machine), is::DPS);
    let mut machine = Machine::new(Setup {
        hba: HbaConfig {
            quirks: Quirks {
                register_after_pio_in: true,
                no_descriptor_interrupt: true,
                wide_counts: true,
            },
            ..HbaConfig::default()
        },
        ..Setup::default()
    });
    assert_eq!(flagged(&mut machine), 0);
    let end = machine
        .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
        .ok();
    assert_eq!(end.is, is::PSS | is::DHRS);
    assert_eq!(machine.register_fis()[..3], [0x34, 0x40, 0x50]);
}

#[test]
fn coalesced_completions() {
    let mut machine = Machine::new(Setup::default());
    assert_ne!(machine.driver.global(regs::CAP) & 1 << 7, 0);
    assert_eq!(
        machine.driver.global(regs::CCC_CTL),
        0x0001_0130,
        "one, 1 ms, bit 6"
    );
    machine.driver.set(px::IE, 0);
    machine.driver.set_global(regs::CCC_PORTS, 1);
    // Three completions or 20 ms.
    machine
        .driver
        .set_global(regs::CCC_CTL, 20 << 16 | 3 << 8 | 1);
    machine
        .driver
        .set_global(regs::CCC_CTL, 99 << 16 | 9 << 8 | 1);
    assert_eq!(
        machine.driver.global(regs::CCC_CTL),
        20 << 16 | 3 << 8 | 6 << 3 | 1,
        "fixed while on"
    );
    let flush = command(opcode::FLUSH_CACHE, 0, 0);
    for _ in 0..2 {
        machine.plain(flush).ok();
        assert_eq!(machine.driver.global(regs::IS), 0);
    }
    machine.plain(flush).ok();
    assert_eq!(machine.driver.global(regs::IS), 1 << 6);
    machine.driver.set_global(regs::IS, 1 << 6);
    machine.plain(flush).ok();
    assert_eq!(machine.driver.global(regs::IS), 0);
    let start = Instant::now();
    while machine.driver.global(regs::IS) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(2));
        machine.work();
    }
    assert!(start.elapsed() >= Duration::from_millis(10));
}

#[test]
fn save_and_restore() {
    let mut machine = Machine::new(Setup::default());
    let data = pattern(4096, 6);
    machine.driver.put(DATA, &data);
    machine
        .write(command(opcode::WRITE_DMA_EXT, 0, 8), 4096)
        .ok();
    machine.plain(command(opcode::SET_MULTIPLE_MODE, 0, 8)).ok();
    // One command in flight: not without draining.
    machine.disk.hold(true);
    machine.read(queued(0, false, 0, 8), 4096);
    assert!(machine.hba.save().is_err());
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.worker.drain().unwrap();
    // And one that was issued and not taken.
    machine.driver.set(px::IS, u32::MAX);
    machine.driver.prepare(
        3,
        &Issue {
            task: command(opcode::READ_DMA_EXT, 0, 8),
            data: &[(DATA + 8192, 4096)],
            ..Issue::default()
        },
    );
    machine.driver.issue();
    let text = serde_json::to_string(&machine.hba.save().unwrap()).unwrap();
    let state: HbaState = serde_json::from_str(&text).unwrap();
    let mut other = Machine::cold(Setup::default());
    other.disk.write(0, &machine.disk.contents());
    // Guest memory moves too.
    other
        .driver
        .put(0, &machine.driver.take(0, crate::common::MEMORY));
    other.hba.restore(&state).unwrap();
    assert_eq!(other.hba.save().unwrap(), state);
    other.work();
    assert_eq!(other.driver.get(px::CI), 0);
    assert_eq!(other.driver.take(DATA + 8192, 4096), data);
    assert!(other.sink.line.load(Ordering::Acquire));
    other.read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512).ok();
    assert_eq!(other.data(512)[118], 8, "SET MULTIPLE MODE");
    // Not with values that no driver and no time leads to.
    let good = serde_json::to_value(&state).unwrap();
    for (path, value) in [
        ("/version", 9),
        ("/ports/0/drive/Disk/multiple", 3),
        ("/ports/0/drive/Disk/counters/reads", u64::MAX),
        ("/ports/0/drive/Disk/geometry/0", 0),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value.into();
        let bad: HbaState = serde_json::from_value(bad).unwrap();
        assert!(other.hba.restore(&bad).is_err(), "{path}");
    }
    // Not into another machine.
    other.hba.unplug(0).unwrap();
    assert!(other.hba.restore(&state).is_err());
}

#[test]
fn coalesced_completions_that_were_not_told_are_told_elsewhere() {
    let mut machine = Machine::new(Setup::default());
    machine.driver.set(px::IE, 0);
    machine.driver.set_global(regs::CCC_PORTS, 1);
    // Three completions or a minute, then three or ten milliseconds.
    for (time, counted, told) in [(60_000, 2, false), (10, 1, true)] {
        machine.driver.set_global(regs::CCC_CTL, 0);
        let control = time << 16 | 3 << 8 | 1;
        machine.driver.set_global(regs::CCC_CTL, control);
        let flush = command(opcode::FLUSH_CACHE, 0, 0);
        for _ in 0..counted {
            machine.plain(flush).ok();
        }
        machine.worker.drain().unwrap();
        let state = machine.hba.save().unwrap();
        let mut other = Machine::cold(Setup::default());
        let memory = machine.driver.take(0, crate::common::MEMORY);
        other.driver.put(0, &memory);
        other.hba.restore(&state).unwrap();
        assert_eq!(other.hba.save().unwrap(), state);
        if told {
            // Nothing else ends: it is the time that tells.
            let start = Instant::now();
            while other.driver.global(regs::IS) == 0 {
                assert!(start.elapsed() < Duration::from_secs(10), "never told");
                std::thread::sleep(Duration::from_millis(2));
                other.work();
            }
        } else {
            other.work();
            assert_eq!(other.driver.global(regs::IS), 0);
            // The third.
            other.plain(flush).ok();
        }
        assert_eq!(other.driver.global(regs::IS), 1 << 6);
    }
}

#[test]
fn a_worker_that_sleeps_is_woken() {
    let mut machine = Machine::new(Setup::default());
    let doorbell = machine.hba.doorbell(0).unwrap();
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let stopping = stop.try_clone().unwrap();
    let (hba, memory) = (Arc::clone(&machine.hba), Arc::clone(&machine.memory));
    drop(machine.worker);
    let kick = Arc::clone(&doorbell);
    let thread = std::thread::spawn(move || {
        let mut worker = hba.port_worker(0, memory).unwrap();
        worker.run(as_fd(&kick), as_fd(&stop)).unwrap();
        worker.drain().unwrap();
    });
    for round in 0..50u8 {
        let data = pattern(4096, round);
        machine.driver.put(DATA, &data);
        exchange(&mut machine.driver, true);
        machine.driver.put(DATA, &[0; 4096]);
        exchange(&mut machine.driver, false);
        assert_eq!(machine.driver.take(DATA, 4096), data);
    }
    stopping.write(1).unwrap();
    thread.join().unwrap();
}

fn exchange(driver: &mut Driver<crate::common::Memory>, write: bool) {
    driver.prepare(
        1,
        &Issue {
            task: queued(1, write, 40, 8),
            write,
            data: &[(DATA, 4096)],
            ..Issue::default()
        },
    );
    driver.issue();
    let start = Instant::now();
    while driver.ended() == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing ended");
        std::thread::yield_now();
    }
}

pub fn as_fd(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open for as long as `event` lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
