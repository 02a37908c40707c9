//! What the command register allows: DMA, messages, the line.

use std::{
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use virtio_devices::{
    ahci::{driver::command, regs::px},
    ata::{DiskConfig, opcode},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    ahci_driver::{Ahci, DATA, INTX, MSI},
    client::{CONFIG, Client, MASTER},
    nvme_driver::Nvme,
    server::{ahci, nvme},
};

/// Memory, but no bus master.
const MEMORY_ONLY: u32 = 2;
const NO_LINE: u32 = 1 << 10;

/// Long enough for a device to do what it must not do.
fn wait() {
    thread::sleep(Duration::from_millis(60));
}

fn has_ended(client: &Client, queue: u64, index: u64) -> bool {
    let mut entry = [0; 16];
    let at = queue * 0x2000 + 0x1000 + index * 16;
    client.memory.read_exact_at(&mut entry, at).unwrap();
    entry[14] & 1 != 0
}

#[test]
fn a_controller_takes_nothing_until_it_may() {
    let server = nvme();
    let mut client = server.driver();
    client.set_command(MEMORY_ONLY);
    client.post(1, 0, &Client::io(1));
    client.write(0x1008, 1);
    wait();
    assert!(!has_ended(&client, 1, 0));
    assert_eq!(server.disk.held(), 0);
    // Registers work meanwhile, and a reset; what was rung before is gone then.
    assert_eq!(client.read(0, 0x1c) & 1, 1);
    client.set_command(MASTER);
    client.until("the write", |it| has_ended(it, 1, 0));
    client.set_command(MEMORY_ONLY);
    client.write(0x14, 0);
    client.until("the reset", |it| it.read(0, 0x1c) & 1 == 0);
    client.write(0x14, 0x0046_0001);
    client.until("ready", |it| it.read(0, 0x1c) & 1 != 0);
    client.enable_again();
    client.create_queues();
    assert_eq!(client.transfer(0, 2), 0);
}

#[test]
fn what_was_begun_ends_before_the_bit_reads_as_clear() {
    let server = nvme();
    let mut client = server.driver();
    let message = EventFd::new(EFD_NONBLOCK).unwrap();
    let fds = [message.as_raw_fd()];
    client
        .words(8, &[20, 1 << 2 | 1 << 5, 2, 1, 1], &fds)
        .unwrap();
    server.disk.hold(true);
    client.post(1, 0, &Client::io(2));
    client.write(0x1008, 1);
    client.until("the read", |_| server.disk.held() == 1);
    let released = Arc::new(AtomicBool::new(false));
    let (disk, done) = (server.disk.clone(), Arc::clone(&released));
    let release = thread::spawn(move || {
        wait();
        done.store(true, Ordering::SeqCst);
        disk.hold(false);
        disk.release_all();
    });
    client.set_command(MEMORY_ONLY);
    assert!(released.load(Ordering::SeqCst), "answered too early");
    release.join().unwrap();
    assert!(has_ended(&client, 1, 0));
    assert!(message.read().is_ok(), "its message was sent before");
    client.post(1, 1, &Client::io(2));
    client.write(0x1008, 2);
    wait();
    assert!(!has_ended(&client, 1, 1) && message.read().is_err());
    client.set_command(MASTER);
    client.until("the read", |it| has_ended(it, 1, 1));
    client.until("its message", |_| message.read().is_ok());
}

#[test]
fn an_adapter_takes_nothing_until_it_may() {
    let server = ahci();
    let mut client = server.driver();
    client.set_command(MEMORY_ONLY);
    client.memory.write_all_at(&[7; 512], DATA).unwrap();
    client.issue(&command(opcode::WRITE_DMA_EXT, 3, 1), true);
    wait();
    assert_eq!(client.port(px::CI), 1);
    // As Linux does it: the adapter is reset before it may access memory.
    client.write_to(5, 4, 1 << 31 | 1);
    client.until("the reset", |it| it.read(5, 4) & 1 == 0);
    assert_eq!(client.port(px::CI), 0);
    client.set_command(MASTER);
    client.start();
    client.issue(&command(opcode::WRITE_DMA_EXT, 3, 1), true);
    client.finish();
    assert_eq!(server.disk.contents()[3 * 512..4 * 512], [7; 512]);
}

#[test]
fn a_message_waits_for_the_bit_and_the_line_does_not() {
    for (index, waits) in [(MSI, true), (INTX, false)] {
        let server = ahci();
        let mut client = server.client();
        client.map();
        let event = client.interrupt_with(index);
        client.start();
        client.set_command(MEMORY_ONLY);
        while event.read().is_ok() {}
        // Hot plug needs no DMA.
        server.function.hba().unplug(0).unwrap();
        let disk = Box::new(server.disk.clone());
        let config = DiskConfig::of(&*disk);
        server.function.hba().plug_disk(0, disk, config).unwrap();
        assert_eq!(event.read().is_err(), waits);
        client.set_command(MASTER);
        assert_eq!(event.read().is_ok(), waits);
    }
}

#[test]
fn a_line_that_is_disabled_is_not_raised() {
    let server = ahci();
    let mut client = server.client();
    client.map();
    let line = client.interrupt_with(INTX);
    client.start();
    client.set_command(MASTER | NO_LINE);
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.until("the command", |it| it.port(px::CI) == 0);
    // The status register shows it all the same.
    client.until("the status", |it| it.read(CONFIG, 4) >> 16 & 1 << 3 != 0);
    assert!(line.read().is_err());
    client.set_command(MASTER);
    assert!(line.read().is_ok());
    client.finish();
    assert_eq!(client.read(CONFIG, 4) >> 16 & 1 << 3, 0);
}

#[test]
fn a_reset_takes_the_bit_away() {
    let server = nvme();
    let mut client = server.client();
    client.map();
    client.enable();
    client.call(13, &[], &[]).unwrap();
    assert_eq!(client.read(CONFIG, 4) & 6, 0);
    client.enable();
    assert_eq!(client.identify(0), 0);
}
