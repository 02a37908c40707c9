//! The I/O commands of the NVM command set.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use block::{Capabilities, ErrorKind};
use nvme_common::{DATA, Guest, PAGE, Setup, flush, le32, read, write};
use virtio_devices::{
    nvme::{NamespaceConfig, Status, driver::Entry},
    testing::{Logged, MockDiskConfig},
};

fn guest() -> Guest {
    Guest::with_queues(Setup::default(), 2)
}

fn sidecar(folder: &tempfile::TempDir) -> NamespaceConfig {
    NamespaceConfig {
        sidecar: Some(folder.path().join("a.nvme")),
        ..NamespaceConfig::default()
    }
}

const SGL: u8 = 1 << 6;

fn descriptor(address: u64, len: u32, kind: u8) -> [u64; 2] {
    [address, u64::from(len) | u64::from(kind) << 60]
}

fn list(guest: &Guest, at: u64, descriptors: &[[u64; 2]]) {
    for (index, [low, high]) in descriptors.iter().enumerate() {
        guest.put(at + 16 * index as u64, &low.to_le_bytes());
        guest.put(at + 16 * index as u64 + 8, &high.to_le_bytes());
    }
}

#[test]
fn a_scatter_gather_list_of_unaligned_pieces_is_written() {
    let mut guest = guest();
    for (at, byte) in (0..1024).zip((0..=255).cycle()) {
        guest.fill(DATA + 5000 + at, 1, byte);
    }
    list(
        &guest,
        PAGE,
        &[
            descriptor(DATA + 5000, 1000, 0),
            descriptor(DATA + 6000, 24, 0),
        ],
    );
    let [low, high] = descriptor(PAGE, 32, 3);
    guest.io_ok(write(2, 2).flags(SGL).data(low, high));
    let expected: Vec<u8> = (0..=255).cycle().take(1024).collect();
    assert_eq!(guest.disks[0].contents()[1024..2048], expected);
    let [low, high] = descriptor(DATA, 1024, 0);
    guest.io_ok(read(2, 2).flags(SGL).data(low, high));
    assert_eq!(guest.bytes(DATA, 1024), expected);
}

#[test]
fn a_bit_bucket_swallows_what_is_read() {
    let mut guest = guest();
    guest.disks[0].write(0, &[1; 512]);
    guest.disks[0].write(512, &[2; 512]);
    guest.fill(DATA, 1024, 0xee);
    list(
        &guest,
        PAGE,
        &[descriptor(0, 500, 1), descriptor(DATA, 524, 0)],
    );
    let [low, high] = descriptor(PAGE, 32, 3);
    guest.io_ok(read(0, 2).flags(SGL).data(low, high));
    let got = guest.bytes(DATA, 525);
    assert_eq!(got[..12], [1; 12]);
    assert_eq!(got[12..524], [2; 512]);
    assert_eq!(got[524], 0xee);
}

#[test]
fn ranges_beyond_the_end_and_wrong_namespaces_have_their_statuses() {
    let mut guest = guest();
    for entry in [read(2047, 2), read(u64::MAX, 1), write(2048, 1)] {
        assert_eq!(guest.status(entry), Status::LBA_OUT_OF_RANGE);
    }
    guest.io_ok(read(2047, 1));
    for nsid in [0, 257, u32::MAX] {
        assert_eq!(
            guest.status(read(0, 1).nsid(nsid)),
            Status::INVALID_NAMESPACE
        );
    }
    assert_eq!(guest.status(read(0, 1).nsid(2)), Status::INVALID_FIELD);
    assert_eq!(
        guest.status(Entry::new(0x7f).nsid(1)),
        Status::INVALID_OPCODE
    );
    guest.io_ok(flush().nsid(u32::MAX));
}

#[test]
fn compare_tells_equal_from_different() {
    let mut guest = guest();
    guest.fill(DATA, 4096, 7);
    guest.io_ok(write(0, 8));
    let compare = Entry::new(5).nsid(1).blocks(0, 8).data(DATA, 0);
    guest.io_ok(compare);
    guest.fill(DATA + 4095, 1, 8);
    assert_eq!(guest.status(compare), Status::COMPARE_FAILURE);
}

#[test]
fn verify_reads_everything_and_shows_nothing() {
    let mut guest = guest();
    let verify = Entry::new(0x0c).nsid(1).blocks(0, 2048);
    guest.disks[0].clear_log();
    guest.io_ok(verify);
    let read: u64 = guest.disks[0]
        .log()
        .iter()
        .map(|it| match it {
            Logged::Read { len, .. } => *len,
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!(read, 1 << 20);
    guest.disks[0].fail_with(|it| match it {
        Logged::Read { offset, .. } if *offset > 0 => Some(ErrorKind::Io(5)),
        _ => None,
    });
    assert_eq!(guest.status(verify), Status::UNRECOVERED_READ_ERROR);
}

#[test]
fn write_zeroes_deallocates_only_if_asked() {
    let mut guest = guest();
    let zeroes = Entry::new(8).nsid(1).blocks(0, 8);
    guest.fill(DATA, 4096, 7);
    guest.io_ok(write(0, 8));
    guest.io_ok(zeroes);
    assert_eq!(guest.disks[0].contents()[..4096], [0; 4096]);
    guest.io_ok(zeroes.cdw(12, 7 | 1 << 25));
    let unmap: Vec<bool> = guest.disks[0]
        .log()
        .iter()
        .filter_map(|it| match it {
            Logged::WriteZeroes { may_unmap, .. } => Some(*may_unmap),
            _ => None,
        })
        .collect();
    assert_eq!(unmap, [false, true]);
}

#[test]
fn dataset_management_deallocates_ranges_or_none() {
    let mut guest = guest();
    guest.fill(DATA, 8192, 7);
    guest.put(DATA + 8192, &16_u64.to_le_bytes());
    guest.io_ok(write(0, 16).data(DATA, DATA + 4096));
    let range = |guest: &Guest, at: u64, slba: u64, blocks: u32| {
        guest.put(PAGE + at * 16, &0_u32.to_le_bytes());
        guest.put(PAGE + at * 16 + 4, &blocks.to_le_bytes());
        guest.put(PAGE + at * 16 + 8, &slba.to_le_bytes());
    };
    let dsm = Entry::new(9).nsid(1).data(PAGE, 0).cdw(10, 1);
    range(&guest, 0, 0, 2);
    range(&guest, 1, 14, 2);
    // Without the attribute it is a hint about access, and nothing happens.
    guest.io_ok(dsm);
    assert_eq!(guest.disks[0].contents()[..8192], [7; 8192]);
    guest.io_ok(dsm.cdw(11, 4));
    let contents = guest.disks[0].contents();
    assert_eq!(contents[..1024], [0; 1024]);
    assert_eq!(contents[1024..7168], [7; 6144]);
    assert_eq!(contents[7168..8192], [0; 1024]);
    range(&guest, 1, 2048, 1);
    guest.disks[0].clear_log();
    assert_eq!(guest.status(dsm.cdw(11, 4)), Status::LBA_OUT_OF_RANGE);
    assert!(guest.disks[0].log().is_empty());
}

#[test]
fn copy_gathers_ranges_and_knows_its_limits() {
    let mut guest = guest();
    for block in 0..8 {
        guest.fill(DATA + block * 512, 512, block as u8 + 1);
    }
    guest.io_ok(write(0, 8));
    let source = |guest: &Guest, at: u64, slba: u64, blocks: u16| {
        guest.fill(PAGE + at * 32, 32, 0);
        guest.put(PAGE + at * 32 + 8, &slba.to_le_bytes());
        guest.put(PAGE + at * 32 + 16, &(blocks - 1).to_le_bytes());
    };
    source(&guest, 0, 6, 2);
    source(&guest, 1, 0, 1);
    let copy = Entry::new(0x19)
        .nsid(1)
        .data(PAGE, 0)
        .cdw(10, 100)
        .cdw(12, 1);
    guest.io_ok(copy);
    let contents = guest.disks[0].contents();
    assert_eq!(contents[100 * 512], 7);
    assert_eq!(contents[101 * 512], 8);
    assert_eq!(contents[102 * 512], 1);
    assert_eq!(contents[103 * 512], 0);
    assert_eq!(
        guest.status(copy.cdw(12, 128)),
        Status::COMMAND_SIZE_LIMIT_EXCEEDED
    );
    assert_eq!(
        guest.status(copy.cdw(12, 1 | 1 << 8)),
        Status::INVALID_FIELD
    );
    assert_eq!(guest.status(copy.cdw(10, 2046)), Status::LBA_OUT_OF_RANGE);
}

fn fused(slba: u64, compare: u64, write_from: u64) -> [Entry; 2] {
    [
        Entry::new(5)
            .nsid(1)
            .blocks(slba, 1)
            .data(compare, 0)
            .flags(1),
        Entry::new(1)
            .nsid(1)
            .blocks(slba, 1)
            .data(write_from, 0)
            .flags(2),
    ]
}

#[test]
fn a_fused_pair_writes_only_what_compared_equal() {
    let mut guest = guest();
    guest.fill(DATA, 512, 0);
    guest.fill(DATA + 512, 512, 9);
    let pair = fused(3, DATA, DATA + 512);
    let done = guest.io_all(0, &pair);
    assert!(done.iter().all(|it| it.status.is_success()), "{done:?}");
    assert_eq!(guest.disks[0].contents()[3 * 512..4 * 512], [9; 512]);
    let done = guest.io_all(0, &pair);
    assert_eq!(done[0].status, Status::COMPARE_FAILURE);
    assert_eq!(done[1].status, Status::ABORTED_FAILED_FUSED);
    // More than one block is more than is atomic.
    let large = [pair[0].blocks(0, 2), pair[1].blocks(0, 2)];
    let done = guest.io_all(0, &large);
    assert_eq!(done[0].status, Status::ATOMIC_WRITE_UNIT_EXCEEDED);
    assert_eq!(done[1].status, Status::ABORTED_FAILED_FUSED);
}

#[test]
fn halves_of_fused_pairs_are_aborted() {
    let mut guest = guest();
    let [first, second] = fused(0, DATA, DATA);
    assert_eq!(guest.status(second), Status::ABORTED_MISSING_FUSED);
    let done = guest.io_all(0, &[first, read(0, 1)]);
    assert_eq!(done[0].status, Status::ABORTED_MISSING_FUSED);
    assert!(done[1].status.is_success());
    let done = guest.io_all(0, &[first, second.blocks(1, 1)]);
    assert_eq!(done[0].status, Status::INVALID_FIELD);
    assert_eq!(done[1].status, Status::ABORTED_FAILED_FUSED);
    assert_eq!(guest.status(read(0, 1).flags(3)), Status::INVALID_FIELD);
    // A pair whose second half comes later.
    let cids = guest.post(0, &[first]);
    guest.process();
    assert!(guest.poll(0).is_empty());
    let done = guest.io_all(0, &[second]);
    assert_eq!(done.len(), 1);
    let _ = cids;
}

#[test]
fn a_fused_pair_waits_for_writes_and_holds_others_back() {
    let mut guest = guest();
    guest.post_held(0, &[write(8, 1)]);
    assert_eq!(guest.disks[0].held(), 1);
    guest.fill(DATA + 512, 512, 9);
    // The pair on the other queue, which another worker has.
    guest.fill(DATA + 4096, 512, 0);
    guest.post(1, &fused(3, DATA + 4096, DATA + 512));
    guest.process();
    assert_eq!(guest.disks[0].held(), 1, "the pair waits for the write");
    guest.post(0, &[write(9, 1), read(10, 1)]);
    guest.process();
    assert_eq!(guest.disks[0].held(), 2, "reads go on, writes wait");
    guest.let_disk_go();
    let (mut first, mut second) = (0, 0);
    guest.until("everything", |guest| {
        first += guest.poll(0).len();
        second += guest.poll(1).len();
        (first, second) == (3, 2)
    });
    assert_eq!(guest.disks[0].contents()[3 * 512..4 * 512], [9; 512]);
}

#[test]
fn uncorrectable_blocks_fail_until_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let setup = Setup {
        disks: vec![(MockDiskConfig::default(), sidecar(&folder))],
        ..Setup::default()
    };
    let mut guest = Guest::with_queues(setup, 1);
    guest.io_ok(Entry::new(4).nsid(1).blocks(4, 2));
    assert_eq!(guest.status(read(0, 8)), Status::UNRECOVERED_READ_ERROR);
    assert_eq!(guest.status(read(5, 1)), Status::UNRECOVERED_READ_ERROR);
    guest.io_ok(read(0, 4));
    guest.io_ok(write(4, 1));
    guest.io_ok(read(4, 1));
    assert_eq!(guest.status(read(5, 1)), Status::UNRECOVERED_READ_ERROR);
    // Another controller, later, knows it too.
    drop(guest);
    let setup = Setup {
        disks: vec![(MockDiskConfig::default(), sidecar(&folder))],
        ..Setup::default()
    };
    let mut guest = Guest::with_queues(setup, 1);
    assert_eq!(guest.status(read(5, 1)), Status::UNRECOVERED_READ_ERROR);
    guest.io_ok(Entry::new(8).nsid(1).blocks(0, 8));
    guest.io_ok(read(5, 1));
}

#[test]
fn without_a_sidecar_nothing_is_marked() {
    let mut guest = guest();
    assert_eq!(
        guest.status(Entry::new(4).nsid(1).blocks(4, 2)),
        Status::INVALID_OPCODE
    );
    let oncs = le32(&guest.identify(1, 0), 520);
    assert_eq!(oncs & 2, 0);
}

#[test]
fn a_read_only_namespace_refuses_what_writes() {
    let setup = Setup {
        disks: vec![(
            MockDiskConfig {
                capabilities: Capabilities::default(),
                ..MockDiskConfig::default()
            },
            NamespaceConfig::default(),
        )],
        ..Setup::default()
    };
    let mut guest = Guest::with_queues(setup, 1);
    for entry in [write(0, 1), Entry::new(8).nsid(1).blocks(0, 1)] {
        assert_eq!(guest.status(entry), Status::NAMESPACE_WRITE_PROTECTED);
    }
    guest.io_ok(read(0, 1));
    guest.io_ok(flush());
    assert_eq!(guest.identify(0, 1)[99], 1);
    assert_eq!(guest.log(2, 512)[0], 8);
}

#[test]
fn errors_of_the_disk_reach_the_guest_and_the_error_log() {
    let mut guest = guest();
    guest.disks[0].fail_with(|it| match it {
        Logged::Read { .. } => Some(ErrorKind::Io(5)),
        Logged::Write { .. } => Some(ErrorKind::NoSpace),
        _ => None,
    });
    assert_eq!(guest.status(read(3, 1)), Status::UNRECOVERED_READ_ERROR);
    assert_eq!(guest.status(write(4, 1)), Status::CAPACITY_EXCEEDED);
    let log = guest.log(1, 128);
    assert_eq!(nvme_common::le64(&log, 0), 2);
    assert_eq!(nvme_common::le64(&log, 16), 4);
    assert_eq!(nvme_common::le64(&log, 64), 1);
    assert_eq!(nvme_common::le64(&log, 64 + 16), 3);
    let smart = guest.log(2, 512);
    assert_eq!(nvme_common::le64(&smart, 160), 2);
    assert_eq!(nvme_common::le64(&smart, 176), 2);
}

#[test]
fn counters_count_units_of_512000_bytes() {
    let mut guest = guest();
    for _ in 0..3 {
        guest.io_ok(read(0, 8));
        guest.io_ok(write(0, 8));
    }
    guest.io_ok(write(0, 8));
    let smart = guest.log(2, 512);
    assert_eq!(nvme_common::le64(&smart, 32), 1);
    assert_eq!(nvme_common::le64(&smart, 48), 1);
    assert_eq!(nvme_common::le64(&smart, 64), 3);
    assert_eq!(nvme_common::le64(&smart, 80), 4);
}

#[test]
fn blocks_of_4096_bytes() {
    let config = NamespaceConfig {
        lba_size: 4096,
        ..NamespaceConfig::default()
    };
    let setup = Setup {
        disks: vec![(MockDiskConfig::default(), config)],
        ..Setup::default()
    };
    let mut guest = Guest::with_queues(setup, 1);
    assert_eq!(guest.identify(0, 1)[26], 1);
    guest.fill(DATA, 8192, 3);
    guest.io_ok(write(1, 2).data(DATA, DATA + 4096));
    assert_eq!(guest.disks[0].contents()[4096..12288], [3; 8192]);
    assert_eq!(guest.status(read(255, 2)), Status::LBA_OUT_OF_RANGE);
}
