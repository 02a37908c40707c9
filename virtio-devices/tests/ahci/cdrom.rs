//! Optical drives behind PACKET.

use std::sync::{Arc, Mutex};

use block::ErrorKind;
use virtio_devices::{
    ahci::{
        HbaConfig, OpticalConfig,
        driver::{Issue, command},
        regs::{is, px},
    },
    ata::{TaskFile, opcode},
    mmc::{self, opcode as mmc_code},
    testing::{MockDisk, MockDiskConfig},
};

use crate::common::{DATA, Machine, Outcome, Setup, pattern};

const SECTORS: u64 = 16;

fn medium(sectors: u64) -> MockDisk {
    let disk = MockDisk::new(MockDiskConfig {
        size: sectors * 2048,
        ..MockDiskConfig::default()
    });
    disk.write(0, &pattern(sectors as usize * 2048, 9));
    disk
}

/// A machine whose port 0 is an optical drive with a medium.
fn machine() -> (Machine, MockDisk) {
    let mut machine = Machine::cold(Setup {
        hba: HbaConfig::default(),
        ..Setup::default()
    });
    let disc = medium(SECTORS);
    machine
        .hba
        .plug_optical(0, Some(Box::new(disc.clone())), OpticalConfig::default())
        .unwrap();
    machine.start();
    (machine, disc)
}

fn packet(dma: bool, limit: u16) -> TaskFile {
    let mut task = command(opcode::PACKET, u64::from(limit) << 8, 0);
    task.features = u16::from(dma);
    task
}

fn cdb(bytes: &[u8]) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..bytes.len()].copy_from_slice(bytes);
    cdb
}

fn send(machine: &mut Machine, task: TaskFile, packet: [u8; 16], len: u32) -> Outcome {
    let data = [(DATA, len)];
    machine.run(&Issue {
        task,
        packet: Some(packet),
        data: if len == 0 { &[] } else { &data },
        ..Issue::default()
    })
}

fn read10(lba: u32, sectors: u16) -> [u8; 16] {
    let mut packet = cdb(&[mmc_code::READ_10]);
    packet[2..6].copy_from_slice(&lba.to_be_bytes());
    packet[7..9].copy_from_slice(&sectors.to_be_bytes());
    packet
}

/// Sense key, code and qualifier.
fn sense(machine: &mut Machine) -> (u8, u8, u8) {
    if machine.driver.get(px::TFD) & 1 != 0 {
        machine.recover();
    }
    let request = cdb(&[mmc_code::REQUEST_SENSE, 0, 0, 0, 18]);
    send(machine, packet(false, 2048), request, 18).ok();
    let data = machine.data(18);
    assert_eq!((data[0], data[7]), (0x70, 10));
    (data[2], data[12], data[13])
}

fn fails(machine: &mut Machine, packet_bytes: [u8; 16], want: (u8, u8, u8)) {
    send(machine, packet(true, 0), packet_bytes, 4096).failed(want.0 << 4);
    assert_eq!(sense(machine), want, "{packet_bytes:x?}");
}

#[test]
fn the_signature_and_identify_packet_device() {
    let (mut machine, _) = machine();
    assert_eq!(machine.driver.get(px::SIG), 0xeb14_0101);
    machine
        .plain(command(opcode::IDENTIFY_DEVICE, 0, 0))
        .failed(4);
    let fis = machine.register_fis();
    assert_eq!(fis[4..7], [1, 0x14, 0xeb]);
    machine.recover();
    machine
        .read(command(opcode::IDENTIFY_PACKET_DEVICE, 0, 0), 512)
        .ok();
    let id = machine.data(512);
    assert_eq!(id[..2], [0xc0, 0x85]);
    assert_eq!(id.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
}

#[test]
fn read10_with_dma_and_pio() {
    for sectors in [1u16, 3] {
        for dma in [true, false] {
            let (mut machine, disc) = machine();
            let len = u32::from(sectors) * 2048;
            machine
                .driver
                .put(machine.driver.layout().received(), &[0; 0x60]);
            let end = send(&mut machine, packet(dma, 2048), read10(2, sectors), len).ok();
            assert_eq!(end.count, len);
            assert_eq!(
                machine.data(len as usize),
                disc.contents()[4096..][..len as usize]
            );
            let setup = machine
                .driver
                .take(machine.driver.layout().received() + 0x20, 20);
            assert_eq!(setup[0], 0x5f);
            let count = u16::from_le_bytes([setup[16], setup[17]]);
            if dma {
                assert_eq!(end.is, is::DHRS);
                assert_eq!(count, 12, "the packet");
            } else {
                assert_eq!(end.is, is::DHRS | is::PSS);
                assert_eq!(count, 2048, "a block");
            }
            assert_eq!(machine.register_fis()[12], 3, "interrupt reason");
        }
    }
}

#[test]
fn read12_and_the_end_of_the_medium() {
    let (mut machine, disc) = machine();
    let mut read = cdb(&[mmc_code::READ_12]);
    read[5] = 15;
    read[9] = 1;
    send(&mut machine, packet(true, 0), read, 2048).ok();
    assert_eq!(machine.data(2048), disc.contents()[15 * 2048..]);
    read[9] = 2;
    fails(&mut machine, read, (5, 0x21, 0));
    read[2..6].fill(0xff);
    fails(&mut machine, read, (5, 0x21, 0));
}

#[test]
fn read_cd_raw() {
    let (mut machine, disc) = machine();
    let len = 3 * 2352;
    let read = cdb(&[mmc_code::READ_CD, 0, 0, 0, 0, 1, 0, 0, 3, 0xf8]);
    let end = send(&mut machine, packet(false, 2352), read, len).ok();
    assert_eq!(end.count, len);
    let data = machine.data(len as usize);
    for (at, sector) in data.chunks(2352).enumerate() {
        let user = disc.contents()[(at + 1) * 2048..][..2048].to_vec();
        let expected = mmc::assemble(at as u32 + 1, &user.try_into().unwrap());
        assert_eq!(sector, expected);
    }
    // More than is read at once, and only headers and user data.
    let mut big = machine;
    big.hba.open_tray(0, false).unwrap();
    big.hba.remove_medium(0).unwrap();
    let disc = medium(300);
    big.hba.insert_medium(0, Box::new(disc.clone())).unwrap();
    big.hba.close_tray(0).unwrap();
    send(&mut big, packet(true, 0), cdb(&[0]), 0).failed(0x60);
    big.recover();
    let read = cdb(&[mmc_code::READ_CD, 0, 0, 0, 0, 0, 0, 1, 44, 0x30]);
    let len = 300 * 2052;
    send(&mut big, packet(true, 0), read, len).ok();
    let data = big.data(len as usize);
    for (at, sector) in data.chunks(2052).enumerate() {
        assert_eq!(sector[3], 1);
        assert_eq!(sector[4..], disc.contents()[at * 2048..][..2048]);
    }
}

#[test]
fn a_byte_count_limit_of_0() {
    let (mut machine, _) = machine();
    // Without data it does not matter.
    let read = cdb(&[mmc_code::READ_CD, 0, 0, 0, 0, 0, 0, 0, 0, 0xf8]);
    let end = send(&mut machine, packet(false, 0), read, 0).ok();
    assert_eq!(end.is, is::DHRS);
    send(&mut machine, packet(false, 0), read10(0, 1), 2048).failed(4);
}

#[test]
fn a_medium_that_cannot_be_read() {
    let (mut machine, disc) = machine();
    disc.fail_with(|_| Some(ErrorKind::Io(5)));
    fails(&mut machine, read10(0, 1), (3, 0x11, 0));
}

#[test]
fn the_guest_ejects_and_loads() {
    let (mut machine, _) = machine();
    let moves = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&moves);
    machine.hba.on_tray(Arc::new(move |port, open| {
        seen.lock().unwrap().push((port, open));
    }));
    let eject = cdb(&[mmc_code::START_STOP_UNIT, 0, 0, 0, 2]);
    let load = cdb(&[mmc_code::START_STOP_UNIT, 0, 0, 0, 3]);
    let ready = cdb(&[mmc_code::TEST_UNIT_READY]);
    send(&mut machine, packet(false, 0), eject, 0).ok();
    assert_eq!(machine.hba.tray(0).unwrap(), (true, false));
    fails(&mut machine, ready, (2, 0x3a, 2));
    send(&mut machine, packet(false, 0), load, 0).ok();
    fails(&mut machine, ready, (6, 0x28, 0));
    send(&mut machine, packet(false, 0), ready, 0).ok();
    assert_eq!(*moves.lock().unwrap(), [(0, true), (0, false)]);
}

#[test]
fn the_host_changes_the_medium() {
    let (mut machine, _) = machine();
    let ready = cdb(&[mmc_code::TEST_UNIT_READY]);
    let event = cdb(&[mmc_code::GET_EVENT_STATUS, 1, 0, 0, 0x10, 0, 0, 0, 8]);
    let lock = |on| cdb(&[mmc_code::PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, on]);
    send(&mut machine, packet(false, 0), lock(1), 0).ok();
    assert!(machine.hba.open_tray(0, false).is_err(), "locked");
    send(&mut machine, packet(true, 0), event, 8).ok();
    assert_eq!(
        machine.data(8),
        [0, 6, 4, 0x10, 1, 2, 0, 0],
        "eject request"
    );
    send(&mut machine, packet(false, 0), lock(0), 0).ok();
    machine.hba.open_tray(0, false).unwrap();
    assert!(machine.hba.remove_medium(0).unwrap().is_some());
    machine.hba.close_tray(0).unwrap();
    machine.work();
    fails(&mut machine, ready, (2, 0x3a, 1));
    fails(&mut machine, read10(0, 1), (2, 0x3a, 1));
    send(&mut machine, packet(true, 0), event, 8).ok();
    assert_eq!(machine.data(8)[4..6], [3, 0], "removed");
    machine.hba.open_tray(0, false).unwrap();
    let disc = medium(7);
    disc.write(0, &[0x77; 2048]);
    machine
        .hba
        .insert_medium(0, Box::new(disc.clone()))
        .unwrap();
    assert!(machine.hba.insert_medium(0, Box::new(disc)).is_err());
    machine.hba.close_tray(0).unwrap();
    send(&mut machine, packet(true, 0), event, 8).ok();
    assert_eq!(machine.data(8)[4..6], [2, 2], "new");
    fails(&mut machine, read10(0, 1), (6, 0x28, 0));
    send(&mut machine, packet(true, 0), read10(0, 1), 2048).ok();
    assert_eq!(machine.data(2048), [0x77; 2048]);
    send(
        &mut machine,
        packet(true, 0),
        cdb(&[mmc_code::READ_CAPACITY]),
        8,
    )
    .ok();
    assert_eq!(machine.data(8), [0, 0, 0, 6, 0, 0, 8, 0]);
}

#[test]
fn an_empty_drive() {
    let mut machine = Machine::cold(Setup::default());
    machine
        .hba
        .plug_optical(0, None, OpticalConfig::default())
        .unwrap();
    machine.start();
    fails(&mut machine, cdb(&[0]), (2, 0x3a, 1));
    fails(&mut machine, read10(0, 1), (2, 0x3a, 1));
    machine.plain(command(opcode::FLUSH_CACHE, 0, 0)).failed(4);
    machine.recover();
    send(
        &mut machine,
        packet(true, 0),
        cdb(&[mmc_code::INQUIRY, 0, 0, 0, 36]),
        36,
    )
    .ok();
    assert_eq!(machine.data(36)[..8], [5, 0x80, 5, 2, 31, 0, 0, 0]);
}

#[test]
fn what_drivers_ask_for() {
    let (mut machine, _) = machine();
    let mut ask = |bytes: &[u8], len: u32| {
        send(&mut machine, packet(true, 0), cdb(bytes), len).ok();
        machine.data(len as usize)
    };
    let toc = ask(&[mmc_code::READ_TOC, 0, 0, 0, 0, 0, 0, 0, 20], 20);
    assert_eq!(toc[..4], [0, 18, 1, 1]);
    assert_eq!(toc[4..12], [0, 0x14, 1, 0, 0, 0, 0, 0]);
    assert_eq!(toc[12..], [0, 0x14, 0xaa, 0, 0, 0, 0, 16]);
    let msf = ask(&[mmc_code::READ_TOC, 2, 0, 0, 0, 0, 0, 0, 20], 20);
    assert_eq!(msf[8..12], [0, 0, 2, 0]);
    let session = ask(&[mmc_code::READ_TOC, 0, 1, 0, 0, 0, 0, 0, 12], 12);
    assert_eq!(session[..4], [0, 10, 1, 1]);
    let configuration = ask(&[mmc_code::GET_CONFIGURATION, 0, 0, 0, 0, 0, 0, 0, 8], 8);
    assert_eq!(configuration[6..], [0, 8], "a CD");
    let mode = ask(&[mmc_code::MODE_SENSE_10, 0, 0x2a, 0, 0, 0, 0, 0, 30], 30);
    assert_eq!(mode[..2], [0, 28]);
    assert_eq!(mode[8..10], [0x2a, 0x14]);
    let disc = ask(
        &[mmc_code::READ_DISC_INFORMATION, 0, 0, 0, 0, 0, 0, 0, 34],
        34,
    );
    assert_eq!(disc[..4], [0, 32, 0x0e, 1]);
    let track = ask(
        &[mmc_code::READ_TRACK_INFORMATION, 1, 0, 0, 0, 1, 0, 0, 36],
        36,
    );
    assert_eq!(track[24..28], [0, 0, 0, 16]);
    let formats = ask(
        &[mmc_code::READ_FORMAT_CAPACITIES, 0, 0, 0, 0, 0, 0, 0, 12],
        12,
    );
    assert_eq!(formats[..], [0, 0, 0, 8, 0, 0, 0, 16, 2, 0, 8, 0]);
    let mechanism = ask(&[mmc_code::MECHANISM_STATUS, 0, 0, 0, 0, 0, 0, 0, 0, 8], 8);
    assert_eq!(mechanism, [0; 8]);
    let speed = ask(&[mmc_code::GET_PERFORMANCE, 0, 0, 0, 0, 0, 0, 0, 0, 1], 24);
    assert_eq!(speed[..4], [0, 0, 0, 20]);
    assert_eq!(speed[16..20], [0, 0, 0, 15]);
    fails(
        &mut machine,
        cdb(&[mmc_code::READ_DVD_STRUCTURE, 0, 0, 0, 0, 0, 0, 0, 8, 0]),
        (5, 0x30, 2),
    );
}

#[test]
fn a_dvd_by_its_size() {
    let (mut machine, _) = machine();
    machine.hba.open_tray(0, false).unwrap();
    machine.hba.remove_medium(0).unwrap();
    let disc = virtio_devices::testing::NullDisk(1 << 30);
    machine.hba.insert_medium(0, Box::new(disc)).unwrap();
    machine.hba.close_tray(0).unwrap();
    fails(&mut machine, cdb(&[0]), (6, 0x28, 0));
    let configuration = cdb(&[mmc_code::GET_CONFIGURATION, 0, 0, 0, 0, 0, 0, 0, 8]);
    send(&mut machine, packet(true, 0), configuration, 8).ok();
    assert_eq!(machine.data(8)[6..], [0, 0x10]);
    let structure = cdb(&[mmc_code::READ_DVD_STRUCTURE, 0, 0, 0, 0, 0, 0, 0, 8, 4]);
    send(&mut machine, packet(true, 0), structure, 2052).ok();
    let data = machine.data(2052);
    assert_eq!(data[..2], [8, 2]);
    assert_eq!(data[12..16], [0, 0x0a, 0xff, 0xff]);
}

#[test]
fn mode_select() {
    let (mut machine, _) = machine();
    let select = |len: u8| cdb(&[mmc_code::MODE_SELECT_10, 0x10, 0, 0, 0, 0, 0, 0, len]);
    let mut list = [0; 20];
    list[8..12].copy_from_slice(&[1, 10, 0x20, 9]);
    let mut put = |list: &[u8]| {
        machine.driver.put(DATA, list);
        let outcome = machine.run(&Issue {
            task: packet(true, 0),
            packet: Some(select(list.len() as u8)),
            data: &[(DATA, list.len() as u32)],
            write: true,
        });
        if outcome.status & 1 != 0 {
            return Some(sense(&mut machine));
        }
        None
    };
    assert_eq!(put(&list), None);
    assert_eq!(put(&list[..19]), Some((5, 0x1a, 0)));
    assert_eq!(put(&list[..5]), Some((5, 0x1a, 0)));
    list[9] = 4;
    assert_eq!(put(&list), Some((5, 0x26, 0)));
    list[8] = 0x33;
    assert_eq!(put(&list), Some((5, 0x26, 0)));
    list[6] = 0xff;
    assert_eq!(put(&list), Some((5, 0x1a, 0)));
    let mode = cdb(&[mmc_code::MODE_SENSE_10, 0, 1, 0, 0, 0, 0, 0, 20]);
    send(&mut machine, packet(true, 0), mode, 20).ok();
    assert_eq!(machine.data(12)[8..], [1, 10, 0x20, 9]);
}

/// Every packet, every allocation length up to 300 and a few beyond, with and without a medium: an
/// end, nothing beyond the descriptors, and no more than was asked for.
#[test]
fn every_packet_at_every_length() {
    for empty in [false, true] {
        let (mut machine, _) = machine();
        if empty {
            machine.hba.open_tray(0, true).unwrap();
            machine.hba.remove_medium(0).unwrap();
        }
        for code in 0..=0xffu8 {
            let lengths: Vec<u16> = if known(code) {
                (0..=300).chain([2048, 2351, 0xffff]).collect()
            } else {
                vec![0, 1, 0xffff]
            };
            for len in lengths {
                one(&mut machine, code, len);
            }
        }
    }
}

fn known(code: u8) -> bool {
    matches!(
        code,
        0x03 | 0x12
            | 0x23
            | 0x25
            | 0x43
            | 0x46
            | 0x4a
            | 0x51
            | 0x52
            | 0x55
            | 0x5a
            | 0xac
            | 0xad
            | 0xbd
    )
}

fn one(machine: &mut Machine, code: u8, len: u16) {
    const ROOM: u32 = 4096;
    let [high, low] = len.to_be_bytes();
    let mut bytes = [0u8; 16];
    bytes[0] = code;
    match code {
        0x03 | 0x1a => bytes[4] = low,
        0x12 => bytes[3..5].copy_from_slice(&[high, low]),
        0xad | 0xbd | 0xac => bytes[8..10].copy_from_slice(&[high, low]),
        0x5a => {
            bytes[2] = 0x3f;
            bytes[7..9].copy_from_slice(&[high, low]);
        }
        0x55 => {
            bytes[1] = 0x10;
            bytes[7..9].copy_from_slice(&[high, low]);
        }
        0x4a => {
            bytes[1] = 1;
            bytes[4] = 0x10;
            bytes[7..9].copy_from_slice(&[high, low]);
        }
        0xbe => bytes[8..10].copy_from_slice(&[low & 0xf, low]),
        _ => bytes[7..9].copy_from_slice(&[high, low]),
    }
    machine.driver.put(DATA, &[0xee; ROOM as usize + 64]);
    let end = send(machine, packet(true, 0), bytes, ROOM);
    assert_eq!(end.status & 0x88, 0, "{bytes:x?} has not ended: {end:?}");
    assert_eq!(
        machine.data(ROOM as usize + 64)[ROOM as usize..],
        [0xee; 64]
    );
    if end.status & 1 != 0 {
        assert_ne!(end.is & is::TFES, 0);
        machine.recover();
    } else if known(code) && !matches!(code, 0x25 | 0xac) {
        assert!(end.count <= u32::from(len), "{bytes:x?}: {end:?}");
    }
    machine.driver.set(px::IS, u32::MAX);
}
