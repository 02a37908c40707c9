//! From power on to reset: registers, queues, reads and writes, interrupts.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{
    ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CSTS, DATA, Guest, INTMC, INTMS, NSSR, PAGE, Setup, flush,
    le32, le64, read, write,
};
use virtio_devices::{
    nvme::{NamespaceConfig, Status, driver::Entry},
    testing::{Logged, MockDiskConfig},
};

#[test]
fn the_controller_becomes_ready_and_says_who_it_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.read32(8), 0x0002_0000);
    let page = guest.identify(1, 0);
    assert_eq!(&page[24..36], b"Platter NVMe");
    assert_eq!(page[77], 9);
    assert_eq!(page[111], 1);
    let namespace = guest.identify(0, 1);
    assert_eq!(le64(&namespace, 0), (1 << 20) / 512);
    assert_eq!(le32(&namespace, 128) >> 16, 9);
    assert_eq!(le32(&guest.identify(2, 0), 0), 1);
    assert_eq!(le32(&guest.identify(2, 1), 0), 0);
}

#[test]
fn cap_reads_the_same_in_one_and_in_two_pieces() {
    let guest = Guest::with(Setup::default());
    let cap = guest.read64(CAP);
    assert_eq!(cap as u32, guest.read32(CAP));
    assert_eq!((cap >> 32) as u32, guest.read32(CAP + 4));
    assert_eq!(cap & 0xffff, 4095);
    assert_eq!(cap >> 48 & 15, 0);
    assert_eq!(cap >> 52 & 15, 4);
    assert_eq!(cap >> 59 & 3, 1);
}

#[test]
fn what_was_written_is_read_again() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.fill(DATA, 4096, 0x5a);
    guest.io_ok(write(8, 8));
    guest.fill(DATA, 4096, 0);
    guest.io_ok(read(8, 8));
    assert_eq!(guest.bytes(DATA, 4096), vec![0x5a; 4096]);
    guest.io_ok(flush());
    assert_eq!(guest.disks[0].contents()[4096..8192], vec![0x5a; 4096]);
    assert!(guest.lines.count(1) > 0);
    assert_eq!(guest.lines.count(2), 0);
}

#[test]
fn a_batch_is_one_submission_and_one_interrupt() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let before = guest.lines.count(1);
    guest.disks[0].clear_log();
    let entries: Vec<Entry> = (0..32).map(|slba| read(slba, 1)).collect();
    guest.io_all(0, &entries);
    assert_eq!(guest.disks[0].batches(), vec![32]);
    assert_eq!(guest.lines.count(1), before + 1);
}

#[test]
fn a_large_transfer_goes_through_a_prp_list() {
    let mut guest = Guest::with_queues(
        Setup {
            disks: vec![(
                MockDiskConfig {
                    size: 8 << 20,
                    ..MockDiskConfig::default()
                },
                NamespaceConfig::default(),
            )],
            ..Setup::default()
        },
        1,
    );
    // 2 MiB: MDTS. The pages are in reverse order, so that nothing can be joined.
    let pages = 512_u64;
    for page in 0..pages {
        guest.fill(DATA + page * 4096, 4096, page as u8);
    }
    let list: Vec<u8> = (0..pages - 1)
        .flat_map(|at| (DATA + (pages - 2 - at) * 4096).to_le_bytes())
        .collect();
    guest.put(PAGE, &list);
    let entry = Entry::new(1)
        .nsid(1)
        .blocks(0, 4096)
        .data(DATA + (pages - 1) * 4096, PAGE);
    guest.io_ok(entry);
    let contents = guest.disks[0].contents();
    for page in 0..pages {
        let at = (page * 4096) as usize;
        assert_eq!(contents[at], (pages - 1 - page) as u8, "page {page}");
    }
    let too_much = entry.blocks(0, 4097);
    assert_eq!(guest.status(too_much), Status::INVALID_FIELD);
}

#[test]
fn force_unit_access_and_a_disabled_cache_reach_the_disk() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let fua = |guest: &Guest| {
        let log = guest.disks[0].log();
        matches!(log.last(), Some(Logged::Write { fua: true, .. }))
    };
    guest.io_ok(write(0, 1));
    assert!(!fua(&guest));
    guest.io_ok(write(0, 1).cdw(12, 1 << 30));
    assert!(fua(&guest));
    guest.admin_ok(Entry::new(9).cdw(10, 6).cdw(11, 0));
    guest.io_ok(write(0, 1));
    assert!(fua(&guest));
    guest.io_ok(Entry::new(8).nsid(1).blocks(0, 8));
    assert_eq!(guest.disks[0].log().last(), Some(&Logged::Flush));
}

#[test]
fn a_disabled_controller_forgets_its_queues_and_starts_again() {
    let mut guest = Guest::with_queues(Setup::default(), 2);
    guest.io_ok(write(0, 1));
    guest.disable();
    assert_eq!(guest.read32(CC), 0);
    guest.enable();
    guest.create_pair(1, 64);
    guest.io_ok(read(0, 1));
}

#[test]
fn a_reset_with_commands_in_flight_waits_for_the_disk_and_posts_nothing() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.post_held(0, &[write(0, 8), write(8, 8)]);
    assert_eq!(guest.disks[0].held(), 2);
    guest.write32(CC, 0);
    guest.process();
    assert!(guest.ready(), "the disk still has the guest's memory");
    guest.let_disk_go();
    guest.until("reset", |guest| !guest.ready());
    assert!(guest.queues[0].next().is_none());
    guest.enable();
    guest.create_pair(1, 64);
    guest.io_ok(read(0, 1));
}

#[test]
fn an_enable_during_a_reset_comes_after_it() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.post_held(0, &[write(0, 8)]);
    guest.write32(CC, 0);
    guest.process();
    guest.write32(CC, CC_ENABLE);
    guest.let_disk_go();
    let (sq, cq) = nvme_common::queue_addresses(0);
    guest.admin = virtio_devices::nvme::driver::QueuePair::new(&guest.memory, 0, sq, cq, 32);
    guest.until("enable", |guest| guest.ready());
    guest.identify(1, 0);
}

#[test]
fn enabling_with_impossible_values_is_a_fatal_status() {
    let guest = Guest::with(Setup::default());
    guest.write32(AQA, 0);
    guest.write64(ASQ, 0x1000);
    guest.write64(ACQ, 0x2000);
    guest.write32(CC, CC_ENABLE);
    assert_eq!(guest.read32(CSTS) & 3, 2);
}

#[test]
fn a_shutdown_flushes_and_says_when() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.write32(CC, CC_ENABLE | 1 << 14);
    guest.until("shutdown", |guest| guest.read32(CSTS) >> 2 & 3 == 2);
    assert!(guest.ready());
    guest.disable();
    assert_eq!(guest.read32(CSTS), 0);
}

#[test]
fn a_subsystem_reset_is_told() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.write32(NSSR, 0x4e56_4d64);
    guest.process();
    assert!(guest.ready());
    guest.write32(NSSR, 0x4e56_4d65);
    guest.until("reset", |guest| !guest.ready());
    assert_eq!(guest.read32(CSTS), 1 << 4);
    guest.write32(CSTS, 1 << 4);
    assert_eq!(guest.read32(CSTS), 0);
    guest.enable();
}

#[test]
fn the_line_is_raised_masked_and_lowered() {
    let mut guest = Guest::with(Setup::default());
    guest.controller.use_messages(false);
    guest.enable();
    let level = |guest: &Guest| guest.lines.level.load(std::sync::atomic::Ordering::SeqCst);
    assert!(!level(&guest));
    guest.post_admin(Entry::new(6).data(PAGE, 0).cdw(10, 1));
    guest.process();
    assert!(level(&guest));
    guest.write32(INTMS, 1);
    assert!(!level(&guest));
    guest.write32(INTMC, 1);
    assert!(level(&guest));
    assert!(guest.admin.next().is_some());
    guest.admin.release(&guest.controller);
    assert!(!level(&guest));
    assert_eq!(guest.lines.count(0), 0);
}

#[test]
fn a_full_completion_queue_waits_for_the_host() {
    let mut guest = Guest::with_queues(Setup::default(), 0);
    // Completion queues of 4 entries hold 3.
    let (sq, cq) = nvme_common::queue_addresses(1);
    let mut pair = virtio_devices::nvme::driver::QueuePair::new(&guest.memory, 1, sq, cq, 4);
    assert!(guest.create_cq(1, 4, 1).status.is_success());
    assert!(guest.create_sq(1, 64, 1 | 1 << 16).status.is_success());
    let big = virtio_devices::nvme::driver::QueuePair::new(&guest.memory, 1, sq, cq, 64);
    guest.queues.push(big);
    guest.fill(cq, 4096, 0);
    guest.post(0, &(0..10).map(|at| read(at, 1)).collect::<Vec<_>>());
    guest.process();
    let mut got = 0;
    for round in 0..4 {
        let now = pair.poll(|it| assert!(it.status.is_success()));
        assert!(now <= 3, "round {round}: {now}");
        got += now;
        pair.release(&guest.controller);
        guest.process();
    }
    assert_eq!(got, 10);
    assert_eq!(guest.lines.count(1), 0);
}

#[test]
fn several_submission_queues_share_a_completion_queue() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    assert!(guest.create_sq(2, 64, 1 | 1 << 16).status.is_success());
    let (sq, cq) = nvme_common::queue_addresses(2);
    let mut second = virtio_devices::nvme::driver::QueuePair::new(&guest.memory, 2, sq, cq, 64);
    second.push(&read(0, 1).cid(77));
    second.ring(&guest.controller);
    guest.post(0, &[read(1, 1)]);
    guest.process();
    let mut from: Vec<u16> = guest.poll(0).iter().map(|it| it.sq).collect();
    from.sort_unstable();
    assert_eq!(from, [1, 2]);
    // A completion queue in use cannot be deleted, a submission queue only once.
    let delete_cq = Entry::new(4).cdw(10, 1);
    let delete_sq = |id| Entry::new(0).cdw(10, id);
    assert_eq!(
        guest.admin(delete_cq).status,
        Status::INVALID_QUEUE_DELETION
    );
    guest.admin_ok(delete_sq(2));
    assert_eq!(guest.admin(delete_sq(2)).status, Status::INVALID_QUEUE_ID);
    guest.admin_ok(delete_sq(1));
    guest.admin_ok(delete_cq);
    assert_eq!(guest.admin(delete_cq).status, Status::INVALID_QUEUE_ID);
}

#[test]
fn a_deleted_queue_finishes_what_it_has() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.post_held(0, &[write(0, 8)]);
    let cid = guest.post_admin(Entry::new(0).cdw(10, 1));
    guest.process();
    assert!(guest.take_admin(cid).is_none());
    guest.let_disk_go();
    guest.process();
    assert_eq!(guest.poll(0).len(), 1);
    assert!(guest.take_admin(cid).unwrap().status.is_success());
}

#[test]
fn impossible_queues_are_refused() {
    let mut guest = Guest::new();
    assert_eq!(guest.create_cq(0, 64, 1).status, Status::INVALID_QUEUE_ID);
    assert_eq!(guest.create_cq(5, 64, 1).status, Status::INVALID_QUEUE_ID);
    assert_eq!(guest.create_cq(1, 1, 1).status, Status::INVALID_QUEUE_SIZE);
    assert_eq!(
        guest.create_cq(1, 4097, 1).status,
        Status::INVALID_QUEUE_SIZE
    );
    assert_eq!(guest.create_cq(1, 64, 0).status, Status::INVALID_FIELD);
    assert_eq!(
        guest.create_cq(1, 64, 3 | 5 << 16).status,
        Status::INVALID_INTERRUPT_VECTOR
    );
    assert_eq!(
        guest.create_sq(1, 64, 1 | 1 << 16).status,
        Status::COMPLETION_QUEUE_INVALID
    );
    assert!(guest.create_cq(1, 4096, 1).status.is_success());
    assert_eq!(guest.create_cq(1, 64, 1).status, Status::INVALID_QUEUE_ID);
    assert_eq!(
        guest.create_sq(1, 1, 1 | 1 << 16).status,
        Status::INVALID_QUEUE_SIZE
    );
    assert_eq!(
        guest.create_sq(1, 4097, 1 | 1 << 16).status,
        Status::INVALID_QUEUE_SIZE
    );
    assert_eq!(
        guest.create_sq(1, 64, 1 | 9 << 16).status,
        Status::INVALID_QUEUE_ID
    );
    assert_eq!(guest.create_sq(1, 64, 1).status, Status::INVALID_QUEUE_ID);
    assert!(guest.create_sq(1, 4096, 1 | 1 << 16).status.is_success());
}

#[test]
fn what_has_ended_when_a_reset_comes_is_not_posted() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.post_held(0, &[write(0, 1), write(8, 1)]);
    assert_eq!(guest.disks[0].held(), 2);
    // The first has ended, but its worker sees the reset before it posts; the second is at the disk.
    assert!(guest.disks[0].release(0));
    guest.write32(CC, 0);
    guest.process();
    assert!(guest.poll(0).is_empty());
    assert!(
        guest.ready(),
        "the disk has something of the guest's memory"
    );
    guest.let_disk_go();
    guest.until("reset", |guest| !guest.ready());
    guest.enable();
    guest.create_pair(1, 64);
    guest.io_ok(read(0, 1));
}
