//! What the tests of security and sanitize share: a machine whose disk has a sidecar and can be erased.

use std::time::{Duration, Instant};

use virtio_devices::{
    ahci::{
        driver::{Issue, command},
        regs::{is, px},
    },
    ata::{DiskConfig, TaskFile, opcode},
};

use crate::common::{DATA, Machine, Outcome, Setup};

/// How the disk is plugged in.
pub fn device(folder: &tempfile::TempDir) -> DiskConfig {
    DiskConfig {
        sidecar: Some(folder.path().join("disk.ata")),
        ..Setup::default().device
    }
}

/// What the sidecar says.
pub fn sidecar(folder: &tempfile::TempDir) -> String {
    std::fs::read_to_string(folder.path().join("disk.ata")).unwrap()
}

pub fn setup(folder: &tempfile::TempDir) -> Setup {
    let mut setup = Setup {
        device: device(folder),
        ..Setup::default()
    };
    setup.disk.capabilities.overwrite = true;
    setup
}

/// A machine whose disk was never locked, full of the byte 7.
pub fn machine(folder: &tempfile::TempDir) -> Machine {
    let machine = Machine::new(setup(folder));
    let size = machine.disk.contents().len();
    machine.disk.write(0, &vec![7; size]);
    machine
}

/// Whether nothing of the disk is what [`machine`] wrote.
pub fn is_erased(machine: &Machine) -> bool {
    machine.disk.contents().iter().all(|byte| *byte == 0)
}

/// Pulls the disk and plugs it in again: it is powered on.
pub fn power_cycle(machine: &mut Machine, folder: &tempfile::TempDir) {
    machine.driver.stop();
    machine.work();
    machine.hba.unplug(0).unwrap();
    let disk = Box::new(machine.disk.clone());
    machine.hba.plug_disk(0, disk, device(folder)).unwrap();
    machine.work();
    machine.start();
}

/// A COMRESET.
pub fn comreset(machine: &mut Machine) {
    machine.driver.stop();
    machine.driver.set(px::SCTL, 0x301);
    machine.driver.set(px::SCTL, 0x300);
    until(machine, "the signature", |machine| {
        machine.driver.get(px::TFD) & 0x89 == 0
    });
    machine.driver.set(px::SERR, u32::MAX);
    machine.start();
}

/// Lets the port work until something is so.
#[track_caller]
pub fn until(machine: &mut Machine, what: &str, so: impl Fn(&Machine) -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        machine.work();
        if so(machine) {
            return;
        }
        assert!(Instant::now() < end, "{what} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Issues a command in slot 0, and waits for its end. After an error the list runs again.
#[track_caller]
pub fn run(machine: &mut Machine, issue: &Issue<'_>) -> Outcome {
    machine.driver.set(px::IS, u32::MAX);
    machine.driver.prepare(0, issue);
    machine.driver.issue();
    until(machine, "the end of a command", |machine| {
        machine.driver.get(px::CI) & 1 == 0 || machine.driver.get(px::IS) & is::TFES != 0
    });
    let outcome = machine.outcome(0);
    if outcome.status & 1 != 0 {
        machine.recover();
    }
    outcome
}

#[track_caller]
pub fn plain(machine: &mut Machine, task: TaskFile) -> Outcome {
    run(
        machine,
        &Issue {
            task,
            ..Issue::default()
        },
    )
}

#[track_caller]
pub fn read(machine: &mut Machine, task: TaskFile, len: u32) -> Outcome {
    run(
        machine,
        &Issue {
            task,
            data: &[(DATA, len)],
            ..Issue::default()
        },
    )
}

/// A command with one block to the device.
#[track_caller]
pub fn write(machine: &mut Machine, task: TaskFile, data: &[u8]) -> Outcome {
    machine.driver.put(DATA, data);
    run(
        machine,
        &Issue {
            task,
            write: true,
            data: &[(DATA, 512)],
            ..Issue::default()
        },
    )
}

/// A word of IDENTIFY DEVICE.
#[track_caller]
pub fn word(machine: &mut Machine, at: usize) -> u16 {
    read(machine, command(opcode::IDENTIFY_DEVICE, 0, 0), 512).ok();
    let id = machine.data(512);
    u16::from_le_bytes([id[at * 2], id[at * 2 + 1]])
}

/// A quadword of a page of the IDENTIFY DEVICE data log.
#[track_caller]
pub fn log(machine: &mut Machine, page: u64, at: usize) -> u64 {
    let lba = 0x30 | page << 8;
    read(machine, command(opcode::READ_LOG_EXT, lba, 1), 512).ok();
    let page = machine.data(512);
    u64::from_le_bytes(page[at * 8..at * 8 + 8].try_into().unwrap())
}
