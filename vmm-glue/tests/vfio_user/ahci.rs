//! An AHCI host bus adapter behind the server: found, driven with messages and with the line, reset, and
//! left.

use std::{os::unix::fs::FileExt, thread};

use virtio_devices::{
    ahci::driver::command,
    ahci::regs::{self, cmd, px},
    ata::{DiskConfig, opcode},
};
use vmm_glue::pci::PciFunction;

use crate::{
    ahci_driver::{ABAR, Ahci, DATA, INTX, MSI, port},
    server::ahci,
};

#[test]
fn a_client_finds_the_function_uses_it_and_leaves_it_fresh() {
    let server = ahci();
    for (round, index) in [(1_u8, MSI), (2, INTX)] {
        let mut client = server.client();
        assert_eq!(client.read(7, 0), 0x2922_8086);
        assert_eq!(client.read(7, 8) >> 8, 0x01_0601);
        let region = client.words(5, &[32, 0, ABAR, 0, 0, 0, 0, 0], &[]).unwrap();
        assert_eq!(region[16..24], 0x1000_u64.to_ne_bytes());
        client.map();
        let event = client.interrupt_with(index);
        assert_eq!(client.port(px::CMD) & (cmd::ST | cmd::FRE), 0);
        client.start();
        client.write_sector(round);
        assert_eq!(server.disk.contents()[3 * 512..4 * 512], [round; 512]);
        client.memory.write_all_at(&[0; 512], DATA).unwrap();
        client.read_sector();
        let mut data = [0; 512];
        client.memory.read_exact_at(&mut data, DATA).unwrap();
        assert_eq!(data, [round; 512]);
        assert!(event.read().unwrap() > 0);
        client.call(13, &[], &[]).unwrap();
        assert_eq!(client.port(px::CMD) & (cmd::ST | cmd::FRE), 0);
        client.unmap().unwrap();
    }
}

#[test]
fn the_line_is_signalled_again_until_its_cause_is_gone() {
    let server = ahci();
    let mut client = server.client();
    client.map();
    let line = client.interrupt_with(INTX);
    client.start();
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.until("the command", |it| it.port(px::CI) == 0);
    client.until("the line", |_| line.read().is_ok());
    // The driver has not looked: unmasking tells it again.
    client.words(8, &[20, 1 | 1 << 4, INTX, 0, 1], &[]).unwrap();
    assert!(line.read().is_ok());
    client.finish();
    client.words(8, &[20, 1 | 1 << 4, INTX, 0, 1], &[]).unwrap();
    assert!(line.read().is_err());
}

#[test]
fn the_index_and_data_pair_reaches_every_register() {
    let server = ahci();
    let mut client = server.client();
    // The capability tells where the pair is: BAR 4, dword 4.
    let mut at = u64::from(client.read(7, 0x34) & 0xff);
    while client.read(7, at) & 0xff != 0x12 {
        at = u64::from(client.read(7, at) >> 8 & 0xff);
        assert_ne!(at, 0);
    }
    assert_eq!(client.read(7, at) >> 16, 0x10);
    assert_eq!(client.read(7, at + 4), 0x48);
    assert_eq!(client.read(7, 0x20) & 3, 1);
    let plain = client.read(ABAR, regs::PI);
    client.write_to(4, 0x10, regs::PI as u32);
    assert_eq!(client.read(4, 0x10), regs::PI as u32);
    assert_eq!(client.read(4, 0x14), plain);
    client.write_to(4, 0x10, 0xffff_ffff);
    assert_eq!(client.read(4, 0x10), 0xffc);
    client.write_to(4, 0x10, port(px::CLB) as u32);
    client.write_to(4, 0x14, 0x1234_5400);
    assert_eq!(client.port(px::CLB), 0x1234_5400);
}

#[test]
fn an_unmap_and_a_reset_wait_for_what_is_in_flight() {
    let server = ahci();
    let mut client = server.driver();
    server.disk.hold(true);
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.until("the read", |_| server.disk.held() == 1);
    assert!(!server.function.is_idle());
    let disk = server.disk.clone();
    let release = thread::spawn(move || {
        disk.hold(false);
        disk.release_all();
    });
    client.unmap().unwrap();
    assert_eq!(server.disk.held(), 0);
    release.join().unwrap();
    client.call(13, &[], &[]).unwrap();
    assert!(server.function.is_idle());
}

#[test]
fn a_drive_that_is_plugged_into_a_running_port_is_seen() {
    let server = ahci();
    let mut client = server.driver();
    server.function.hba().unplug(0).unwrap();
    client.until("no link", |it| it.port(px::SSTS) == 0);
    assert_ne!(client.port(px::SERR) & 1 << 16, 0);
    let disk = Box::new(server.disk.clone());
    let config = DiskConfig::of(&*disk);
    server.function.hba().plug_disk(0, disk, config).unwrap();
    client.until("the link", |it| it.port(px::SSTS) & 0xf == 3);
    assert_ne!(client.port(px::SERR) & 1 << 26, 0);
}
