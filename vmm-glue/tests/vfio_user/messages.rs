//! An AHCI adapter in guest memory that it reaches by messages: a disk, and an optical drive.

use std::{
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use virtio_devices::{
    ahci::{driver::command, regs::px},
    ata::opcode,
    testing::{MockDisk, MockDiskConfig},
};

use crate::{
    ahci_driver::{Ahci, DATA, Issue},
    client::Client,
    server::{ahci, ahci_with},
};

/// One sector to the disk and back, with another byte around it.
fn write_and_read(client: &mut Client, byte: u8) {
    client.write_sector(byte);
    client.memory.write_all_at(&[99; 1024], DATA - 256).unwrap();
    client.read_sector();
    let mut data = [0; 1024];
    client.memory.read_exact_at(&mut data, DATA - 256).unwrap();
    let mut expected = [99; 1024];
    expected[256..768].fill(byte);
    assert_eq!(data, expected, "nothing around the sector has changed");
}

#[test]
fn a_disk_is_written_and_read() {
    let server = ahci();
    let mut client = server.driver_by_messages();
    for round in 1..=3 {
        write_and_read(&mut client, round);
        assert_eq!(server.disk.contents()[3 * 512..4 * 512], [round; 512]);
    }
    let [reads, writes] = client.accesses;
    assert!(reads >= 12 && writes >= 9, "{reads} {writes}");
    // More than a message holds, by PIO and by DMA.
    for (code, bytes) in [(opcode::READ_SECTORS, 4096), (opcode::READ_DMA_EXT, 8192)] {
        let before = client.accesses[1];
        let contents: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
        server.disk.write(0, &contents);
        let issue = Issue {
            bytes: bytes as u32,
            ..Issue::default()
        };
        client.issue_on(0, &command(code, 0, (bytes / 512) as u16), issue);
        client.finish();
        let mut data = vec![0; bytes];
        client.memory.read_exact_at(&mut data, DATA).unwrap();
        assert_eq!(data, contents);
        assert!(client.accesses[1] > before + bytes / 1000);
    }
    // Without its memory it does nothing more.
    client.unmap().unwrap();
    let accesses = client.accesses;
    client.issue(&command(opcode::READ_DMA_EXT, 3, 1), false);
    client.until("an error", |it| it.port(px::IS) & 1 << 29 != 0);
    assert_eq!(client.accesses, accesses);
}

#[test]
fn an_optical_drive_answers_packets_and_reads_its_medium() {
    let medium = MockDisk::new(MockDiskConfig::default());
    let contents: Vec<u8> = (0..8192_u32).map(|at| (at % 253) as u8).collect();
    medium.write(0, &contents);
    let server = ahci_with(Some(medium));
    let mut client = server.client();
    client.map_by_messages();
    client.start_on(1);
    let packet = |client: &mut Client, packet: &[u8], bytes: u32, dma: u8| {
        let mut task = command(0xa0, 0, 0);
        task.features = u16::from(dma);
        // The byte count limit, for PIO.
        task.lba = 0xf000 << 8;
        let mut command = [0; 12];
        command[..packet.len()].copy_from_slice(packet);
        let issue = Issue {
            packet: Some(command),
            bytes,
            ..Issue::default()
        };
        client.issue_on(1, &task, issue);
        client.until("the packet", |it| it.register(1, px::CI) == 0);
        let status = client.register(1, px::IS);
        client.set_register(1, px::IS, status);
        client.register(1, px::TFD) & 1 == 0
    };
    // REQUEST SENSE until the drive has nothing to report, then INQUIRY and READ (10), by PIO and DMA.
    for _ in 0..3 {
        assert!(packet(&mut client, &[0x03, 0, 0, 0, 18], 18, 0));
    }
    assert!(packet(&mut client, &[0x12, 0, 0, 0, 36], 36, 0));
    let mut inquiry = [0; 36];
    client.memory.read_exact_at(&mut inquiry, DATA).unwrap();
    assert_eq!(inquiry[0] & 0x1f, 5);
    for dma in [0, 1] {
        client.memory.write_all_at(&[0; 4096], DATA).unwrap();
        let read = [0x28, 0, 0, 0, 0, 1, 0, 0, 2];
        assert!(packet(&mut client, &read, 4096, dma), "dma={dma}");
        let mut data = [0; 4096];
        client.memory.read_exact_at(&mut data, DATA).unwrap();
        assert_eq!(data[..], contents[2048..6144]);
    }
    let [reads, writes] = client.accesses;
    assert!(reads > 12 && writes > 20, "{reads} {writes}");
}

#[test]
fn structures_that_are_mapped_beside_data_that_is_not() {
    let server = ahci();
    let mut client = server.driver_mixed();
    client.write_sector(7);
    assert_eq!(server.disk.contents()[3 * 512..4 * 512], [7; 512]);
    client.read_sector();
    assert_eq!(client.accesses, [1, 1]);
}

#[test]
fn a_client_that_takes_no_data_loses_its_connection_alone() {
    let server = ahci();
    let mut client = server.driver_mixed();
    client.refused_below = u64::MAX;
    client.issue(&command(opcode::READ_DMA_EXT, 3, 1), false);
    let started = Instant::now();
    while !client.is_gone() {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    let mut client = server.driver_by_messages();
    write_and_read(&mut client, 5);
}

/// QEMU reads registers with its machine locked, and answers nothing meanwhile.
#[test]
fn a_register_is_answered_while_its_port_waits_for_who_reads_it() {
    let server = ahci();
    let mut client = server.driver_by_messages();
    // The signature of the drive is in memory, too, when this has ended.
    write_and_read(&mut client, 4);
    let before = server.disk.log().len();
    client.deaf = true;
    client.issue(&command(opcode::READ_DMA_EXT, 3, 1), false);
    let started = Instant::now();
    while !client.has_message() {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    // The port waits for its command, the register for the port, the client for the register.
    client.port(px::SIG);
    client.deaf = false;
    client.until("an error", |it| it.port(px::IS) & 1 << 29 != 0);
    assert_eq!(server.disk.log().len(), before, "it was not begun");
    // It costs that command alone.
    client.set_port(px::CMD, 0);
    client.start();
    write_and_read(&mut client, 5);
}
