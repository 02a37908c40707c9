//! Commands of a disk, one by one, with the errors of each.

use block::{DiskTopology, ErrorKind};
use virtio_devices::{
    ahci::{
        driver::{Issue, command, queued},
        regs::px,
    },
    ata::{DiskConfig, TaskFile, Trim, opcode},
    testing::{Logged, MockDiskConfig},
};

use crate::{
    common::{DATA, Machine, Setup, pattern},
    transfer::command28,
};

const ABRT: u8 = 4;
const IDNF: u8 = 0x10;
const UNC: u8 = 0x40;
const SECTORS: u64 = (8 << 20) / 512;

fn features(feature: u16, count: u16) -> TaskFile {
    TaskFile {
        command: opcode::SET_FEATURES,
        features: feature,
        count,
        ..TaskFile::default()
    }
}

fn identify(machine: &mut Machine) -> Vec<u16> {
    machine
        .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
        .ok();
    let data = machine.data(512);
    data.chunks(2)
        .map(|w| u16::from_le_bytes([w[0], w[1]]))
        .collect()
}

fn log(machine: &mut Machine, address: u8, page: u16, count: u16) -> Vec<u8> {
    let lba = u64::from(address) | u64::from(page & 0xff) << 8 | u64::from(page >> 8) << 32;
    machine
        .read(
            command(opcode::READ_LOG_EXT, lba, count),
            u32::from(count) * 512,
        )
        .ok();
    machine.data(usize::from(count) * 512)
}

#[test]
fn beyond_the_end() {
    let mut machine = Machine::new(Setup::default());
    let tasks = [
        command(opcode::READ_DMA_EXT, SECTORS, 1),
        command(opcode::READ_DMA_EXT, SECTORS - 1, 2),
        command(opcode::READ_DMA_EXT, 0xffff_ffff_ffff, 0),
        command(opcode::WRITE_DMA_EXT, SECTORS - 7, 8),
        command28(opcode::READ_DMA, 0xfff_ffff, 0),
        command28(opcode::WRITE_SECTORS, SECTORS, 1),
        command(opcode::READ_VERIFY_EXT, SECTORS, 1),
        command28(opcode::READ_VERIFY, SECTORS - 1, 2),
    ];
    for task in tasks {
        let before = machine.disk.log().len();
        machine.read(task, 4096).failed(IDNF);
        assert_eq!(machine.driver.get(px::CI), 1, "the bit stays");
        assert_eq!(machine.disk.log().len(), before);
        machine.recover();
    }
    machine.read(queued(0, false, SECTORS, 1), 512).failed(IDNF);
    assert_eq!(machine.driver.get(px::SACT), 1);
}

#[test]
fn errors_of_the_disk() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.fail_with(|_| Some(ErrorKind::Io(5)));
    let cases = [
        (command(opcode::READ_DMA_EXT, 0, 1), UNC),
        (command(opcode::READ_SECTORS_EXT, 0, 1), UNC),
        (command(opcode::READ_VERIFY_EXT, 0, 1), UNC),
        (command(opcode::WRITE_DMA_EXT, 0, 1), ABRT),
        (command(opcode::FLUSH_CACHE_EXT, 0, 0), ABRT),
    ];
    for (task, error) in cases {
        machine.read(task, 512).failed(error);
        machine.recover();
    }
    machine.read(queued(0, true, 0, 1), 512).failed(ABRT);
}

#[test]
fn cylinder_head_sector() {
    let mut machine = Machine::new(Setup::default());
    machine
        .disk
        .write(512 * (16 * 63 + 2 * 63 + 4), &[0xab; 512]);
    let mut task = TaskFile {
        command: opcode::READ_SECTORS,
        count: 1,
        // Cylinder 1, sector 5.
        lba: 1 << 8 | 5,
        device: 2,
        ..TaskFile::default()
    };
    machine.read(task, 512).ok();
    assert_eq!(machine.data(512), [0xab; 512]);
    task.lba = 1 << 8;
    machine.read(task, 512).failed(IDNF);
    machine.recover();
    // Another geometry: 4 heads, 8 sectors.
    let mut parameters = command(opcode::INITIALIZE_DEVICE_PARAMETERS, 0, 8);
    parameters.device = 3;
    machine.plain(parameters).ok();
    task.lba = 1 << 8 | 5;
    task.device = 2;
    machine.disk.write(512 * (32 + 16 + 4), &[0xcd; 512]);
    machine.read(task, 512).ok();
    assert_eq!(machine.data(512), [0xcd; 512]);
    parameters.count = 0;
    machine.plain(parameters).failed(ABRT);
}

#[test]
fn native_max() {
    let mut machine = Machine::new(Setup::default());
    machine
        .plain(command(opcode::READ_NATIVE_MAX_EXT, 0, 0))
        .ok();
    let fis = machine.register_fis();
    assert_eq!(fis[4..7], (SECTORS - 1).to_le_bytes()[..3]);
    machine.plain(command28(opcode::READ_NATIVE_MAX, 0, 0)).ok();
    assert_eq!(
        machine.register_fis()[4..7],
        (SECTORS - 1).to_le_bytes()[..3]
    );
    // No geometry with zero sectors, and cylinder, head and sector when it is asked that way.
    let mut task = command(opcode::READ_NATIVE_MAX, 0, 0);
    task.device = 0xa0;
    machine.plain(task).ok();
    let fis = machine.register_fis();
    assert_eq!(fis[4], 63);
    assert_eq!(u16::from_le_bytes([fis[5], fis[6]]), 15);
    assert_eq!(fis[7] & 0xf, 15);
}

#[test]
fn multiple_sectors_a_block() {
    let mut machine = Machine::new(Setup::default());
    machine
        .read(command(opcode::READ_MULTIPLE_EXT, 0, 8), 4096)
        .failed(ABRT);
    machine.recover();
    machine
        .plain(command(opcode::SET_MULTIPLE_MODE, 0, 3))
        .failed(ABRT);
    machine.recover();
    machine
        .plain(command(opcode::SET_MULTIPLE_MODE, 0, 16))
        .ok();
    assert_eq!(identify(&mut machine)[59], 0x110);
    let data = pattern(20 * 512, 4);
    machine.driver.put(DATA, &data);
    machine
        .write(command(opcode::WRITE_MULTIPLE_EXT, 5, 20), 10240)
        .ok();
    machine.driver.put(DATA, &[0; 10240]);
    machine
        .read(command28(opcode::READ_MULTIPLE, 5, 20), 10240)
        .ok();
    assert_eq!(machine.data(10240), data);
    let setup = machine
        .driver
        .take(machine.driver.layout().received() + 0x30, 2);
    assert_eq!(setup, [0, 8], "the last block has four sectors");
    machine
        .write(command(opcode::WRITE_MULTIPLE_FUA_EXT, 5, 20), 10240)
        .ok();
    assert!(
        machine
            .disk
            .log()
            .iter()
            .any(|op| matches!(op, Logged::Write { fua: true, .. }))
    );
}

#[test]
fn trim_reads_as_zeroes() {
    let mut machine = Machine::new(Setup::default());
    let id = identify(&mut machine);
    assert_eq!((id[169] & 1, id[69] & 0x4020), (1, 0x4020));
    machine.disk.write(0, &[1; 1 << 20]);
    let mut list = [0; 512];
    for (at, (lba, count)) in [(8u64, 8u64), (16, 8), (100, 1)].into_iter().enumerate() {
        list[at * 8..at * 8 + 8].copy_from_slice(&(lba | count << 48).to_le_bytes());
    }
    machine.driver.put(DATA, &list);
    let mut task = command(opcode::DATA_SET_MANAGEMENT, 0, 1);
    task.features = 1;
    machine.disk.clear_log();
    machine.write(task, 512).ok();
    let zeroes = |offset, len| Logged::WriteZeroes {
        offset,
        len,
        may_unmap: true,
    };
    assert_eq!(machine.disk.log(), [zeroes(4096, 8192), zeroes(51200, 512)]);
    // Beyond the end: nothing at all is trimmed.
    list[24..32].copy_from_slice(&(SECTORS | 1 << 48).to_le_bytes());
    machine.driver.put(DATA, &list);
    machine.disk.clear_log();
    machine.write(task, 512).failed(IDNF);
    assert_eq!(machine.disk.log(), []);
    machine.recover();
    task.count = 9;
    machine.write(task, 4608).failed(ABRT);
    machine.recover();
    task.count = 1;
    task.features = 0;
    machine.write(task, 512).failed(ABRT);
    // An empty list is no error.
    machine.recover();
    task.features = 1;
    machine.driver.put(DATA, &[0; 512]);
    machine.write(task, 512).ok();
}

#[test]
fn trim_as_a_hint_promises_nothing() {
    let mut machine = Machine::new(Setup {
        device: DiskConfig {
            trim: Trim::Hint,
            ..DiskConfig::default()
        },
        ..Setup::default()
    });
    let id = identify(&mut machine);
    assert_eq!((id[169] & 1, id[69] & 0x4020), (1, 0));
    machine.driver.put(DATA, &[0; 512]);
    machine.driver.put(DATA, &(8u64 | 8 << 48).to_le_bytes());
    // Queued.
    let task = TaskFile {
        command: opcode::SEND_FPDMA_QUEUED,
        features: 1,
        auxiliary: 1,
        ..TaskFile::default()
    };
    machine.disk.clear_log();
    machine.write(task, 512).ok();
    let discard = Logged::Discard {
        offset: 4096,
        len: 4096,
    };
    assert_eq!(machine.disk.log(), [discard]);
}

#[test]
fn a_disk_that_cannot_be_written() {
    let mut machine = Machine::new(Setup {
        device: DiskConfig {
            read_only: true,
            trim: Trim::Zero,
            ..DiskConfig::default()
        },
        ..Setup::default()
    });
    machine
        .write(command(opcode::WRITE_DMA_EXT, 0, 1), 512)
        .failed(ABRT);
    machine.recover();
    let mut task = command(opcode::DATA_SET_MANAGEMENT, 0, 1);
    task.features = 1;
    machine.write(task, 512).failed(ABRT);
    machine.recover();
    assert_eq!(identify(&mut machine)[169] & 1, 0);
    assert_eq!(machine.disk.log(), []);
}

#[test]
fn the_write_cache() {
    let mut machine = Machine::new(Setup::default());
    assert_ne!(identify(&mut machine)[85] & 0x20, 0);
    machine.disk.clear_log();
    machine.plain(features(0x82, 0)).ok();
    assert_eq!(
        machine.disk.log(),
        [Logged::Flush],
        "what it held is durable"
    );
    assert_eq!(identify(&mut machine)[85] & 0x20, 0);
    machine.disk.clear_log();
    machine.write(queued(0, true, 0, 1), 512).ok();
    machine
        .write(command(opcode::WRITE_DMA_EXT, 0, 1), 512)
        .ok();
    let durable = |op: &Logged| matches!(op, Logged::Write { fua: true, .. });
    assert!(machine.disk.log().iter().all(durable));
    machine.plain(features(0x02, 0)).ok();
    machine.disk.clear_log();
    machine.write(queued(0, true, 0, 1), 512).ok();
    assert!(!machine.disk.log().iter().any(durable));
}

#[test]
fn set_features() {
    let mut machine = Machine::new(Setup::default());
    for (feature, count) in [
        (0x03, 0x45),
        (0x55, 0),
        (0xaa, 0),
        (0x66, 0),
        (0xcc, 0),
        (0x10, 6),
    ] {
        machine.plain(features(feature, count)).ok();
    }
    assert_eq!(identify(&mut machine)[88], 0x207f);
    for (feature, count) in [(0x03, 0x47), (0x05, 0x80), (0x10, 3), (0xff, 0), (0, 0)] {
        machine.plain(features(feature, count)).failed(ABRT);
        machine.recover();
    }
}

#[test]
fn power_modes() {
    let mut machine = Machine::new(Setup::default());
    let mode = |machine: &mut Machine| {
        machine.plain(command(opcode::CHECK_POWER_MODE, 0, 0)).ok();
        machine.register_fis()[12]
    };
    assert_eq!(mode(&mut machine), 0xff);
    machine.plain(command(opcode::IDLE_IMMEDIATE, 0, 0)).ok();
    assert_eq!(mode(&mut machine), 0x80);
    machine.disk.clear_log();
    machine.plain(command(opcode::STANDBY_IMMEDIATE, 0, 0)).ok();
    assert_eq!(machine.disk.log(), [Logged::Flush]);
    assert_eq!(mode(&mut machine), 0);
    machine.read(command(opcode::READ_DMA_EXT, 0, 1), 512).ok();
    assert_eq!(mode(&mut machine), 0xff, "a read wakes it");
    machine.plain(command(opcode::SLEEP, 0, 0)).ok();
    machine
        .read(command(opcode::READ_DMA_EXT, 0, 1), 512)
        .failed(ABRT);
    machine.driver.stop();
    machine.driver.set(px::SCTL, 0x301);
    machine.driver.set(px::SCTL, 0x300);
    machine.recover();
    assert_eq!(mode(&mut machine), 0xff, "a reset wakes it from sleep");
}

#[test]
fn verify_reads_and_tells_nothing() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.clear_log();
    let end = machine
        .plain(command(opcode::READ_VERIFY_EXT, 0, 8192))
        .ok();
    assert_eq!(end.count, 0);
    let read = |offset| Logged::Read {
        offset,
        len: 1 << 20,
    };
    let pieces: Vec<_> = (0..4).map(|at| read(at << 20)).collect();
    assert_eq!(machine.disk.log(), pieces);
}

#[test]
fn what_is_not_offered_is_aborted() {
    let mut machine = Machine::new(Setup::default());
    for code in [
        opcode::NOP,
        opcode::DEVICE_RESET,
        opcode::PACKET,
        opcode::IDENTIFY_PACKET_DEVICE,
        opcode::NCQ_NON_DATA,
        0x37,
        0x45,
        0xb1,
        0xb4,
        0xf4,
        0xf9,
        0xff,
    ] {
        machine.read(command(code, 0, 0), 512).failed(ABRT);
        machine.recover();
    }
    machine.plain(command(opcode::EXECUTE_DEVICE_DIAGNOSTIC, 0, 0));
    assert_eq!(machine.register_fis()[2..8], [0x50, 1, 1, 0, 0, 0]);
}

#[test]
fn smart() {
    let mut machine = Machine::new(Setup::default());
    let task = |function: u16, count: u16, low: u64| TaskFile {
        command: opcode::SMART,
        features: function,
        count,
        lba: 0xc2_4f00 | low,
        ..TaskFile::default()
    };
    let zero_sum = |data: &[u8]| data.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)) == 0;
    machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096).ok();
    machine.read(task(0xd0, 0, 0), 512).ok();
    let data = machine.data(512);
    assert!(zero_sum(&data));
    let read = data[2..362]
        .chunks(12)
        .find(|entry| entry[0] == 242)
        .unwrap();
    assert_eq!(read[5], 8, "sectors read");
    machine.read(task(0xd1, 0, 0), 512).ok();
    assert!(zero_sum(&machine.data(512)));
    machine.plain(task(0xda, 0, 0)).ok();
    assert_eq!(machine.register_fis()[5..7], [0x4f, 0xc2], "healthy");
    machine.disk.fail_with(|_| Some(ErrorKind::Io(5)));
    machine
        .read(command(opcode::READ_DMA_EXT, 7, 8), 4096)
        .failed(UNC);
    machine.recover();
    machine.read(task(0xd5, 1, 1), 512).ok();
    let errors = machine.data(512);
    assert!(zero_sum(&errors));
    assert_eq!((errors[1], errors[452]), (1, 1));
    assert_eq!(errors[2 + 48 + 7], opcode::READ_DMA_EXT);
    assert_eq!((errors[2 + 61], errors[2 + 63]), (UNC, 7));
    // The host's logs.
    machine.driver.put(DATA, &pattern(1024, 5));
    machine.write(task(0xd6, 2, 0x80), 1024).ok();
    machine.driver.put(DATA, &[0; 1024]);
    machine.read(task(0xd5, 2, 0x80), 1024).ok();
    assert_eq!(machine.data(1024), pattern(1024, 5));
    for bad in [
        task(0xd5, 1, 6),
        task(0xd6, 1, 1),
        task(0xd6, 17, 0x80),
        task(0xd4, 0, 1),
    ] {
        machine.read(bad, 8704).failed(ABRT);
        machine.recover();
    }
    machine.plain(task(0xd9, 0, 0)).ok();
    machine.read(task(0xd0, 0, 0), 512).failed(ABRT);
    machine.recover();
    assert_eq!(identify(&mut machine)[85] & 1, 0);
    machine.plain(task(0xd8, 0, 0)).ok();
    machine
        .plain(TaskFile {
            lba: 0,
            ..task(0xda, 0, 0)
        })
        .failed(ABRT);
}

#[test]
fn general_purpose_logs() {
    let mut machine = Machine::new(Setup::default());
    let directory = log(&mut machine, 0, 0, 1);
    let pages = |at: usize| u16::from_le_bytes([directory[at * 2], directory[at * 2 + 1]]);
    assert_eq!(pages(0), 1);
    for (address, count) in [
        (0x04, 8),
        (0x10, 1),
        (0x11, 1),
        (0x13, 1),
        (0x30, 6),
        (0x80, 16),
    ] {
        assert_eq!(pages(address), count, "log {address:x}");
        // All pages at once, and one more than there are.
        let data = log(&mut machine, address as u8, 0, count);
        assert_eq!(data.len(), usize::from(count) * 512);
        let mut task = command(opcode::READ_LOG_EXT, address as u64, count + 1);
        machine.read(task, 0x4000).failed(ABRT);
        machine.recover();
        task.count = 0;
        machine.read(task, 0x4000).failed(ABRT);
        machine.recover();
    }
    assert_eq!(log(&mut machine, 0x10, 0, 1)[0], 0x80);
    assert_eq!(log(&mut machine, 0x30, 0, 1)[8..13], [4, 0, 1, 2, 5]);
    let id = identify(&mut machine);
    let copy = log(&mut machine, 0x30, 1, 1);
    assert_eq!(u16::from_le_bytes([copy[200], copy[201]]), id[100]);
    let capacity = log(&mut machine, 0x30, 2, 1);
    assert_eq!(capacity[8..14], SECTORS.to_le_bytes()[..6]);
    let statistics = log(&mut machine, 0x04, 0, 1);
    assert_eq!(statistics[8..14], [5, 0, 1, 4, 6, 7]);
    // Through DMA, queued, and written.
    machine
        .read(command(opcode::READ_LOG_DMA_EXT, 0x11, 1), 512)
        .ok();
    let receive = TaskFile {
        command: opcode::RECEIVE_FPDMA_QUEUED,
        features: 1,
        count: 1 << 8,
        lba: 0x13,
        ..TaskFile::default()
    };
    machine.read(receive, 512).ok();
    assert_eq!(machine.data(9), [1, 0, 0, 0, 1, 0, 0, 0, 1]);
    machine.driver.put(DATA, &pattern(512, 8));
    machine
        .write(command(opcode::WRITE_LOG_DMA_EXT, 0x90 | 3 << 8, 1), 512)
        .ok();
    assert_eq!(log(&mut machine, 0x90, 3, 1), pattern(512, 8));
    machine
        .write(command(opcode::WRITE_LOG_EXT, 0x10, 1), 512)
        .failed(ABRT);
}

#[test]
fn sector_sizes() {
    for (logical, physical, sizes) in [
        (512, 512, 0x4000),
        (512, 4096, 0x6003),
        (4096, 4096, 0x5000),
    ] {
        let topology = DiskTopology {
            logical_block_size: logical,
            physical_block_size: physical,
            ..DiskTopology::default()
        };
        let disk = MockDiskConfig {
            topology,
            ..Setup::default().disk
        };
        let mock = virtio_devices::testing::MockDisk::new(disk);
        let device = DiskConfig::of(&mock);
        assert_eq!(
            (device.logical_sector, device.physical_sector),
            (logical, physical)
        );
        let mut machine = Machine::new(Setup {
            disk,
            device,
            ..Setup::default()
        });
        let id = identify(&mut machine);
        assert_eq!(id[106], sizes);
        let sectors = u64::from(id[100]) | u64::from(id[101]) << 16;
        assert_eq!(sectors * u64::from(logical), 8 << 20);
        let words = u32::from(id[117]) | u32::from(id[118]) << 16;
        assert_eq!(words, if logical == 512 { 0 } else { 2048 });
        let data = pattern(logical as usize, 2);
        machine.driver.put(DATA, &data);
        machine.write(queued(0, true, sectors - 1, 1), logical).ok();
        assert_eq!(machine.disk.contents()[(8 << 20) - data.len()..], data);
        machine
            .write(command(opcode::WRITE_SECTORS_EXT, 2, 1), logical)
            .ok();
        assert_eq!(
            machine.disk.contents()[2 * data.len()..][..data.len()],
            data
        );
    }
}

#[test]
fn a_resized_disk() {
    use block::DiskFile;
    let mut machine = Machine::new(Setup::default());
    machine.disk.resize(1 << 20).unwrap();
    machine
        .read(command(opcode::READ_DMA_EXT, 2048, 1), 512)
        .failed(IDNF);
    machine.recover();
    assert_eq!(identify(&mut machine)[100], 2048);
}

#[test]
fn a_soft_reset() {
    let mut machine = Machine::new(Setup::default());
    machine.plain(command(opcode::SET_MULTIPLE_MODE, 0, 8)).ok();
    let layout = machine.driver.layout();
    for control in [4, 0] {
        machine.driver.prepare(0, &Issue::default());
        let mut fis = [0; 20];
        fis[0] = 0x27;
        fis[15] = control;
        machine.driver.put(layout.table(0), &fis);
        machine.driver.issue();
        machine.work();
        assert_eq!(machine.driver.get(px::CI), 0);
    }
    assert_eq!(machine.driver.get(px::TFD), 0x150);
    assert_eq!(machine.register_fis()[..4], [0x34, 0, 0x50, 1]);
    assert_eq!(identify(&mut machine)[59], 0);
}
