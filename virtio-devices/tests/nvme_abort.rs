//! Abort of I/O commands: wherever they are, and not when the disk has them.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{DATA, Guest, PAGE, Setup, read, write};
use virtio_devices::{
    nvme::{NamespaceConfig, Status, driver::Entry},
    testing::{Logged, MockDiskConfig},
};

/// A disk that takes two requests at a time.
fn narrow() -> Setup {
    let disk = MockDiskConfig {
        capacity: 2,
        ..MockDiskConfig::default()
    };
    Setup {
        disks: vec![(disk, NamespaceConfig::default())],
        ..Setup::default()
    }
}

/// Dword 0: 0 says that it was aborted.
fn abort(guest: &mut Guest, queue: u16, cid: u16) -> u32 {
    guest.admin_ok(Entry::new(8).cdw(10, u32::from(queue) | u32::from(cid) << 16))
}

/// Identifiers and statuses of what has come back of a pair.
fn ended(guest: &mut Guest, pair: usize) -> Vec<(u16, Status)> {
    guest.process();
    let ended = guest.poll(pair);
    ended.iter().map(|it| (it.cid, it.status)).collect()
}

fn fused() -> [Entry; 2] {
    let compare = Entry::new(5).nsid(1).blocks(3, 1).data(DATA, 0);
    [compare.flags(1), write(3, 1).flags(2)]
}

fn written(guest: &Guest) -> Vec<u64> {
    let log = guest.disks[0].log();
    let offsets = log.iter().filter_map(|it| match it {
        Logged::Write { offset, .. } => Some(*offset / 512),
        _ => None,
    });
    offsets.collect()
}

#[test]
fn a_command_at_the_disk_or_nowhere_is_not_aborted() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let cid = guest.post_held(0, &[write(0, 1)])[0];
    assert_eq!(abort(&mut guest, 1, cid), 1);
    assert_eq!(abort(&mut guest, 1, 0x7777), 1);
    assert_eq!(abort(&mut guest, 2, cid), 1, "no such queue");
    assert_eq!(abort(&mut guest, 999, cid), 1);
    assert!(ended(&mut guest, 0).is_empty());
    guest.disks[0].release_all();
    assert_eq!(ended(&mut guest, 0), [(cid, Status::SUCCESS)]);
    assert_eq!(abort(&mut guest, 1, cid), 1, "it has ended");
}

#[test]
fn commands_that_were_not_taken_yet_never_reach_the_disk() {
    let mut guest = Guest::with_queues(narrow(), 1);
    let entries: Vec<Entry> = (0..5).map(|slba| write(slba, 1)).collect();
    let cids = guest.post_held(0, &entries);
    assert_eq!(guest.disks[0].held(), 2);
    // The next one needs no room to end.
    assert_eq!(abort(&mut guest, 1, cids[2]), 0);
    let first = [(cids[2], Status::ABORT_REQUESTED)];
    assert_eq!(ended(&mut guest, 0), first);
    // So does the last one, which others stand before. It cannot be aborted twice.
    assert_eq!(abort(&mut guest, 1, cids[4]), 0);
    assert_eq!(ended(&mut guest, 0), [(cids[4], Status::ABORT_REQUESTED)]);
    assert_eq!(abort(&mut guest, 1, cids[4]), 1);
    guest.let_disk_go();
    let mut rest = ended(&mut guest, 0);
    rest.sort_unstable_by_key(|it| it.0);
    let expected = [
        (cids[0], Status::SUCCESS),
        (cids[1], Status::SUCCESS),
        (cids[3], Status::SUCCESS),
    ];
    assert_eq!(rest, expected);
    assert_eq!(written(&guest), [0, 1, 3]);
    // A later command in the same place of the queue is another one.
    let again: Vec<Entry> = (0..63).map(|_| read(0, 1)).collect();
    for _ in 0..2 {
        let done = guest.io_all(0, &again);
        assert!(done.iter().all(|it| it.status.is_success()));
    }
}

#[test]
fn either_half_of_a_pair_at_the_gate_takes_the_other_with_it() {
    for half in 0..2 {
        let mut guest = Guest::with_queues(Setup::default(), 2);
        let before = guest.post_held(0, &[write(8, 1)])[0];
        let pair = guest.post(1, &fused());
        guest.process();
        assert_eq!(guest.disks[0].held(), 1, "the pair waits for the write");
        assert_eq!(abort(&mut guest, 2, pair[half]), 0);
        let mut statuses = [Status::ABORTED_FAILED_FUSED; 2];
        statuses[half] = Status::ABORT_REQUESTED;
        let expected = [(pair[0], statuses[0]), (pair[1], statuses[1])];
        assert_eq!(ended(&mut guest, 1), expected);
        // The gate is open again.
        guest.post(1, &[write(9, 1)]);
        guest.process();
        assert_eq!(guest.disks[0].held(), 2);
        guest.disks[0].release_all();
        assert_eq!(ended(&mut guest, 0), [(before, Status::SUCCESS)]);
        assert_eq!(ended(&mut guest, 1).len(), 1);
        assert_eq!(written(&guest), [8, 9]);
    }
}

#[test]
fn a_write_that_waits_for_a_pair_is_aborted_and_the_pair_is_not() {
    let mut guest = Guest::with_queues(Setup::default(), 2);
    let pair = guest.post_held(1, &fused());
    let cid = guest.post(0, &[write(8, 1)])[0];
    guest.process();
    assert_eq!(guest.disks[0].held(), 1, "the pair compares");
    assert_eq!(abort(&mut guest, 1, cid), 0);
    assert_eq!(ended(&mut guest, 0), [(cid, Status::ABORT_REQUESTED)]);
    for half in &pair {
        assert_eq!(abort(&mut guest, 2, *half), 1, "the disk has it");
    }
    guest.let_disk_go();
    let done = ended(&mut guest, 1);
    assert!(done.iter().all(|it| it.1.is_success()), "{done:?}");
    assert_eq!(written(&guest), [3]);
}

#[test]
fn the_first_of_a_pair_that_waits_for_its_second() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let [first, second] = fused();
    let cid = guest.post(0, &[first])[0];
    guest.process();
    assert_eq!(abort(&mut guest, 1, cid), 0);
    assert_eq!(ended(&mut guest, 0), [(cid, Status::ABORT_REQUESTED)]);
    assert_eq!(guest.status(second), Status::ABORTED_MISSING_FUSED);
}

#[test]
fn block_requests_that_wait_for_room_are_taken_back() {
    let mut guest = Guest::with_queues(narrow(), 1);
    // Without a write cache a flush follows.
    guest.admin_ok(Entry::new(9).cdw(10, 6).cdw(11, 0));
    guest.disks[0].hold(true);
    for range in 0..3u64 {
        guest.put(PAGE + range * 16, &0_u32.to_le_bytes());
        guest.put(PAGE + range * 16 + 4, &1_u32.to_le_bytes());
        guest.put(PAGE + range * 16 + 8, &(range * 8).to_le_bytes());
    }
    let zeroes = Entry::new(8).nsid(1).blocks(100, 1);
    let trim = Entry::new(9).nsid(1).data(PAGE, 0).cdw(10, 2).cdw(11, 4);
    let cids = guest.post(0, &[zeroes, trim]);
    guest.process();
    assert_eq!(guest.disks[0].held(), 2);
    // The zeroes are written; their flush stands behind the ranges.
    guest.disks[0].release(0);
    guest.process();
    assert_eq!(abort(&mut guest, 1, cids[1]), 1, "the disk has some of it");
    assert_eq!(abort(&mut guest, 1, cids[0]), 0);
    let first = [(cids[0], Status::ABORT_REQUESTED)];
    assert_eq!(ended(&mut guest, 0), first);
    guest.let_disk_go();
    assert_eq!(ended(&mut guest, 0), [(cids[1], Status::SUCCESS)]);
    let log = guest.disks[0].log();
    let flushes = log.iter().filter(|it| **it == Logged::Flush);
    assert_eq!(flushes.count(), 1, "of the ranges");
}

#[test]
fn an_aborted_command_stays_aborted_in_a_saved_state() {
    let mut guest = Guest::with_queues(narrow(), 1);
    let entries: Vec<Entry> = (0..4).map(|slba| write(slba, 1)).collect();
    let cids = guest.post_held(0, &entries);
    assert_eq!(abort(&mut guest, 1, cids[3]), 0);
    guest.let_disk_go();
    let state = guest.save();
    let mut other = guest.moved_to(Guest::with(narrow()), &state);
    other.until("the rest", |other| written(other) == [2]);
    let statuses: Vec<_> = ended(&mut other, 0).iter().map(|it| it.1).collect();
    let expected = [
        Status::SUCCESS,
        Status::SUCCESS,
        Status::ABORT_REQUESTED,
        Status::SUCCESS,
    ];
    assert_eq!(statuses.len(), 4);
    for status in expected {
        assert!(statuses.contains(&status), "{statuses:?}");
    }
}

/// A guest whose completion queue is full: 63 commands have ended, and two more wait for room. A sixth of
/// another kind can be aborted.
fn full_queue() -> (Guest, u16) {
    let mut guest = Guest::with_queues(narrow(), 1);
    let entries: Vec<Entry> = (0..63).map(|_| read(0, 1)).collect();
    guest.post(0, &entries);
    guest.process();
    guest.disks[0].hold(true);
    // The entries of the submission queue are free again; nothing is taken from the other queue.
    let entries: Vec<Entry> = (0..3).map(|slba| write(slba, 1)).collect();
    let cids = guest.post(0, &entries);
    guest.process();
    assert_eq!(guest.disks[0].held(), 2);
    (guest, cids[2])
}

#[test]
fn an_abort_ends_after_the_command_that_it_aborts() {
    let (mut guest, cid) = full_queue();
    let request = guest.post_admin(Entry::new(8).cdw(10, 1 | u32::from(cid) << 16));
    guest.process();
    assert!(
        guest.take_admin(request).is_none(),
        "there is no room for it"
    );
    guest.let_disk_go();
    guest.process();
    assert!(guest.take_admin(request).is_none(), "still none");
    let done = ended(&mut guest, 0);
    assert_eq!(done.len(), 63);
    guest.until("the rest", |guest| {
        let rest = guest.poll(0);
        rest.iter()
            .any(|it| it.cid == cid && it.status == Status::ABORT_REQUESTED)
    });
    let mut answer = None;
    guest.until("the Abort", |guest| {
        answer = guest.take_admin(request);
        answer.is_some()
    });
    assert_eq!(answer.unwrap().dw0, 0);
}

#[test]
fn an_abort_that_waits_and_a_deletion_that_waits_are_saved() {
    let (mut guest, cid) = full_queue();
    let abort = guest.post_admin(Entry::new(8).cdw(10, 1 | u32::from(cid) << 16));
    guest.process();
    let delete = guest.post_admin(Entry::new(0).cdw(10, 1));
    guest.process();
    guest.let_disk_go();
    let state = guest.save();
    let mut other = guest.moved_to(Guest::with(narrow()), &state);
    other.process();
    assert!(other.take_admin(abort).is_none());
    assert!(other.take_admin(delete).is_none());
    let mut done = other.poll(0);
    assert_eq!(done.len(), 63);
    other.until("the rest", |other| {
        done.extend(other.poll(0));
        done.len() == 66
    });
    let of = done.iter().find(|it| it.cid == cid).unwrap();
    assert_eq!(of.status, Status::ABORT_REQUESTED);
    for (request, dword) in [(abort, 0), (delete, 0)] {
        let mut answer = None;
        other.until("an admin command", |other| {
            answer = other.take_admin(request);
            answer.is_some()
        });
        let answer = answer.unwrap();
        assert!(answer.status.is_success());
        assert_eq!(answer.dw0, dword);
    }
    // The queue is gone, and can be made again.
    assert!(other.create_sq(1, 64, 1 | 1 << 16).status.is_success());
}

#[test]
fn the_second_of_a_pair_that_was_not_taken() {
    let mut guest = Guest::with_queues(narrow(), 1);
    guest.disks[0].hold(true);
    let busy: Vec<Entry> = (20..22).map(|slba| write(slba, 1)).collect();
    guest.post(0, &busy);
    guest.process();
    let pair = guest.post(0, &fused());
    let after = guest.post(0, &[write(9, 1)])[0];
    guest.process();
    assert_eq!(abort(&mut guest, 1, pair[1]), 0);
    assert_eq!(ended(&mut guest, 0), [(pair[1], Status::ABORT_REQUESTED)]);
    guest.let_disk_go();
    let done = ended(&mut guest, 0);
    let status = |cid| done.iter().find(|it| it.0 == cid).map(|it| it.1);
    assert_eq!(status(pair[0]), Some(Status::ABORTED_MISSING_FUSED));
    assert_eq!(status(after), Some(Status::SUCCESS));
    assert_eq!(written(&guest), [20, 21, 9]);
}
