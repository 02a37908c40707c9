//! Registers, resets, start and stop.

use virtio_devices::{
    ahci::{
        HbaConfig,
        driver::command,
        regs::{self, cmd, ghc, px},
    },
    ata::{DiskConfig, opcode},
    testing::{MockDisk, MockDiskConfig},
};

use crate::common::{Machine, Setup};

#[test]
fn registers_after_power_on() {
    let machine = Machine::cold(Setup::default());
    let driver = &machine.driver;
    assert_eq!(driver.global(regs::CAP) & 0x1f, 5);
    assert_eq!(driver.global(regs::GHC), ghc::AE);
    assert_eq!(driver.global(regs::IS), 0);
    assert_eq!(driver.global(regs::PI), 0x3f);
    assert_eq!(driver.global(regs::VS), 0x0001_0301);
    assert_eq!(driver.get(px::TFD), 0x7f);
    assert_eq!(driver.get(px::SIG), 0xffff_ffff);
    assert_eq!(driver.get(px::SSTS), 0x133);
    assert_eq!(driver.get(px::SERR), 0);
    assert_eq!(driver.get(px::IS), 0);
    for register in [
        px::CLB,
        px::CLBU,
        px::FB,
        px::FBU,
        px::IE,
        px::SCTL,
        px::SACT,
        px::CI,
    ] {
        assert_eq!(driver.get(register), 0, "{register:#x}");
    }
    for offset in (0x1c..0x100).step_by(4) {
        assert_eq!(driver.global(offset), 0, "{offset:#x}");
    }
    // A port with nothing in it, and one that is not there.
    assert_eq!(driver.global(0x180 + px::SSTS), 0);
    assert_eq!(driver.global(0x100 + 6 * 0x80 + px::TFD), 0);
}

#[test]
fn the_signature_arrives_when_the_port_receives() {
    let mut machine = Machine::cold(Setup::default());
    machine.driver.receive();
    assert_eq!(machine.driver.get(px::TFD), 0x150);
    assert_eq!(machine.driver.get(px::SIG), 0x101);
    machine.work();
    let fis = machine.register_fis();
    assert_eq!(fis[..8], [0x34, 0, 0x50, 1, 1, 0, 0, 0]);
    assert_eq!(fis[12], 1);
}

#[test]
fn identify() {
    let mut machine = Machine::new(Setup::default());
    let end = machine
        .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
        .ok();
    assert_eq!(end.count, 512);
    let id = machine.data(512);
    let text = |from: usize, len: usize| {
        let bytes: Vec<u8> = (0..len).map(|at| id[(from * 2 + at) ^ 1]).collect();
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(text(10, 20), "testdisk            ");
    assert_eq!(text(23, 8), "version ");
    assert_eq!(id[510], 0xa5);
    assert_eq!(id.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
    assert_eq!(u32::from_le_bytes(id[120..124].try_into().unwrap()), 16384);
}

#[test]
fn hba_reset_brings_everything_back() {
    let mut machine = Machine::new(Setup::default());
    for _ in 0..2 {
        machine
            .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
            .ok();
        machine.driver.set_global(regs::GHC, ghc::HR);
        machine.work();
        assert_eq!(machine.driver.global(regs::GHC), ghc::AE);
        assert_eq!(
            machine.driver.get(px::CMD) & (cmd::ST | cmd::CR | cmd::FRE | cmd::FR),
            0
        );
        assert_eq!(machine.driver.get(px::TFD), 0x7f);
        assert_eq!(machine.driver.get(px::SERR), 0);
        assert_eq!(machine.driver.get(px::CLB), 0);
        machine.start();
    }
}

#[test]
fn a_port_reset_waits_for_what_is_in_flight() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    let data = vec![5; 4096];
    machine.driver.put(crate::common::DATA, &data);
    machine.write(command(opcode::WRITE_DMA_EXT, 8, 8), 4096);
    machine.driver.set_global(regs::GHC, ghc::HR);
    machine.work();
    assert_ne!(machine.driver.global(regs::GHC) & ghc::HR, 0);
    assert!(!machine.hba.is_idle());
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.work();
    assert_eq!(machine.driver.global(regs::GHC), ghc::AE);
    assert!(machine.hba.is_idle());
    assert_eq!(machine.driver.get(px::IS), 0);
    machine.start();
    machine.read(command(opcode::READ_DMA_EXT, 8, 8), 4096).ok();
    assert_eq!(machine.data(4096), data);
}

#[test]
fn comreset() {
    let mut machine = Machine::new(Setup::default());
    machine.driver.stop();
    machine.driver.set(px::SCTL, 0x301);
    assert_eq!(machine.driver.get(px::SSTS), 1);
    machine.driver.set(px::SCTL, 0x300);
    assert_eq!(machine.driver.get(px::SSTS), 0x133);
    assert_eq!(machine.driver.get(px::TFD), 0x150);
    assert_eq!(machine.driver.get(px::SERR), 1 << 26);
    assert_eq!(machine.driver.get(px::IS) & 1 << 6, 1 << 6);
    machine.driver.set(px::SERR, u32::MAX);
    assert_eq!(machine.driver.get(px::IS) & 1 << 6, 0);
    machine.driver.start();
    machine
        .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
        .ok();
}

#[test]
fn staggered_spin_up() {
    let mut machine = Machine::cold(Setup {
        hba: HbaConfig {
            staggered_spin_up: true,
            ..HbaConfig::default()
        },
        ..Setup::default()
    });
    assert_ne!(machine.driver.global(regs::CAP) & 1 << 27, 0);
    assert_eq!(machine.driver.get(px::SSTS), 0);
    machine.driver.receive();
    assert_eq!(machine.driver.get(px::TFD), 0x7f);
    machine
        .driver
        .set(px::CMD, machine.driver.get(px::CMD) | cmd::SUD);
    assert_eq!(machine.driver.get(px::SSTS), 0x133);
    assert_eq!(machine.driver.get(px::TFD), 0x150);
    machine.driver.start();
    machine
        .read(command(opcode::IDENTIFY_DEVICE, 0, 0), 512)
        .ok();
}

#[test]
fn hot_plug() {
    let mut machine = Machine::new(Setup::default());
    machine.hba.unplug(0).unwrap();
    assert_eq!(machine.driver.get(px::SSTS), 0);
    assert_eq!(machine.driver.get(px::TFD), 0x7f);
    assert_eq!(machine.driver.get(px::IS), 1 << 22, "PhyRdy changed");
    assert!(machine.sink.line.load(std::sync::atomic::Ordering::Acquire));
    machine.work();
    machine.driver.set(px::SERR, u32::MAX);
    machine.driver.set_global(regs::IS, u32::MAX);
    assert!(!machine.sink.line.load(std::sync::atomic::Ordering::Acquire));
    machine.driver.stop();
    let disk = MockDisk::new(MockDiskConfig {
        size: 1 << 20,
        ..MockDiskConfig::default()
    });
    disk.write(0, &[9; 512]);
    machine
        .hba
        .plug_disk(0, Box::new(disk), DiskConfig::default())
        .unwrap();
    assert_eq!(machine.driver.get(px::IS), 1 << 22 | 1 << 6);
    machine.work();
    assert_eq!(machine.driver.get(px::TFD), 0x150);
    machine.driver.set(px::SERR, u32::MAX);
    machine.driver.start();
    machine.read(command(opcode::READ_DMA_EXT, 0, 1), 512).ok();
    assert_eq!(machine.data(512), [9; 512]);
}

#[test]
fn unplugged_with_requests_in_flight() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096);
    machine.hba.unplug(0).unwrap();
    machine.work();
    assert_eq!(machine.driver.get(px::CI), 0);
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.work();
    assert_eq!(machine.worker.in_flight(), 0);
    assert_eq!(
        machine.driver.get(px::IS),
        1 << 22,
        "nothing of the command"
    );
}

#[test]
fn a_list_that_is_restarted_with_a_command_in_flight() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    machine.write(command(opcode::WRITE_DMA_EXT, 0, 8), 4096);
    assert_eq!(machine.driver.get(px::TFD) & 0x80, 0x80);
    machine.driver.stop();
    machine.work();
    assert_ne!(
        machine.driver.get(px::CMD) & cmd::CR,
        0,
        "it is still running"
    );
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.work();
    assert_eq!(machine.driver.get(px::CMD) & cmd::CR, 0);
    assert_eq!(machine.driver.get(px::TFD), 0x50);
    machine.driver.start();
    machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096).ok();
}
