//! Reservations between controllers, and those that survive a restart.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{Guest, PAGE, Setup, le32, le64, read, write};
use virtio_devices::{
    nvme::{NamespaceConfig, NvmeConfig, Status, driver::Entry},
    testing::MockDiskConfig,
};

fn set(id: u32, value: u32) -> Entry {
    Entry::new(9).cdw(10, id).cdw(11, value)
}

fn host(guest: &mut Guest, id: u8) {
    guest.fill(PAGE, 16, id);
    guest.admin_ok(set(0x81, 1).data(PAGE, 0));
}

fn keys(guest: &Guest, current: u64, other: u64) {
    guest.put(PAGE, &current.to_le_bytes());
    guest.put(PAGE + 8, &other.to_le_bytes());
}

#[test]
fn reservations_keep_the_other_host_out() {
    let mut one = Guest::with_queues(Setup::default(), 1);
    let mut two = Guest::of(&one.subsystem, Vec::new(), NvmeConfig::default());
    two.enable();
    two.create_pair(1, 64);
    let register = Entry::new(0x0d).nsid(1).data(PAGE, 0);
    let acquire = Entry::new(0x11).nsid(1).data(PAGE, 0);
    let release = Entry::new(0x15).nsid(1).data(PAGE, 0);
    assert_eq!(one.status(register), Status::COMMAND_SEQUENCE_ERROR);
    host(&mut one, 1);
    host(&mut two, 2);
    keys(&one, 0, 11);
    one.io_ok(register);
    keys(&two, 0, 22);
    two.io_ok(register);
    // Write exclusive.
    keys(&one, 11, 0);
    one.io_ok(acquire.cdw(10, 1 << 8));
    one.io_ok(write(0, 1));
    two.io_ok(read(0, 1));
    assert_eq!(two.status(write(0, 1)), Status::RESERVATION_CONFLICT);
    let mut report = vec![0; 192];
    one.io_ok(
        Entry::new(0x0e)
            .nsid(1)
            .data(PAGE, 0)
            .cdw(10, 47)
            .cdw(11, 1),
    );
    report.copy_from_slice(&one.bytes(PAGE, 192));
    assert_eq!((report[4], report[5]), (1, 2));
    assert_eq!(report[64 + 2], 1);
    assert_eq!(le64(&report, 128 + 8), 22);
    // The other host preempts it, and the first is told.
    let request = one.post_admin(Entry::new(0x0c));
    one.process();
    keys(&two, 22, 11);
    two.io_ok(acquire.cdw(10, 1 | 2 << 8));
    one.process();
    assert_eq!(one.take_admin(request).unwrap().dw0, 0x0080_0006);
    let notice = one.log(0x80, 64);
    assert_eq!((notice[8], le32(&notice, 12)), (1, 1));
    assert_eq!(one.status(read(0, 1)), Status::RESERVATION_CONFLICT);
    two.io_ok(write(0, 1));
    keys(&two, 22, 0);
    two.io_ok(release.cdw(10, 2 << 8));
    one.io_ok(read(0, 1));
}

fn with_sidecar(folder: &tempfile::TempDir) -> Guest {
    let config = NamespaceConfig {
        sidecar: Some(folder.path().join("a.nvme")),
        ..NamespaceConfig::default()
    };
    let setup = Setup {
        disks: vec![(MockDiskConfig::default(), config)],
        ..Setup::default()
    };
    Guest::with_queues(setup, 1)
}

/// CPTPL of Reservation Register.
const CLEAR: u32 = 2 << 30;
const PERSIST: u32 = 3 << 30;

/// Registers with a key, and reserves for writing alone.
fn reserve(guest: &mut Guest, persistence: u32) {
    host(guest, 1);
    keys(guest, 0, 11);
    let register = Entry::new(0x0d).nsid(1).data(PAGE, 0);
    guest.io_ok(register.cdw(10, persistence));
    keys(guest, 11, 0);
    guest.io_ok(Entry::new(0x11).nsid(1).data(PAGE, 0).cdw(10, 1 << 8));
}

/// Type, registrants and PTPLS of a report.
fn report(guest: &mut Guest) -> (u8, u8, u8) {
    let entry = Entry::new(0x0e).nsid(1).data(PAGE, 0);
    guest.io_ok(entry.cdw(10, 47).cdw(11, 1));
    let report = guest.bytes(PAGE, 64);
    (report[4], report[5], report[9])
}

#[test]
fn a_persistent_reservation_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = with_sidecar(&folder);
    assert_eq!(guest.identify(0, 1)[31] & 1, 1, "RESCAP");
    reserve(&mut guest, PERSIST);
    assert_eq!(report(&mut guest), (1, 1, 1));
    drop(guest);
    let mut guest = with_sidecar(&folder);
    assert_eq!(report(&mut guest), (1, 1, 1));
    host(&mut guest, 2);
    assert_eq!(guest.status(write(0, 1)), Status::RESERVATION_CONFLICT);
    guest.io_ok(read(0, 1));
    drop(guest);
    // Its holder comes back, and gives it up.
    let mut guest = with_sidecar(&folder);
    host(&mut guest, 1);
    guest.io_ok(write(0, 1));
    keys(&guest, 11, 0);
    guest.io_ok(Entry::new(0x15).nsid(1).data(PAGE, 0).cdw(10, 1 << 8));
    drop(guest);
    let mut guest = with_sidecar(&folder);
    assert_eq!(report(&mut guest), (0, 1, 1), "the registration stays");
    host(&mut guest, 2);
    guest.io_ok(write(0, 1));
}

#[test]
fn a_reservation_that_is_not_persistent_is_gone_after_a_restart() {
    for persistence in [0, CLEAR] {
        let folder = tempfile::tempdir().unwrap();
        let mut guest = with_sidecar(&folder);
        reserve(&mut guest, persistence);
        assert_eq!(report(&mut guest), (1, 1, 0));
        drop(guest);
        let mut guest = with_sidecar(&folder);
        assert_eq!(report(&mut guest), (0, 0, 0));
        host(&mut guest, 2);
        guest.io_ok(write(0, 1));
    }
}

#[test]
fn persistence_is_a_feature_too() {
    let folder = tempfile::tempdir().unwrap();
    let get = Entry::new(0x0a).nsid(1).cdw(10, 0x83);
    let mut guest = with_sidecar(&folder);
    reserve(&mut guest, 0);
    assert_eq!(guest.admin_ok(get), 0);
    guest.admin_ok(set(0x83, 1).nsid(1));
    assert_eq!(guest.admin_ok(get), 1);
    drop(guest);
    let mut guest = with_sidecar(&folder);
    assert_eq!(report(&mut guest), (1, 1, 1));
    assert_eq!(guest.admin_ok(get), 1);
    guest.admin_ok(set(0x83, 0).nsid(1));
    drop(guest);
    assert_eq!(report(&mut with_sidecar(&folder)), (0, 0, 0));
    // Without a sidecar there is nothing to remember it in.
    let mut guest = Guest::with_queues(Setup::default(), 1);
    assert_eq!(guest.identify(0, 1)[31] & 1, 0, "RESCAP");
    let refused = guest.admin(set(0x83, 1).nsid(1)).status;
    assert_eq!(refused, Status::INVALID_FIELD);
    host(&mut guest, 1);
    keys(&guest, 0, 11);
    let register = Entry::new(0x0d).nsid(1).data(PAGE, 0).cdw(10, PERSIST);
    assert_eq!(guest.status(register), Status::INVALID_FIELD);
    assert_eq!(report(&mut guest), (0, 0, 0));
}

#[test]
fn a_host_identifier_is_set_once() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let get = Entry::new(0x0a).data(PAGE, 0).cdw(10, 0x81).cdw(11, 1);
    host(&mut guest, 7);
    guest.fill(PAGE, 16, 0);
    guest.admin_ok(get);
    assert_eq!(guest.bytes(PAGE, 16), [7; 16]);
    host(&mut guest, 7);
    guest.fill(PAGE, 16, 8);
    let other = guest.admin(set(0x81, 1).data(PAGE, 0)).status;
    assert_eq!(other, Status::COMMAND_SEQUENCE_ERROR);
    guest.admin_ok(get);
    assert_eq!(guest.bytes(PAGE, 16), [7; 16]);
}

#[test]
fn masked_notices_are_neither_told_nor_logged() {
    let mut one = Guest::with_queues(Setup::default(), 1);
    let mut two = Guest::of(&one.subsystem, Vec::new(), NvmeConfig::default());
    two.enable();
    two.create_pair(1, 64);
    host(&mut one, 1);
    host(&mut two, 2);
    let register = Entry::new(0x0d).nsid(1).data(PAGE, 0);
    let preempt = Entry::new(0x11).nsid(1).data(PAGE, 0).cdw(10, 1 | 1 << 8);
    keys(&two, 0, 22);
    two.io_ok(register);
    for masked in [true, false] {
        // Registration Preempted is bit 1.
        let mask = u32::from(masked) << 1;
        one.admin_ok(set(0x82, mask).nsid(u32::MAX));
        let get = Entry::new(0x0a).nsid(1).cdw(10, 0x82);
        assert_eq!(one.admin_ok(get), mask);
        keys(&one, 0, 11);
        one.io_ok(register);
        let request = one.post_admin(Entry::new(0x0c));
        keys(&two, 22, 11);
        two.io_ok(preempt);
        one.process();
        let told = one.take_admin(request);
        assert_eq!(told.is_none(), masked);
        let notice = one.log(0x80, 64);
        assert_eq!(notice[8], u8::from(!masked), "{notice:?}");
        if masked {
            let cid = u32::from(request) << 16;
            assert_eq!(one.admin_ok(Entry::new(8).cdw(10, cid)), 0);
        } else {
            assert_eq!(le32(&notice, 12), 1);
            assert_eq!(one.log(0x80, 64)[8], 0, "it was read");
        }
    }
}
