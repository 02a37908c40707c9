//! Queued commands.

use block::ErrorKind;
use virtio_devices::{
    ahci::{
        driver::{Issue, command, queued},
        regs::{is, px},
    },
    ata::opcode,
    testing::Logged,
};

use crate::common::{DATA, Machine, Setup, pattern};

#[test]
fn write_and_read_back() {
    let mut machine = Machine::new(Setup::default());
    let data = pattern(4096, 1);
    machine.driver.put(DATA, &data);
    let end = machine.write(queued(0, true, 3, 8), 4096).ok();
    assert_eq!(end.is, is::SDBS);
    machine.driver.put(DATA, &[0; 4096]);
    machine.read(queued(0, false, 3, 8), 4096).ok();
    assert_eq!(machine.data(4096), data);
}

#[test]
fn all_tags_are_one_batch_and_one_interrupt() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    for tag in 0..32u8 {
        let at = DATA + u64::from(tag) * 4096;
        machine.driver.put(at, &pattern(4096, tag));
        machine.driver.prepare(
            u32::from(tag),
            &Issue {
                task: queued(tag, true, u64::from(tag) * 8, 8),
                write: true,
                data: &[(at, 4096)],
                ..Issue::default()
            },
        );
    }
    machine.disk.clear_log();
    machine.driver.issue();
    machine.work();
    assert_eq!(machine.disk.batches(), [32]);
    assert_eq!(machine.driver.get(px::CI), 0, "all accepted");
    assert_eq!(machine.driver.get(px::SACT), u32::MAX);
    let before = machine
        .sink
        .messages
        .load(std::sync::atomic::Ordering::Acquire);
    // In another order.
    for at in [5, 0, 7, 20] {
        machine.disk.release(at);
    }
    machine.disk.release_all();
    machine.work();
    let after = machine
        .sink
        .messages
        .load(std::sync::atomic::Ordering::Acquire);
    assert_eq!(after - before, 1);
    assert_eq!(machine.driver.ended(), u32::MAX);
    let fis = machine
        .driver
        .take(machine.driver.layout().received() + 0x58, 8);
    assert_eq!(fis, [0xa1, 0x40, 0x50, 0, 0xff, 0xff, 0xff, 0xff]);
    for tag in 0..32 {
        let contents = machine.disk.contents();
        assert_eq!(contents[tag * 4096..][..4096], pattern(4096, tag as u8));
    }
}

#[test]
fn an_error_ends_the_queue_until_the_log_is_read() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.fail_with(|op| match op {
        Logged::Read { offset: 8192, .. } => Some(ErrorKind::Io(5)),
        _ => None,
    });
    for tag in 0..4u8 {
        machine.driver.prepare(
            u32::from(tag),
            &Issue {
                task: queued(tag, false, u64::from(tag) * 8, 8),
                data: &[(DATA + u64::from(tag) * 4096, 4096)],
                ..Issue::default()
            },
        );
    }
    machine.driver.set(px::IS, u32::MAX);
    machine.driver.issue();
    machine.work();
    let end = machine.outcome(0).failed(0x40);
    assert_eq!(end.sact, 1 << 2, "the others ended well before");
    machine.recover();
    // Refused until the log is read.
    machine.read(queued(0, false, 0, 8), 4096).failed(0x04);
    machine.recover();
    let log = command(opcode::READ_LOG_EXT, 0x10, 1);
    machine.read(log, 512).ok();
    let page = machine.data(512);
    assert_eq!((page[0], page[2], page[3]), (2, 0x51, 0x40));
    assert_eq!(page[4], 16, "the address of the command");
    assert_eq!(
        page.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)),
        0
    );
    machine.read(queued(0, false, 0, 8), 4096).ok();
}

#[test]
fn a_command_that_is_not_queued_ends_the_queue() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    machine.driver.prepare(
        3,
        &Issue {
            task: queued(3, false, 0, 8),
            data: &[(DATA, 4096)],
            ..Issue::default()
        },
    );
    machine.driver.issue();
    machine.work();
    machine
        .plain(command(opcode::FLUSH_CACHE_EXT, 0, 0))
        .failed(4);
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.work();
    assert_eq!(
        machine.driver.get(px::SACT),
        1 << 3,
        "it is never told to have ended"
    );
    machine.recover();
    machine
        .read(command(opcode::READ_LOG_DMA_EXT, 0x10, 1), 512)
        .ok();
    assert_eq!(machine.data(1), [0x80]);
}

#[test]
fn a_tag_that_is_not_its_slot_is_refused() {
    let mut machine = Machine::new(Setup::default());
    machine.read(queued(1, false, 0, 8), 4096).failed(4);
}
