//! Sanitize: what it erases, what it says, and what becomes of one that fails or is interrupted.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use block::ErrorKind;
use nvme_common::{DATA, Guest, PAGE, le32, read, with_sidecar, write};
use virtio_devices::{
    nvme::{Status, driver::Entry},
    testing::Logged,
};

#[test]
fn sanitize_erases_everything_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    assert_eq!(le32(&guest.identify(1, 0), 328) & 7, 6);
    assert_eq!(guest.log(0, 1024)[0x81 * 4], 1);
    guest.fill(DATA, 4096, 5);
    guest.io_ok(write(0, 8));
    let request = guest.post_admin(Entry::new(0x0c));
    guest.process();
    guest.admin_ok(Entry::new(0x84).cdw(10, 3 | 2 << 4).cdw(11, 0x0102_0304));
    let mut event = None;
    guest.until("the end of sanitize", |guest| {
        event = guest.take_admin(request);
        event.is_some()
    });
    assert_eq!(event.unwrap().dw0, 0x0081_0106);
    let log = guest.log(0x81, 512);
    assert_eq!(le32(&log, 0), 0x0011_ffff);
    assert_eq!(le32(&log, 4), 3 | 2 << 4);
    guest.io_ok(read(0, 8));
    assert_eq!(guest.bytes(DATA, 8), [4, 3, 2, 1, 4, 3, 2, 1]);
    guest.admin_ok(Entry::new(0x84).cdw(10, 2));
    guest.until("block erase", |guest| guest.log(0x81, 512)[2] == 1);
    guest.io_ok(read(0, 8));
    assert_eq!(guest.bytes(DATA, 4096), [0; 4096]);
}

#[test]
fn sanitize_is_not_offered_where_data_would_stay() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, false), 1);
    assert_eq!(le32(&guest.identify(1, 0), 328), 0);
    assert_eq!(
        guest.admin(Entry::new(0x84).cdw(10, 2)).status,
        Status::INVALID_OPCODE
    );
    let log = Entry::new(2).nsid(u32::MAX).data(PAGE, 0).cdw(10, 0x81);
    assert_eq!(guest.admin(log).status, Status::INVALID_LOG_PAGE);
    assert_eq!(guest.log(0, 1024)[0x81 * 4], 0);
    assert_eq!(guest.log(5, 4096)[0x84 * 4], 0);
}

#[test]
fn a_sanitize_that_was_interrupted_goes_on_at_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let saved =
        r#"{"version":1,"sanitize":{"outcome":"InProgress","action":"BlockErase","cdw10":2}}"#;
    std::fs::write(folder.path().join("a.nvme"), saved).unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    guest.until("sanitize", |guest| guest.log(0x81, 512)[2] == 1);
    guest.io_ok(read(0, 1));
}

/// Block erase; with AUSE a failure can be left without another one.
const RESTRICTED: u32 = 2;
const UNRESTRICTED: u32 = 2 | 1 << 3;
const EXIT_FAILURE_MODE: u32 = 1;

fn sanitize(action: u32) -> Entry {
    Entry::new(0x84).cdw(10, action)
}

/// A guest whose disk has refused to be erased, and works now.
fn failed(folder: &tempfile::TempDir, action: u32) -> Guest {
    let mut guest = Guest::with_queues(with_sidecar(folder, true), 1);
    guest.disks[0].fail_with(|it| match it {
        Logged::Write { .. } => Some(ErrorKind::Io(5)),
        _ => None,
    });
    guest.admin_ok(sanitize(action));
    guest.until("the failure", |guest| guest.log(0x81, 512)[2] == 3);
    guest.disks[0].fail_with(|_| None);
    assert_eq!(guest.status(read(0, 1)), Status::SANITIZE_FAILED);
    guest
}

#[test]
fn a_failure_in_restricted_mode_ends_with_another_one_of_that_mode() {
    let folder = tempfile::tempdir().unwrap();
    drop(failed(&folder, RESTRICTED));
    // It lasts beyond a restart.
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    for action in [EXIT_FAILURE_MODE, UNRESTRICTED] {
        let refused = guest.admin(sanitize(action)).status;
        assert_eq!(refused, Status::SANITIZE_FAILED, "{action}");
        assert_eq!(guest.status(read(0, 1)), Status::SANITIZE_FAILED);
    }
    guest.admin_ok(sanitize(RESTRICTED));
    guest.until("the end", |guest| guest.log(0x81, 512)[2] == 1);
    guest.io_ok(read(0, 1));
}

#[test]
fn a_failure_in_unrestricted_mode_can_be_left_and_stays_so() {
    let folder = tempfile::tempdir().unwrap();
    drop(failed(&folder, UNRESTRICTED));
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    assert_eq!(guest.status(read(0, 1)), Status::SANITIZE_FAILED);
    guest.admin_ok(sanitize(EXIT_FAILURE_MODE));
    guest.io_ok(read(0, 1));
    drop(guest);
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    guest.io_ok(read(0, 1));
    assert_eq!(guest.log(0x81, 512)[2], 3, "the last one did fail");
    // There is nothing to leave, which is no error.
    guest.admin_ok(sanitize(EXIT_FAILURE_MODE));
}

#[test]
fn nothing_is_saved_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    let disk = guest.disks[0].clone();
    disk.hold_writes(true);
    guest.admin_ok(sanitize(RESTRICTED));
    guest.until("the first write", |_| disk.waiting_writes() == 1);
    // Another server would do it, too, and go on while this one still does.
    let refused = guest.controller.save(Vec::new()).unwrap_err().to_string();
    assert!(refused.contains("sanitize"), "{refused}");
    disk.hold_writes(false);
    guest.until("the end", |guest| guest.log(0x81, 512)[2] == 1);
    guest.controller.save(Vec::new()).unwrap();
}
