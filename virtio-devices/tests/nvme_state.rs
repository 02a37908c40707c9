//! Save and restore: a controller that goes on elsewhere, with everything that its host can see.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use block::DiskFile;
use nvme_common::{DATA, Guest, PAGE, Setup, le32, le64, read, write};
use serde_json::json;
use virtio_devices::nvme::{NvmeConfig, Status, driver::Entry};

fn feature(id: u32) -> Entry {
    Entry::new(0x0a).cdw(10, id)
}

fn set(id: u32, value: u32) -> Entry {
    Entry::new(9).cdw(10, id).cdw(11, value)
}

#[test]
fn a_saved_controller_goes_on_elsewhere() {
    let mut guest = Guest::with_queues(Setup::default(), 2);
    guest.admin_ok(set(0x0b, 0x100));
    guest.admin_ok(set(6, 0));
    let request = guest.post_admin(Entry::new(0x0c));
    guest.fill(DATA, 512, 3);
    guest.io_ok(write(0, 1));
    guest.post(1, &[read(0, 1)]);
    guest.process();
    let state = guest.save();
    let other = Guest::with(Setup::default());
    other.disks[0].write(0, &guest.disks[0].contents());
    let mut other = guest.moved_to(other, &state);
    assert!(other.ready());
    assert_eq!(other.poll(1).len(), 1);
    assert_eq!(other.admin_ok(feature(6)), 0);
    other.fill(DATA, 512, 0);
    other.io_ok(read(0, 1));
    assert_eq!(other.bytes(DATA, 512), [3; 512]);
    other.disks[0].resize(2 << 20).unwrap();
    other.process();
    assert_eq!(other.take_admin(request).unwrap().dw0, 0x0004_0002);
}

#[test]
fn an_impossible_saved_state_is_refused() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    assert!(!guest.admin(Entry::new(0x7f)).status.is_success());
    let good = serde_json::to_value(guest.save()).unwrap();
    let event = json!({"kind": 2, "information": 0, "log": 4});
    let unknown = json!({"kind": 7, "information": 0, "log": 4});
    let notice = json!({"count": 1, "kind": 1, "nsid": 1});
    let error = good["events"]["errors"][0].clone();
    for (path, value) in [
        ("/version", 9),
        ("/workers/1/sqs/0/size", 1),
        ("/workers/1/sqs/0/size", 5000),
        ("/workers/1/sqs/0/head", 64),
        ("/workers/1/sqs/0/id", 200),
        ("/workers/1/sqs/0/cq", 3),
        ("/workers/1/cqs/0/tail", 64),
        ("/workers/1/cqs/0/vector", 77),
        ("/namespaces/0/nsid", 7),
        ("/namespaces/0/lba_size", 3),
    ]
    .map(|(path, value)| (path, json!(value)))
    .into_iter()
    .chain([
        (
            "/shadow",
            json!({"doorbells": u64::MAX - 7, "event_index": 0}),
        ),
        ("/events/pending", json!(vec![&event; 7])),
        ("/events/pending", json!([unknown])),
        ("/events/masked", json!([unknown])),
        ("/events/changed", json!((0..1026).collect::<Vec<u32>>())),
        ("/events/notices", json!(vec![&notice; 65])),
        ("/events/errors", json!(vec![&error; 65])),
    ]) {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        let bad = serde_json::from_value(bad).unwrap();
        let other = Guest::with(Setup::default());
        assert!(other.controller.restore(&bad).is_err(), "{path}");
        assert!(!other.ready());
    }
}

/// The error log, and SMART.
fn logs(guest: &mut Guest) -> [Vec<u8>; 2] {
    [guest.log(1, 4096), guest.log(2, 512)]
}

/// Writes 4 KiB, `count` times.
fn write_much(guest: &mut Guest, count: usize) {
    for _ in 0..count {
        guest.io_ok(write(0, 8));
    }
}

#[test]
fn the_error_log_and_what_smart_counts_go_on_elsewhere() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    // 500 KiB are more than one unit of 512000 bytes.
    write_much(&mut guest, 126);
    guest.io_ok(read(0, 1));
    for slba in [1 << 40, 2 << 40, 3 << 40] {
        assert_eq!(guest.status(read(slba, 1)), Status::LBA_OUT_OF_RANGE);
    }
    assert!(!guest.admin(Entry::new(0x7f)).status.is_success());
    let before = logs(&mut guest);
    let count = |errors: &[u8], at: usize| (le64(errors, at * 64), le64(errors, at * 64 + 16));
    assert_eq!(count(&before[0], 0), (4, 0));
    assert_eq!(count(&before[0], 1), (3, 3 << 40));
    assert_eq!(count(&before[0], 3), (1, 1 << 40));
    // Units and commands written, entries of the error log.
    let smart = |smart: &[u8]| [48, 80, 176].map(|at| le64(smart, at));
    assert_eq!(smart(&before[1]), [2, 126, 4]);

    // What the other controller has done before was for somebody else.
    let mut other = Guest::with_queues(Setup::default(), 1);
    write_much(&mut other, 300);
    assert!(!other.admin(Entry::new(0x7f)).status.is_success());
    other.disable();
    let state = guest.save();
    let mut other = guest.moved_to(other, &state);
    assert_eq!(logs(&mut other), before);
    write_much(&mut other, 126);
    assert_eq!(other.status(read(4 << 40, 1)), Status::LBA_OUT_OF_RANGE);
    let after = logs(&mut other);
    assert_eq!(count(&after[0], 0), (5, 4 << 40));
    assert_eq!(after[0][64..], before[0][..4096 - 64]);
    assert_eq!(smart(&after[1]), [3, 252, 5]);
}

#[test]
fn errors_that_found_no_room_are_logged_once() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let full: Vec<Entry> = (0..63).map(|_| read(0, 1)).collect();
    guest.post(0, &full);
    guest.process();
    let cids = guest.post(0, &[read(1 << 40, 1), read(2 << 40, 1)]);
    guest.process();
    let [before, _] = logs(&mut guest);
    assert_eq!(le64(&before, 0), 2);
    let state = guest.save();
    let mut other = guest.moved_to(Guest::with(Setup::default()), &state);
    let mut done = Vec::new();
    other.until("all of them", |other| {
        done.extend(other.poll(0));
        done.len() == 65
    });
    for cid in cids {
        let ended = done.iter().find(|it| it.cid == cid).unwrap();
        assert_eq!(ended.status, Status::LBA_OUT_OF_RANGE);
    }
    assert_eq!(logs(&mut other)[0], before);
}

fn host(guest: &mut Guest, id: u8) {
    guest.fill(PAGE, 16, id);
    guest.admin_ok(set(0x81, 1).data(PAGE, 0));
}

/// Registers with a key.
fn register(guest: &mut Guest, key: u64) {
    guest.put(PAGE, &[0_u64.to_le_bytes(), key.to_le_bytes()].concat());
    guest.io_ok(Entry::new(0x0d).nsid(1).data(PAGE, 0));
}

/// The one with this key preempts the registrations with another.
fn preempt(guest: &mut Guest, key: u64, other: u64) {
    guest.put(PAGE, &[key.to_le_bytes(), other.to_le_bytes()].concat());
    let acquire = Entry::new(0x11).nsid(1).data(PAGE, 0);
    guest.io_ok(acquire.cdw(10, 1 | 1 << 8));
}

/// Another controller for another host.
fn second(guest: &Guest) -> Guest {
    let mut second = Guest::of(&guest.subsystem, Vec::new(), NvmeConfig::default());
    second.enable();
    second.create_pair(1, 64);
    host(&mut second, 2);
    second
}

#[test]
fn reservation_notices_that_were_not_read_are_told_elsewhere() {
    const EVENT: u32 = 0x0080_0006;
    let mut one = Guest::with_queues(Setup::default(), 1);
    let mut two = second(&one);
    host(&mut one, 1);
    register(&mut two, 22);
    for _ in 0..2 {
        register(&mut one, 11);
        preempt(&mut two, 22, 11);
    }
    one.process();
    let state = one.save();
    let mut other = one.moved_to(Guest::with(Setup::default()), &state);
    // Who is registered moves, too: the second host goes on where it was.
    let mut two = second(&other);
    register(&mut other, 11);
    preempt(&mut two, 22, 11);
    for left in [2, 1, 0] {
        let request = other.post_admin(Entry::new(0x0c));
        other.process();
        assert_eq!(other.take_admin(request).unwrap().dw0, EVENT);
        let notice = other.log(0x80, 64);
        let (count, kind, nsid) = (le64(&notice, 0), notice[8], le32(&notice, 12));
        assert_eq!((count, kind, notice[9], nsid), (3 - left, 1, left as u8, 1));
    }
    let request = other.post_admin(Entry::new(0x0c));
    other.process();
    assert!(other.take_admin(request).is_none());
    assert_eq!(other.log(0x80, 64), vec![0; 64]);
}
