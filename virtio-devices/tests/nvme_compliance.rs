//! The cases of SPDK's NVMe compliance program, by their names; what each asks for is told here in our own
//! words.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{DATA, Guest, MEMORY, PAGE, Setup, le32, queue_addresses, read};
use virtio_devices::nvme::{Status, driver::Entry};

const DELETE_SQ: u8 = 0;
const CREATE_SQ: u8 = 1;
const GET_LOG_PAGE: u8 = 2;
const DELETE_CQ: u8 = 4;
const CREATE_CQ: u8 = 5;
const IDENTIFY: u8 = 6;
const SET_FEATURES: u8 = 9;
const GET_FEATURES: u8 = 10;
const NUMBER_OF_QUEUES: u32 = 7;

/// With one I/O queue pair.
fn guest() -> Guest {
    Guest::with_queues(Setup::default(), 1)
}

fn status(guest: &mut Guest, entry: Entry) -> Status {
    guest.admin(entry).status
}

fn delete(guest: &mut Guest, opcode: u8, id: u32) -> Status {
    status(guest, Entry::new(opcode).cdw(10, id))
}

fn create_sq(guest: &mut Guest, id: u16, last: u32, flags: u32) -> Status {
    let entry = Entry::new(CREATE_SQ).data(queue_addresses(id).0, 0);
    let entry = entry.cdw(10, u32::from(id) | last << 16).cdw(11, flags);
    status(guest, entry)
}

fn create_cq(guest: &mut Guest, id: u16, flags: u32) -> Status {
    let entry = Entry::new(CREATE_CQ).data(queue_addresses(id).1, 0);
    let entry = entry.cdw(10, u32::from(id) | 7 << 16).cdw(11, flags);
    status(guest, entry)
}

#[test]
fn admin_identify_ctrlr_verify_dptr() {
    let mut guest = guest();
    let identify = Entry::new(IDENTIFY).cdw(10, 1);
    assert!(status(&mut guest, identify.data(PAGE, 0)).is_success());
    // One KiB up to the end of the page, and no second pointer: three are missing.
    let short = identify.data(PAGE + 3072, 0);
    assert_eq!(status(&mut guest, short), Status::INVALID_FIELD);
    // A second one that is outside memory.
    let outside = identify.data(PAGE + 3072, MEMORY as u64);
    assert!(!status(&mut guest, outside).is_success());
}

#[test]
fn admin_identify_ctrlr_verify_fused() {
    let mut guest = guest();
    for fuse in [1, 2] {
        let entry = Entry::new(IDENTIFY).cdw(10, 1).data(PAGE, 0).flags(fuse);
        assert_eq!(status(&mut guest, entry), Status::INVALID_FIELD);
    }
}

#[test]
fn admin_identify_ns() {
    let mut guest = guest();
    let identify = Entry::new(IDENTIFY).data(PAGE, 0).cdw(10, 0);
    for nsid in [0, u32::MAX] {
        let got = status(&mut guest, identify.nsid(nsid));
        assert_eq!(got, Status::INVALID_NAMESPACE, "{nsid}");
    }
    let page = guest.identify(0, 1);
    let word = |at: usize| u64::from(u16::from_le_bytes([page[at], page[at + 1]])) + 1;
    if page[24] & 1 << 4 != 0 {
        // NPWG and NOWS, of blocks of 512 bytes, fit the largest transfer and each other.
        let (granularity, optimal) = (word(64), word(72));
        assert!(granularity * 512 <= 2 << 20 && optimal * 512 <= 2 << 20);
        assert_eq!(optimal % granularity, 0);
    }
    // One that is not there, but could be.
    assert_eq!(guest.identify(0, 2), [0; 4096]);
}

#[test]
fn admin_get_features_mandatory_features() {
    let mut guest = guest();
    for feature in [1, 2, 4, 5, 7, 8, 9, 10, 11] {
        // Error Recovery (5) is of a namespace; 0 is none.
        let nsid = u32::from(feature == 5);
        let entry = Entry::new(GET_FEATURES).cdw(10, feature).nsid(nsid);
        assert!(status(&mut guest, entry).is_success(), "{feature:#x}");
    }
    let recovery = Entry::new(GET_FEATURES).cdw(10, 5);
    assert_eq!(status(&mut guest, recovery), Status::INVALID_NAMESPACE);
}

#[test]
fn admin_get_features_optional_features() {
    let mut guest = guest();
    let get = |feature| Entry::new(GET_FEATURES).data(PAGE, 0).cdw(10, feature);
    // Host Behavior Support is there. Keep Alive is not: Identify says so (KAS), and it is an error.
    assert!(status(&mut guest, get(0x16)).is_success());
    let page = guest.identify(1, 0);
    assert_eq!(page[320..322], [0, 0]);
    assert_eq!(status(&mut guest, get(0x0f)), Status::INVALID_FIELD);
}

#[test]
fn admin_set_features_number_of_queues() {
    let mut guest = Guest::new();
    let set = |value| {
        Entry::new(SET_FEATURES)
            .cdw(10, NUMBER_OF_QUEUES)
            .cdw(11, value)
    };
    assert_eq!(status(&mut guest, set(u32::MAX)), Status::INVALID_FIELD);
    guest.create_pair(1, 64);
    let late = status(&mut guest, set(128 | 128 << 16));
    assert_eq!(late, Status::COMMAND_SEQUENCE_ERROR);
}

#[test]
fn admin_get_log_page_mandatory_logs() {
    let mut guest = guest();
    for (log, len) in [(1, 64), (2, 512), (3, 512)] {
        guest.log(log, len);
    }
}

#[test]
fn admin_get_log_page_with_lpo() {
    let mut guest = guest();
    let firmware = Entry::new(GET_LOG_PAGE).data(PAGE, 0).nsid(u32::MAX);
    let firmware = firmware.cdw(10, 3 | 127 << 16);
    let at = |offset| firmware.cdw(12, offset);
    assert!(status(&mut guest, at(0)).is_success());
    assert_eq!(status(&mut guest, at(516)), Status::INVALID_FIELD);
    assert!(status(&mut guest, at(4)).is_success());
}

#[test]
fn fabric_property_get() {
    let mut guest = guest();
    let entry = Entry::new(0x7f).cdw(10, 1);
    assert_eq!(status(&mut guest, entry), Status::INVALID_OPCODE);
}

#[test]
fn admin_delete_io_sq_use_admin_qid() {
    let mut guest = guest();
    let got = delete(&mut guest, DELETE_SQ, 0);
    assert_eq!(got, Status::INVALID_QUEUE_ID);
    guest.identify(1, 0);
}

#[test]
fn admin_delete_io_sq_delete_sq_twice() {
    let mut guest = guest();
    guest.io_ok(read(0, 1));
    assert!(delete(&mut guest, DELETE_SQ, 1).is_success());
    let again = delete(&mut guest, DELETE_SQ, 1);
    assert_eq!(again, Status::INVALID_QUEUE_ID);
    assert!(delete(&mut guest, DELETE_CQ, 1).is_success());
}

#[test]
fn admin_delete_io_cq_use_admin_qid() {
    let mut guest = guest();
    let got = delete(&mut guest, DELETE_CQ, 0);
    assert_eq!(got, Status::INVALID_QUEUE_ID);
    guest.identify(1, 0);
}

#[test]
fn admin_delete_io_cq_delete_cq_first() {
    let mut guest = guest();
    guest.io_ok(read(0, 1));
    let first = delete(&mut guest, DELETE_CQ, 1);
    assert_eq!(first, Status::INVALID_QUEUE_DELETION);
    assert!(delete(&mut guest, DELETE_SQ, 1).is_success());
    assert!(delete(&mut guest, DELETE_CQ, 1).is_success());
}

#[test]
fn admin_create_io_cq_verify_iv_pc() {
    let mut guest = Guest::new();
    let vector = create_cq(&mut guest, 1, 3 | 2048 << 16);
    assert_eq!(vector, Status::INVALID_INTERRUPT_VECTOR);
    let scattered = create_cq(&mut guest, 1, 2 | 1 << 16);
    assert_eq!(scattered, Status::INVALID_FIELD);
    assert!(create_cq(&mut guest, 1, 3 | 1 << 16).is_success());
    assert!(delete(&mut guest, DELETE_CQ, 1).is_success());
}

#[test]
fn admin_create_io_sq_verify_qsize_cqid() {
    let mut guest = guest();
    guest.io_ok(read(0, 1));
    let queues = guest.admin_ok(Entry::new(GET_FEATURES).cdw(10, NUMBER_OF_QUEUES));
    let last = queues >> 16;
    assert!(delete(&mut guest, DELETE_SQ, 1).is_success());
    let entries = (guest.read64(0) & 0xffff) as u32;
    for size in [0, entries + 1] {
        let got = create_sq(&mut guest, 1, size, 1 | 1 << 16);
        assert_eq!(got, Status::INVALID_QUEUE_SIZE, "{size}");
    }
    for cq in [0, last + 2] {
        let got = create_sq(&mut guest, 1, entries, 1 | cq << 16);
        assert_eq!(got, Status::INVALID_QUEUE_ID, "{cq}");
    }
    // One that could be, and is not there, has a status of its own.
    let missing = create_sq(&mut guest, 1, entries, 1 | 2 << 16);
    assert_eq!(missing, Status::COMPLETION_QUEUE_INVALID);
    assert!(create_sq(&mut guest, 1, entries, 1 | 1 << 16).is_success());
}

#[test]
fn admin_create_io_sq_verify_pc() {
    let mut guest = guest();
    assert!(delete(&mut guest, DELETE_SQ, 1).is_success());
    let scattered = create_sq(&mut guest, 1, 63, 1 << 16);
    assert_eq!(scattered, Status::INVALID_FIELD);
    assert!(create_sq(&mut guest, 1, 63, 1 | 1 << 16).is_success());
}

#[test]
fn admin_create_io_qp_max_qps() {
    let mut guest = Guest::new();
    let queues = guest.admin_ok(Entry::new(GET_FEATURES).cdw(10, NUMBER_OF_QUEUES));
    let count = (queues & 0xffff).min(queues >> 16) as u16 + 1;
    for id in 1..=count {
        guest.create_pair(id, 2);
    }
    let flags = 3;
    let more = create_cq(&mut guest, count + 1, flags);
    assert_eq!(more, Status::INVALID_QUEUE_ID);
    // All of them work.
    for pair in 0..usize::from(count) {
        assert!(guest.io_all(pair, &[read(0, 1)])[0].status.is_success());
    }
}

#[test]
fn admin_create_io_sq_shared_cq() {
    let mut guest = Guest::new();
    let set = Entry::new(SET_FEATURES).cdw(10, NUMBER_OF_QUEUES);
    guest.admin_ok(set.cdw(11, 3 | 1 << 16));
    for id in [1, 2] {
        let vector = u32::from(id);
        assert!(create_cq(&mut guest, id, 3 | vector << 16).is_success());
    }
    for (sq, cq) in [(1, 2), (2, 2), (3, 2), (4, 1)] {
        assert!(create_sq(&mut guest, sq, 7, 1 | cq << 16).is_success());
    }
    for sq in [1, 2] {
        assert!(delete(&mut guest, DELETE_SQ, sq).is_success());
    }
    let used = delete(&mut guest, DELETE_CQ, 2);
    assert_eq!(used, Status::INVALID_QUEUE_DELETION);
    for sq in [3, 4] {
        assert!(delete(&mut guest, DELETE_SQ, sq).is_success());
    }
    for cq in [2, 1] {
        assert!(delete(&mut guest, DELETE_CQ, cq).is_success());
    }
    assert_eq!(le32(&guest.bytes(DATA, 4), 0), 0);
}
