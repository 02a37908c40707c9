//! The Security feature set: states, passwords, the erase, resets and power cycles.

use virtio_devices::{
    ahci::{
        HbaState,
        driver::{Issue, command, queued},
        regs::px,
    },
    ata::{TaskFile, opcode},
    testing::MockDisk,
};

use crate::{
    common::{DATA, Machine, Setup},
    protected::{
        comreset, device, is_erased, log, machine, plain, power_cycle, read, run, setup, sidecar,
        until, word, write,
    },
};

const ABRT: u8 = 4;
const USER: u16 = 0;
const MASTER: u16 = 1;
const MAXIMUM: u16 = 1 << 8;
const ENHANCED: u16 = 2;

/// Bits of word 128.
const ENABLED: u16 = 2;
const LOCKED: u16 = 4;
const FROZEN: u16 = 8;
const EXPIRED: u16 = 0x10;

fn data(control: u16, password: &str) -> [u8; 512] {
    let mut data = [0; 512];
    data[..2].copy_from_slice(&control.to_le_bytes());
    data[2..2 + password.len()].copy_from_slice(password.as_bytes());
    data
}

fn task(code: u8) -> TaskFile {
    command(code, 0, 0)
}

#[track_caller]
fn with_password(machine: &mut Machine, code: u8, control: u16, password: &str) -> bool {
    let outcome = write(machine, task(code), &data(control, password));
    if outcome.status & 1 == 0 {
        outcome.ok();
        return true;
    }
    outcome.failed(ABRT);
    false
}

fn set(machine: &mut Machine, control: u16, password: &str) -> bool {
    with_password(machine, opcode::SECURITY_SET_PASSWORD, control, password)
}

fn unlock(machine: &mut Machine, control: u16, password: &str) -> bool {
    with_password(machine, opcode::SECURITY_UNLOCK, control, password)
}

fn disable(machine: &mut Machine, control: u16, password: &str) -> bool {
    with_password(
        machine,
        opcode::SECURITY_DISABLE_PASSWORD,
        control,
        password,
    )
}

fn erase(machine: &mut Machine, control: u16, password: &str) -> bool {
    plain(machine, task(opcode::SECURITY_ERASE_PREPARE)).ok();
    with_password(machine, opcode::SECURITY_ERASE_UNIT, control, password)
}

#[track_caller]
fn state(machine: &mut Machine) -> u16 {
    let state = word(machine, 128);
    assert_eq!(state & 1, 1, "supported");
    assert_eq!(word(machine, 85) & 2 != 0, state & ENABLED != 0);
    let status = log(machine, 6, 2);
    assert_eq!(status >> 63, 1);
    let bits = u64::from((state & 1) << 6 | (state >> 8) << 5 | state >> 1 & 15);
    assert_eq!(status & 0xff, bits);
    state & !1
}

fn can_read(machine: &mut Machine) -> bool {
    let read = read(machine, command(opcode::READ_DMA_EXT, 0, 1), 512);
    read.status & 1 == 0
}

#[test]
fn nothing_is_offered_without_a_sidecar_or_where_copies_stay() {
    let folder = tempfile::tempdir().unwrap();
    let mut copies = setup(&folder);
    copies.disk.capabilities.overwrite = false;
    let mut read_only = setup(&folder);
    read_only.device.read_only = true;
    let mut without = setup(&folder);
    without.device.sidecar = None;
    for setup in [copies, read_only, without, Setup::default()] {
        let mut machine = Machine::new(setup);
        for (at, mask) in [(59, 0xfe00), (82, 2), (85, 2), (92, !0), (128, !0)] {
            assert_eq!(word(&mut machine, at) & mask, 0, "word {at}");
        }
        assert_eq!(log(&mut machine, 0, 1) & 0xff, 4, "no security page");
        let page = command(opcode::READ_LOG_EXT, 0x630, 1);
        read(&mut machine, page, 512).failed(ABRT);
        for code in [0xb4, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6] {
            plain(&mut machine, task(code)).failed(ABRT);
        }
    }
    assert!(!folder.path().join("disk.ata").exists());
}

#[test]
fn a_password_locks_the_disk_at_the_next_power_cycle() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert_eq!(word(&mut machine, 82) & 2, 2);
    assert_eq!((state(&mut machine), word(&mut machine, 92)), (0, 0xfffe));
    assert!(set(&mut machine, USER, "a secret"));
    assert!(!sidecar(&folder).contains("secret"), "not in clear");
    assert_eq!(state(&mut machine), ENABLED);
    assert!(can_read(&mut machine));
    power_cycle(&mut machine, &folder);
    assert_eq!(state(&mut machine), ENABLED | LOCKED);
    for task in [
        command(opcode::READ_DMA_EXT, 0, 1),
        command(opcode::READ_SECTORS, 0, 1),
        command(opcode::READ_VERIFY_EXT, 0, 1),
        command(opcode::FLUSH_CACHE_EXT, 0, 0),
        queued(0, false, 0, 1),
        task(opcode::SECURITY_FREEZE_LOCK),
    ] {
        read(&mut machine, task, 512).failed(ABRT);
        if task.command == opcode::READ_FPDMA_QUEUED {
            read(&mut machine, command(opcode::READ_LOG_EXT, 0x10, 1), 512).ok();
        }
    }
    for task in [
        command(opcode::WRITE_DMA_EXT, 0, 1),
        TaskFile {
            features: 1,
            ..command(opcode::DATA_SET_MANAGEMENT, 0, 1)
        },
        task(opcode::SECURITY_SET_PASSWORD),
        task(opcode::SECURITY_DISABLE_PASSWORD),
    ] {
        write(&mut machine, task, &data(USER, "a secret")).failed(ABRT);
    }
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
    plain(&mut machine, task(opcode::STANDBY_IMMEDIATE)).ok();
    assert!(!unlock(&mut machine, USER, "a secreT"));
    assert!(!can_read(&mut machine));
    assert!(unlock(&mut machine, USER, "a secret"));
    assert_eq!(state(&mut machine), ENABLED);
    assert!(can_read(&mut machine));
    assert!(!disable(&mut machine, USER, "another"));
    assert!(disable(&mut machine, USER, "a secret"));
    assert_eq!(state(&mut machine), 0);
    power_cycle(&mut machine, &folder);
    assert_eq!(state(&mut machine), 0);
    assert!(!unlock(&mut machine, USER, ""), "there is no user password");
}

#[test]
fn five_wrong_passwords_are_the_last_until_a_power_cycle() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(set(&mut machine, USER, "one"));
    power_cycle(&mut machine, &folder);
    for _ in 0..5 {
        assert_eq!(state(&mut machine), ENABLED | LOCKED);
        assert!(!unlock(&mut machine, USER, "two"));
    }
    for _ in 0..2 {
        assert_eq!(state(&mut machine), ENABLED | LOCKED | EXPIRED);
        assert!(!unlock(&mut machine, USER, "one"));
        assert!(!erase(&mut machine, USER, "one"));
        comreset(&mut machine);
    }
    power_cycle(&mut machine, &folder);
    assert!(unlock(&mut machine, USER, "one"));
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
}

#[test]
fn a_comreset_locks_only_without_software_settings_preservation() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(set(&mut machine, USER, "one"));
    comreset(&mut machine);
    assert_eq!(state(&mut machine), ENABLED);
    plain(&mut machine, task(opcode::SECURITY_FREEZE_LOCK)).ok();
    comreset(&mut machine);
    assert_eq!(state(&mut machine), ENABLED | FROZEN);
    let off = TaskFile {
        features: 0x90,
        count: 6,
        ..task(opcode::SET_FEATURES)
    };
    plain(&mut machine, off).ok();
    comreset(&mut machine);
    assert_eq!(state(&mut machine), ENABLED | LOCKED);
}

#[test]
fn a_frozen_disk_keeps_its_passwords_until_a_power_cycle() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    plain(&mut machine, task(opcode::SECURITY_FREEZE_LOCK)).ok();
    plain(&mut machine, task(opcode::SECURITY_FREEZE_LOCK)).ok();
    assert_eq!(state(&mut machine), FROZEN);
    assert!(!set(&mut machine, USER, "one"));
    assert!(!unlock(&mut machine, USER, "one"));
    assert!(!disable(&mut machine, USER, "one"));
    plain(&mut machine, task(opcode::SECURITY_ERASE_PREPARE)).failed(ABRT);
    assert!(can_read(&mut machine));
    power_cycle(&mut machine, &folder);
    assert_eq!(state(&mut machine), 0);
    assert!(set(&mut machine, USER, "one"));
}

#[test]
fn the_master_password_opens_unless_the_level_is_maximum() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(!unlock(&mut machine, MASTER, ""), "nobody has set one");
    let mut master = data(MASTER, "lord");
    master[34..36].copy_from_slice(&0x1234u16.to_le_bytes());
    write(&mut machine, task(opcode::SECURITY_SET_PASSWORD), &master).ok();
    assert_eq!(word(&mut machine, 92), 0x1234);
    assert_eq!(log(&mut machine, 6, 1) & 0xffff, 0x1234);
    // An identifier of 0 changes nothing.
    assert!(set(&mut machine, MASTER, "lord"));
    assert_eq!((word(&mut machine, 92), state(&mut machine)), (0x1234, 0));
    assert!(set(&mut machine, USER, "one"));
    power_cycle(&mut machine, &folder);
    assert!(unlock(&mut machine, MASTER, "lord"));
    assert!(set(&mut machine, USER | MAXIMUM, "one"));
    assert_eq!(state(&mut machine), ENABLED | MAXIMUM);
    power_cycle(&mut machine, &folder);
    for _ in 0..6 {
        assert!(!unlock(&mut machine, MASTER, "lord"));
    }
    assert_eq!(
        state(&mut machine),
        ENABLED | LOCKED | MAXIMUM,
        "not counted"
    );
    assert!(erase(&mut machine, MASTER, "lord"), "but it can erase");
    assert!(is_erased(&machine));
    assert_eq!(state(&mut machine), 0);
    assert!(disable(&mut machine, MASTER, "lord"), "it stays");
}

#[test]
fn an_erase_is_prepared_right_before_and_takes_everything() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(!erase(&mut machine, USER, ""), "there is no user password");
    assert!(set(&mut machine, USER, "one"));
    let unit = opcode::SECURITY_ERASE_UNIT;
    assert!(
        !with_password(&mut machine, unit, USER, "one"),
        "not prepared"
    );
    plain(&mut machine, task(opcode::SECURITY_ERASE_PREPARE)).ok();
    assert_eq!(state(&mut machine), ENABLED);
    assert!(
        !with_password(&mut machine, unit, USER, "one"),
        "not at once"
    );
    assert!(!erase(&mut machine, USER | ENHANCED, "one"), "not offered");
    assert!(!erase(&mut machine, USER, "two"));
    assert!(!with_password(&mut machine, unit, USER, "one"), "only once");
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
    power_cycle(&mut machine, &folder);
    assert_eq!(state(&mut machine), ENABLED | LOCKED);
    assert!(erase(&mut machine, USER, "one"));
    assert!(is_erased(&machine));
    assert_eq!(state(&mut machine), 0);
    assert!(can_read(&mut machine));
    power_cycle(&mut machine, &folder);
    assert_eq!(state(&mut machine), 0);
}

#[test]
fn an_erase_that_fails_or_is_reset_leaves_the_password() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(set(&mut machine, USER, "one"));
    machine.disk.fail_with(|_| Some(block::ErrorKind::Io(5)));
    assert!(!erase(&mut machine, USER, "one"));
    assert_eq!(state(&mut machine), ENABLED);
    machine.disk.fail_with(|_| None);
    machine.disk.hold_writes(true);
    plain(&mut machine, task(opcode::SECURITY_ERASE_PREPARE)).ok();
    machine.driver.put(DATA, &data(USER, "one"));
    machine.driver.prepare(
        0,
        &Issue {
            task: task(opcode::SECURITY_ERASE_UNIT),
            write: true,
            data: &[(DATA, 512)],
            ..Issue::default()
        },
    );
    machine.driver.issue();
    until(&mut machine, "the first write", |it| {
        it.disk.waiting_writes() == 1
    });
    machine.driver.stop();
    machine.driver.set(px::SCTL, 0x301);
    machine.driver.set(px::SCTL, 0x300);
    machine.work();
    assert!(!machine.hba.is_idle(), "it waits for the erase to end");
    machine.disk.hold_writes(false);
    comreset(&mut machine);
    assert_eq!(machine.disk.contents()[1 << 20..2 << 20], [7; 1 << 20]);
    assert_eq!(state(&mut machine), ENABLED);
    assert!(erase(&mut machine, USER, "one"));
    assert!(is_erased(&machine));
}

#[test]
fn a_saved_state_has_what_the_sidecar_has_not() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    assert!(set(&mut machine, USER, "one"));
    power_cycle(&mut machine, &folder);
    assert!(!unlock(&mut machine, USER, "two"));
    let saved = machine.hba.save().unwrap();
    // The other machine had looked at the sidecar before.
    let mut other = Machine::new(setup(&folder));
    assert!(unlock(&mut other, USER, "one"));
    other.driver.stop();
    other.work();
    other.hba.restore(&saved).unwrap();
    other.recover();
    assert_eq!(state(&mut other), ENABLED | LOCKED);
    for _ in 0..4 {
        assert!(!unlock(&mut other, USER, "two"));
    }
    assert_eq!(state(&mut other), ENABLED | LOCKED | EXPIRED);
    // Unlocked and prepared, it stays so.
    assert!(unlock(&mut machine, USER, "one"));
    plain(&mut machine, task(opcode::SECURITY_ERASE_PREPARE)).ok();
    let saved = machine.hba.save().unwrap();
    other.hba.restore(&saved).unwrap();
    other.recover();
    assert!(with_password(
        &mut other,
        opcode::SECURITY_ERASE_UNIT,
        USER,
        "one"
    ));
}

#[test]
fn a_hostile_saved_state_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(&folder);
    let saved = serde_json::to_string(&machine.hba.save().unwrap()).unwrap();
    for (field, bad) in [
        (r#""attempts":5"#, r#""attempts":6"#),
        (r#""locked":false"#, r#""locked":true"#),
        (
            r#""sanitize_frozen":false,"antifreeze":false"#,
            r#""sanitize_frozen":true,"antifreeze":true"#,
        ),
    ] {
        assert!(saved.contains(field), "{saved}");
        let state: HbaState = serde_json::from_str(&saved.replace(field, bad)).unwrap();
        assert!(machine.hba.restore(&state).is_err(), "{bad}");
    }
    let plain = Machine::new(Setup::default());
    let state: HbaState = serde_json::from_str(&saved).unwrap();
    assert!(plain.hba.restore(&state).is_err(), "it has no sidecar");
    assert!(machine.hba.restore(&plain.hba.save().unwrap()).is_err());
}

#[test]
fn a_sidecar_that_is_not_ours_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.ata");
    let machine = Machine::cold(Setup::default());
    let password = |rounds: u32| {
        let (salt, hash) = (vec![0; 16], vec![0; 32]);
        format!(
            r#"{{"version":1,"master_identifier":1,"user":{{"rounds":{rounds},"salt":{salt:?},"hash":{hash:?}}}}}"#
        )
    };
    for text in [
        "",
        r#"{"version":2,"master_identifier":1}"#,
        r#"{"version":1,"master_identifier":1,"lba_size":512}"#,
        r#"{"version":1,"master_identifier":1,"sanitize":{"action":"CryptoErase","failure_mode":false,"outcome":"Running"}}"#,
        &password(0),
        &password(u32::MAX),
    ] {
        std::fs::write(&path, text).unwrap();
        let disk = MockDisk::new(setup(&folder).disk);
        let plugged = machine.hba.plug_disk(1, Box::new(disk), device(&folder));
        let error = plugged.unwrap_err().to_string();
        assert!(error.contains("disk.ata"), "{text}: {error}");
    }
    std::fs::write(&path, password(1)).unwrap();
    let disk = MockDisk::new(setup(&folder).disk);
    machine
        .hba
        .plug_disk(1, Box::new(disk), device(&folder))
        .unwrap();
}

#[test]
fn a_password_without_data_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder);
    for code in 0xf1..=0xf6 {
        let short = run(
            &mut machine,
            &Issue {
                task: task(code),
                write: true,
                data: &[(DATA, 510)],
                ..Issue::default()
            },
        );
        let plain = matches!(code, 0xf3 | 0xf5);
        assert_eq!(short.status & 1 == 0, plain, "{code:x}");
        power_cycle(&mut machine, &folder);
    }
    assert_eq!(state(&mut machine), 0);
    assert_eq!(machine.disk.contents()[..512], [7; 512]);
}
