//! The Sanitize Device feature set: what it erases, what is refused meanwhile, what becomes of one that
//! fails or is interrupted.

use virtio_devices::{
    ahci::{
        driver::{Issue, command, queued},
        regs,
    },
    ata::{TaskFile, opcode},
    testing::Logged,
};

use crate::{
    common::{DATA, Machine},
    protected::{
        comreset, device, is_erased, log, machine, plain, power_cycle, read, run, setup, sidecar,
        until, word, write,
    },
};

const ABRT: u8 = 4;

const STATUS: u16 = 0;
const BLOCK_ERASE: u16 = 0x12;
const OVERWRITE: u16 = 0x14;
const FREEZE: u16 = 0x20;
const ANTIFREEZE: u16 = 0x40;

const FAILURE_MODE: u16 = 0x10;

/// States, in the Count field.
const SUCCEEDED: u16 = 0x8000;
const RUNNING: u16 = 0x4000;
const FROZEN: u16 = 0x2000;
const ANTIFROZEN: u16 = 0x1000;

fn sanitize(features: u16, count: u16) -> TaskFile {
    let lba = match features {
        BLOCK_ERASE => 0x426b_4572,
        OVERWRITE => 0x4f57_0102_0304,
        FREEZE => 0x4672_4c6b,
        ANTIFREEZE => 0x416e_7469,
        _ => 0,
    };
    TaskFile {
        features,
        ..command(0xb4, lba, count)
    }
}

/// Count and LBA of the Register FIS of a command; `Err` if it failed.
fn ask(machine: &mut Machine, task: TaskFile) -> Result<(u16, u64), u64> {
    let outcome = plain(machine, task);
    let fis = machine.register_fis();
    let count = u16::from_le_bytes([fis[12], fis[13]]);
    let mut lba = [0; 8];
    lba[..3].copy_from_slice(&fis[4..7]);
    lba[3..6].copy_from_slice(&fis[8..11]);
    let lba = u64::from_le_bytes(lba);
    if outcome.status & 1 == 0 {
        outcome.ok();
        return Ok((count, lba));
    }
    outcome.failed(ABRT);
    assert_eq!(count, 0);
    Err(lba)
}

fn status(machine: &mut Machine) -> Result<(u16, u64), u64> {
    ask(machine, sanitize(STATUS, 0))
}

/// Asks until an operation has ended.
#[track_caller]
fn ended(machine: &mut Machine) -> Result<(u16, u64), u64> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match status(machine) {
            Ok((count, _)) if count & RUNNING != 0 => {
                assert!(std::time::Instant::now() < end, "it does not end");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

#[test]
fn what_is_offered_is_in_identify_and_in_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert_eq!(word(&mut machine, 59), 0xdc00);
    plain(&mut machine, command(opcode::SET_MULTIPLE_MODE, 0, 8)).ok();
    assert_eq!(word(&mut machine, 59), 0xdd08);
    assert_eq!(
        log(&mut machine, 0, 1).to_le_bytes()[..6],
        [5, 0, 1, 2, 5, 6]
    );
    assert_eq!(log(&mut machine, 6, 0), 1 << 63 | 6 << 16 | 1);
    assert_eq!(log(&mut machine, 6, 6), 1 << 63 | 0x7a);
    assert_eq!(status(&mut machine), Ok((0, 0xffff)));
    for (features, reason) in [(0x11, 2), (0x01, 2), (0x13, 2), (0xffff, 2)] {
        assert_eq!(ask(&mut machine, sanitize(features, 0)), Err(reason));
    }
}

#[test]
fn block_erase_and_overwrite_take_everything() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    let begun = ask(&mut machine, sanitize(BLOCK_ERASE, 0)).unwrap();
    assert!(
        begun.0 == RUNNING || begun == (SUCCEEDED, 0xffff),
        "{begun:?}"
    );
    assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
    assert!(is_erased(&machine));
    let all =
        |machine: &Machine, word: [u8; 4]| machine.disk.contents().chunks(4).all(|it| it == word);
    let (pattern, inverse) = ([4, 3, 2, 1], [0xfb, 0xfc, 0xfd, 0xfe]);
    // Passes, invert (80h), definitive ending pattern (40h).
    for (count, last) in [
        (1, pattern),
        (0x82, inverse),
        (0x83, pattern),
        (0xc2, pattern),
        (0x80, inverse),
    ] {
        ask(&mut machine, sanitize(OVERWRITE, count)).unwrap();
        assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
        assert!(all(&machine, last), "{count:x}");
    }
    read(&mut machine, command(opcode::READ_DMA_EXT, 0, 1), 512).ok();
    // It is remembered.
    power_cycle(&mut machine, &folder);
    assert_eq!(status(&mut machine), Ok((SUCCEEDED, 0xffff)));
}

#[test]
fn nothing_else_gets_at_the_disk_meanwhile_and_no_reset_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    machine.disk.hold_writes(true);
    ask(&mut machine, sanitize(BLOCK_ERASE, 0)).unwrap();
    assert!(sidecar(&folder).contains("Running"), "remembered first");
    machine.disk.let_through(4);
    until(
        &mut machine,
        "half of the zeroes, a quarter of the work",
        |it| it.disk.contents()[..4 << 20] == [0; 4 << 20] && it.disk.waiting_writes() == 1,
    );
    for round in 0..3 {
        assert_eq!(status(&mut machine), Ok((RUNNING, 0x4000)));
        assert_eq!(word(&mut machine, 59), 0xdc00);
        assert_eq!(log(&mut machine, 6, 6), 1 << 63 | 0x7a);
        plain(&mut machine, command(opcode::CHECK_POWER_MODE, 0, 0)).ok();
        for task in [
            command(opcode::READ_DMA_EXT, 0, 1),
            command(opcode::READ_SECTORS, 0, 1),
            command(opcode::READ_LOG_EXT, 4, 1),
            command(opcode::FLUSH_CACHE_EXT, 0, 0),
            command(opcode::STANDBY_IMMEDIATE, 0, 0),
            sanitize(BLOCK_ERASE, 0),
            sanitize(OVERWRITE, 1),
            sanitize(FREEZE, 0),
            command(opcode::SECURITY_ERASE_PREPARE, 0, 0),
            queued(0, false, 0, 1),
        ] {
            read(&mut machine, task, 512).failed(ABRT);
        }
        read(&mut machine, command(opcode::READ_LOG_EXT, 0x10, 1), 512).ok();
        write(
            &mut machine,
            command(opcode::WRITE_DMA_EXT, 0, 1),
            &[9; 512],
        )
        .failed(ABRT);
        match round {
            0 => comreset(&mut machine),
            1 => {
                machine.driver.set_global(regs::GHC, 1);
                until(&mut machine, "the reset", |it| !it.hba.is_resetting());
                machine.start();
            }
            _ => {}
        }
    }
    let saved = machine.hba.save().unwrap_err().to_string();
    assert!(saved.contains("sanitize"), "{saved}");
    machine.disk.hold_writes(false);
    assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
    assert!(is_erased(&machine));
    write(
        &mut machine,
        command(opcode::WRITE_DMA_EXT, 0, 1),
        &[9; 512],
    )
    .ok();
    machine.hba.save().unwrap();
}

#[test]
fn one_that_was_interrupted_goes_on_at_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    machine.disk.hold_writes(true);
    ask(&mut machine, sanitize(OVERWRITE, 0)).unwrap();
    machine.driver.stop();
    machine.work();
    std::thread::scope(|scope| {
        let pulled = scope.spawn(|| machine.hba.unplug(0));
        // One write at a time, so that the operation does not outrun the plug.
        while !pulled.is_finished() {
            if machine.disk.waiting_writes() > 0 && machine.hba.disk_size(0).is_none() {
                machine.disk.let_through(1);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        pulled.join().unwrap().unwrap();
    });
    assert!(sidecar(&folder).contains("Running"));
    let pieces = machine.disk.contents();
    assert!(pieces.ends_with(&[7; 512]), "it has not come to the end");
    machine.disk.hold_writes(false);
    let disk = Box::new(machine.disk.clone());
    machine.hba.plug_disk(0, disk, device(&folder)).unwrap();
    machine.work();
    machine.start();
    assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
    let contents = machine.disk.contents();
    assert!(contents.chunks(4).all(|it| it == [4, 3, 2, 1]));
}

#[test]
fn a_crash_before_the_end_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"{"version":1,"master_identifier":65534,"sanitize":{"action":"BlockErase","failure_mode":false,"outcome":"Running"}}"#;
    std::fs::write(folder.path().join("disk.ata"), text).unwrap();
    let mut machine = Machine::new(setup(&folder));
    assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
    assert!(sidecar(&folder).contains("Succeeded"));
}

/// Lets an operation fail; the disk works afterwards.
fn fail(machine: &mut Machine, count: u16) {
    machine.disk.fail_with(|logged| match logged {
        Logged::Write { .. } => Some(block::ErrorKind::Io(5)),
        _ => None,
    });
    ask(machine, sanitize(BLOCK_ERASE, count)).unwrap();
    assert_eq!(ended(machine), Err(1));
    machine.disk.fail_with(|_| None);
    read(machine, command(opcode::READ_DMA_EXT, 0, 1), 512).failed(ABRT);
}

#[test]
fn a_failure_without_the_failure_mode_ends_with_another_operation() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    fail(&mut machine, 0);
    power_cycle(&mut machine, &folder);
    assert_eq!(ask(&mut machine, sanitize(STATUS, 1)), Err(1));
    assert_eq!(
        ask(&mut machine, sanitize(BLOCK_ERASE, FAILURE_MODE)),
        Err(0)
    );
    assert_eq!(ask(&mut machine, sanitize(FREEZE, 0)), Err(0));
    read(&mut machine, command(opcode::READ_DMA_EXT, 0, 1), 512).failed(ABRT);
    ask(&mut machine, sanitize(BLOCK_ERASE, 0)).unwrap();
    assert_eq!(ended(&mut machine), Ok((SUCCEEDED, 0xffff)));
    assert!(is_erased(&machine));
}

#[test]
fn a_failure_with_the_failure_mode_can_be_left() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    fail(&mut machine, FAILURE_MODE);
    assert_eq!(status(&mut machine), Err(1));
    assert_eq!(ask(&mut machine, sanitize(STATUS, 1)), Ok((0, 0xffff)));
    read(&mut machine, command(opcode::READ_DMA_EXT, 0, 1), 512).ok();
    power_cycle(&mut machine, &folder);
    assert_eq!(status(&mut machine), Ok((0, 0xffff)));
}

#[test]
fn a_freeze_lock_lasts_until_a_hardware_reset_unless_something_forbids_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    for _ in 0..2 {
        assert_eq!(ask(&mut machine, sanitize(FREEZE, 0)), Ok((FROZEN, 0xffff)));
    }
    assert_eq!(ask(&mut machine, sanitize(BLOCK_ERASE, 0)), Err(3));
    assert_eq!(ask(&mut machine, sanitize(ANTIFREEZE, 0)), Err(3));
    read(&mut machine, command(opcode::READ_DMA_EXT, 0, 1), 512).ok();
    comreset(&mut machine);
    assert_eq!(status(&mut machine), Ok((0, 0xffff)));
    let locked = ask(&mut machine, sanitize(ANTIFREEZE, 0));
    assert_eq!(locked, Ok((ANTIFROZEN, 0xffff)));
    assert_eq!(ask(&mut machine, sanitize(FREEZE, 0)), Err(4));
    comreset(&mut machine);
    assert_eq!(ask(&mut machine, sanitize(FREEZE, 0)), Ok((FROZEN, 0xffff)));
    power_cycle(&mut machine, &folder);
    assert_eq!(status(&mut machine), Ok((0, 0xffff)));
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
}

#[test]
fn a_wrong_key_and_a_locked_disk_erase_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    for features in 0..0x100 {
        for lba in [1, 0x426b_4573, 0x4f56_0102_0304, u64::MAX >> 16] {
            let task = TaskFile {
                lba,
                ..sanitize(features, 0xff)
            };
            let answer = ask(&mut machine, task);
            assert_eq!(answer.is_ok(), features == STATUS, "{features:x} {lba:x}");
        }
    }
    let mut password = [0; 512];
    password[2] = b'x';
    write(
        &mut machine,
        command(opcode::SECURITY_SET_PASSWORD, 0, 0),
        &password,
    )
    .ok();
    power_cycle(&mut machine, &folder);
    assert_eq!(ask(&mut machine, sanitize(BLOCK_ERASE, 0)), Err(0));
    assert_eq!(ask(&mut machine, sanitize(OVERWRITE, 1)), Err(0));
    assert_eq!(status(&mut machine), Ok((0, 0xffff)));
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
    // A sidecar that cannot be written is an operation that does not begin.
    write(
        &mut machine,
        command(opcode::SECURITY_UNLOCK, 0, 0),
        &password,
    )
    .ok();
    std::fs::remove_dir_all(folder.path()).unwrap();
    assert_eq!(ask(&mut machine, sanitize(BLOCK_ERASE, 0)), Err(0));
    let prepare = command(opcode::SECURITY_ERASE_PREPARE, 0, 0);
    plain(&mut machine, prepare).ok();
    let set = run(
        &mut machine,
        &Issue {
            task: command(opcode::SECURITY_SET_PASSWORD, 0, 0),
            write: true,
            data: &[(DATA, 512)],
            ..Issue::default()
        },
    );
    set.failed(ABRT);
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
}
