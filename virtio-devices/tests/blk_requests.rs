//! What a request means and how it ends.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{Capabilities, ErrorKind};
use common::{DATA, Guest, IOERR, OK, Setup, UNSUPP, WRITE};
use virtio_devices::{
    testing::{Logged, MockDiskConfig},
    virtio_blk::{VirtioBlkConfig, driver::Range, feature},
};
use vm_memory::GuestAddress;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;
/// Where tests with their own chains put the header and the status.
const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x80;

fn at(address: u64, len: u32) -> [(GuestAddress, u32); 1] {
    [(GuestAddress(address), len)]
}

fn with_disk(disk: MockDiskConfig) -> Guest {
    Guest::with(Setup {
        disk,
        ..Setup::default()
    })
}

fn erasing() -> Guest {
    let mut disk = MockDiskConfig::default();
    disk.capabilities.secure_erase = true;
    with_disk(disk)
}

fn read_only() -> Guest {
    let mut setup = Setup::default();
    setup.device.read_only = true;
    Guest::with(setup)
}

fn without(refuse: u64, config: impl FnOnce(&mut VirtioBlkConfig)) -> Guest {
    let mut setup = Setup {
        refuse,
        ..Setup::default()
    };
    config(&mut setup.device);
    Guest::with(setup)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Range {
    Range {
        sector,
        sectors,
        flags,
    }
}

#[test]
fn what_is_written_is_read_back() {
    for indirect in [false, true] {
        let mut setup = Setup::default();
        setup.driver.indirect = indirect;
        let mut guest = Guest::with(setup);
        guest.fill(DATA, 4096, 0x5a);
        guest.driver.write(8, &at(DATA, 4096));
        let used = guest.one();
        assert_eq!((used.status, used.len), (OK, 1));
        assert_eq!(guest.disk.contents()[4096..8192], vec![0x5a; 4096]);
        let scattered = [
            (GuestAddress(DATA + 0x2000), 1000),
            (GuestAddress(DATA + 0x4001), 3000),
            (GuestAddress(DATA + 0x6000), 96),
        ];
        guest.driver.read(8, &scattered);
        let used = guest.one();
        assert_eq!((used.status, used.len), (OK, 4097));
        assert_eq!(guest.bytes(DATA + 0x2000, 1000), vec![0x5a; 1000]);
        assert_eq!(guest.bytes(DATA + 0x4001, 3000), vec![0x5a; 3000]);
        assert_eq!(guest.bytes(DATA + 0x6000, 97)[95..], [0x5a, 0]);
    }
}

#[test]
fn header_and_status_may_be_cut_or_merged_anywhere() {
    let mut guest = Guest::new();
    guest.disk.write(3 * 512, &[0x33; 512]);
    // One descriptor a byte of the header; data and status in one descriptor.
    guest.header(HEADER, 0, 3);
    let mut parts: Vec<(u64, u32, u16)> = (0..16).map(|byte| (HEADER + byte, 1, 0)).collect();
    parts.push((DATA, 513, WRITE));
    assert_eq!(guest.chain(&parts, DATA + 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 513)[511..], [0x33, OK]);
    // Header and data of a write in one descriptor.
    guest.header(HEADER, 1, 5);
    guest.fill(HEADER + 16, 512, 0x44);
    let parts = [(HEADER, 528, 0), (DATA, 1, WRITE)];
    assert_eq!(guest.chain(&parts, DATA), (OK, 1));
    assert_eq!(guest.disk.contents()[5 * 512..6 * 512], vec![0x44; 512]);
    // The status cut off the data in the middle of nowhere, zero-length descriptors between.
    guest.header(HEADER, 0, 3);
    let parts = [
        (HEADER, 7, 0),
        (0, 0, 0),
        (HEADER + 7, 9, 0),
        (DATA, 100, WRITE),
        (DATA + 0x1000, 412, WRITE),
        (0, 0, WRITE),
        (DATA + 0x2000, 1, WRITE),
    ];
    assert_eq!(guest.chain(&parts, DATA + 0x2000), (OK, 513));
    assert_eq!(guest.bytes(DATA + 0x1000, 413)[410..], [0x33, 0x33, 0]);
}

#[test]
fn an_unknown_type_is_unsupported() {
    let mut guest = Guest::new();
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 15, 16, 18, 24, 26, 99, u32::MAX] {
        guest.driver.request(kind, 0, &at(DATA, 512), true);
        let used = guest.one();
        assert_eq!((used.status, used.len), (UNSUPP, 1), "type {kind}");
    }
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn writing_to_a_read_only_disk_is_an_error_and_writes_nothing() {
    let mut guest = read_only();
    guest.fill(DATA, 512, 1);
    guest.driver.write(0, &at(DATA, 512));
    assert_eq!(guest.one().status, IOERR);
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        guest.driver.ranges(kind, &[range(0, 1, 0)]);
        assert_eq!(guest.one().status, IOERR);
    }
    assert_eq!(guest.disk.log(), []);
    guest.driver.read(0, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    guest.driver.flush();
    assert_eq!(guest.one().status, OK);
    // Also when the driver ignored RO.
    let mut guest = without(feature::RO, |config| config.read_only = true);
    guest.driver.write(0, &at(DATA, 512));
    assert_eq!(guest.one().status, IOERR);
}

#[test]
fn reserved_flags_are_unsupported() {
    let mut guest = erasing();
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        for flags in [2, 4, 1 << 31, 3] {
            guest.driver.ranges(kind, &[range(0, 8, flags)]);
            assert_eq!(guest.one().status, UNSUPP, "type {kind} flags {flags}");
            // Also in a later segment, and beside a range that is wrong.
            let second = [range(1 << 50, 8, 0), range(8, 8, flags)];
            guest.driver.ranges(kind, &second);
            assert_eq!(guest.one().status, UNSUPP, "type {kind} flags {flags}");
        }
    }
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn unmap_is_unsupported_for_discard_and_secure_erase() {
    let mut guest = erasing();
    for kind in [DISCARD, SECURE_ERASE] {
        guest.driver.ranges(kind, &[range(0, 8, 1)]);
        assert_eq!(guest.one().status, UNSUPP);
    }
    guest.driver.write_zeroes(&[range(0, 8, 1)]);
    assert_eq!(guest.one().status, OK);
    let (offset, len) = (0, 4096);
    let may_unmap = true;
    let expected = Logged::WriteZeroes {
        offset,
        len,
        may_unmap,
    };
    assert_eq!(guest.disk.log(), [expected]);
}

#[test]
fn ranges_beyond_the_end_are_errors() {
    let mut guest = erasing();
    let sectors = (1 << 20) / 512;
    let bad = [
        range(sectors, 1, 0),
        range(sectors - 1, 2, 0),
        range(u64::MAX, 1, 0),
        range(u64::MAX / 512, 8, 0),
        range(0, u32::MAX, 0),
        range(sectors + 1, 0, 0),
    ];
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        for bad in bad {
            guest.driver.ranges(kind, &[range(0, 8, 0), bad]);
            assert_eq!(guest.one().status, IOERR, "type {kind} {bad:?}");
        }
    }
    assert_eq!(
        guest.disk.log(),
        [],
        "not even the good segment is executed"
    );
    for sector in [sectors, sectors - 7, u64::MAX, u64::MAX / 512, 1 << 55] {
        guest.driver.read(sector, &at(DATA, 4096));
        assert_eq!(guest.one().status, IOERR, "read at {sector}");
        guest.driver.write(sector, &at(DATA, 4096));
        assert_eq!(guest.one().status, IOERR, "write at {sector}");
    }
    assert_eq!(guest.disk.log(), []);
    guest.driver.read(sectors - 8, &at(DATA, 4096));
    assert_eq!(guest.one().status, OK);
}

#[test]
fn more_segments_than_the_limit_are_not_executed() {
    let mut guest = without(0, |config| config.max_discard_segments = 3);
    for kind in [DISCARD, WRITE_ZEROES] {
        guest.driver.ranges(kind, &[range(0, 8, 0); 4]);
        assert_eq!(guest.one().status, IOERR);
    }
    assert_eq!(guest.disk.log(), []);
    guest.driver.discard(&[range(0, 8, 0); 3]);
    assert_eq!(guest.one().status, OK);
    assert_eq!(guest.disk.log().len(), 3);
    // More sectors than the limit in one segment.
    let mut guest = without(0, |config| config.max_discard_sectors = 8);
    guest.driver.discard(&[range(0, 9, 0)]);
    assert_eq!(guest.one().status, IOERR);
}

#[test]
fn segments_that_are_cut_are_errors() {
    let mut guest = Guest::new();
    for len in [0, 1, 15, 17, 31] {
        guest.driver.request(DISCARD, 0, &at(DATA, len), false);
        assert_eq!(guest.one().status, IOERR, "{len} bytes");
    }
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn several_segments_are_several_block_requests_with_one_status() {
    let mut guest = Guest::new();
    guest.disk.write(0, &[9; 32 * 512]);
    guest
        .driver
        .write_zeroes(&[range(0, 8, 0), range(16, 8, 1), range(3, 0, 0)]);
    assert_eq!(guest.one().status, OK);
    let contents = guest.disk.contents();
    assert_eq!(contents[..4096], vec![0; 4096]);
    assert_eq!(contents[4096..8192], vec![9; 4096]);
    assert_eq!(contents[8192..12288], vec![0; 4096]);
    assert_eq!(guest.disk.log().len(), 2, "an empty segment needs no disk");
    // One of three fails: the request fails, once, after all have ended.
    guest.disk.fail_with(|logged| match logged {
        Logged::Discard { offset: 4096, .. } => Some(ErrorKind::Io(5)),
        _ => None,
    });
    guest.disk.hold(true);
    guest
        .driver
        .discard(&[range(0, 8, 0), range(8, 8, 0), range(16, 8, 0)]);
    assert_eq!(guest.turn(), []);
    guest.disk.release(1);
    guest.disk.release(0);
    assert_eq!(guest.turn(), []);
    guest.disk.release(0);
    assert_eq!(guest.one().status, IOERR);
}

#[test]
fn empty_requests_succeed_without_the_disk() {
    let mut guest = Guest::new();
    guest.driver.read(0, &[]);
    assert_eq!(guest.one().status, OK);
    guest.driver.write(2048, &[]);
    assert_eq!(guest.one().status, OK);
    guest.driver.discard(&[range(5, 0, 0)]);
    assert_eq!(guest.one().status, OK);
    guest.driver.read(2049, &[]);
    assert_eq!(guest.one().status, IOERR);
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn lengths_that_are_not_whole_sectors_are_errors() {
    let mut guest = Guest::new();
    for len in [1, 511, 513, 4095] {
        guest.driver.read(0, &at(DATA, len));
        assert_eq!(guest.one().status, IOERR);
        guest.driver.write(0, &at(DATA, len));
        assert_eq!(guest.one().status, IOERR);
    }
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn requests_that_are_not_offered_are_unsupported() {
    let mut disk = MockDiskConfig::default();
    disk.capabilities.discard = false;
    let mut setup = Setup {
        disk,
        ..Setup::default()
    };
    setup.device.write_zeroes = false;
    let mut guest = Guest::with(setup);
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        guest.driver.ranges(kind, &[range(0, 8, 0)]);
        assert_eq!(guest.one().status, UNSUPP);
    }
}

#[test]
fn the_id_has_20_bytes_and_no_terminator_when_full() {
    let full = "12345678901234567890";
    let mut guest = without(0, |config| config.serial = full.to_owned());
    guest.fill(DATA, 32, 0xee);
    guest.driver.get_id(&at(DATA, 20));
    let used = guest.one();
    assert_eq!((used.status, used.len), (OK, 21));
    assert_eq!(guest.bytes(DATA, 20), full.as_bytes());
    assert_eq!(guest.bytes(DATA + 20, 1), [0xee]);
    // A short one is filled up with zeroes; a longer buffer keeps its rest.
    let mut guest = Guest::new();
    guest.fill(DATA, 32, 0xee);
    guest.driver.get_id(&at(DATA, 32));
    let used = guest.one();
    assert_eq!((used.status, used.len), (OK, 21));
    let mut expected = b"platter-0".to_vec();
    expected.resize(20, 0);
    expected.resize(32, 0xee);
    assert_eq!(guest.bytes(DATA, 32), expected);
    // A shorter buffer gets what fits, also in pieces.
    guest
        .driver
        .get_id(&[(GuestAddress(DATA), 3), (GuestAddress(DATA + 0x100), 4)]);
    let used = guest.one();
    assert_eq!((used.status, used.len), (OK, 8));
    assert_eq!(guest.bytes(DATA + 0x100, 4), b"tter");
    guest.driver.get_id(&[]);
    assert_eq!(guest.one().status, OK);
}

#[test]
fn nothing_is_written_beyond_the_used_length() {
    let mut guest = Guest::new();
    guest.disk.write(0, &[1; 512]);
    guest.fill(DATA, 0x1000, 0xee);
    guest.driver.read(0, &at(DATA, 512));
    assert_eq!(guest.one().len, 513);
    assert_eq!(guest.bytes(DATA + 512, 16), [0xee; 16]);
    // An error writes the status alone, and says so.
    guest.driver.read(1 << 40, &at(DATA + 0x800, 512));
    let used = guest.one();
    assert_eq!((used.status, used.len), (IOERR, 1));
    assert_eq!(guest.bytes(DATA + 0x800, 512), [0xee; 512]);
}

#[test]
fn a_flush_is_submitted_after_every_write_that_completed_before_it() {
    let mut guest = Guest::new();
    guest.driver.write(0, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    guest.driver.flush();
    assert_eq!(guest.one().status, OK);
    let write = Logged::Write {
        offset: 0,
        len: 512,
        fua: false,
    };
    assert_eq!(guest.disk.log(), [write, Logged::Flush]);
    guest.disk.fail_with(|_| Some(ErrorKind::SyncFailed));
    guest.driver.flush();
    assert_eq!(guest.one().status, IOERR);
}

#[test]
fn write_through_makes_each_write_durable_before_it_completes() {
    let mut guest = Guest::new();
    guest.device.write_config(32, &[0]);
    guest.driver.write(1, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    let write = Logged::Write {
        offset: 512,
        len: 512,
        fua: true,
    };
    assert_eq!(guest.disk.log(), [write]);
    guest.disk.clear_log();
    guest.disk.hold(true);
    guest.driver.write_zeroes(&[range(0, 8, 0), range(8, 8, 0)]);
    assert_eq!(guest.turn(), []);
    guest.disk.release(0);
    guest.disk.release(0);
    assert_eq!(guest.turn(), [], "not before the flush");
    assert_eq!(guest.disk.log().last(), Some(&Logged::Flush));
    guest.disk.release(0);
    assert_eq!(guest.one().status, OK);
    // The driver switches back.
    guest.disk.hold(false);
    guest.disk.clear_log();
    guest.device.write_config(32, &[1]);
    guest.driver.discard(&[range(0, 8, 0)]);
    assert_eq!(guest.one().status, OK);
    assert_eq!(guest.disk.log().len(), 1);
}

#[test]
fn a_driver_that_never_flushes_gets_write_through() {
    let mut guest = without(feature::FLUSH | feature::CONFIG_WCE, |_| {});
    guest.driver.write(0, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    assert!(matches!(
        guest.disk.log()[..],
        [Logged::Write { fua: true, .. }]
    ));
    // One that flushes and cannot switch gets write-back.
    let mut guest = without(feature::CONFIG_WCE, |config| config.write_back = false);
    guest.driver.write(0, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    assert!(matches!(
        guest.disk.log()[..],
        [Logged::Write { fua: false, .. }]
    ));
}

#[test]
fn a_failed_discard_is_not_flushed_in_write_through() {
    let mut guest = without(0, |config| config.write_back = false);
    guest.disk.fail_with(|logged| {
        matches!(logged, Logged::Discard { .. }).then_some(ErrorKind::Unsupported)
    });
    guest.driver.discard(&[range(0, 8, 0)]);
    assert_eq!(guest.one().status, UNSUPP);
    assert_eq!(guest.disk.log().len(), 1);
}

#[test]
fn secure_erase_discards_and_is_durable() {
    let mut guest = erasing();
    guest.driver.ranges(SECURE_ERASE, &[range(0, 8, 0)]);
    assert_eq!(guest.one().status, OK);
    let discard = Logged::Discard {
        offset: 0,
        len: 4096,
    };
    assert_eq!(guest.disk.log(), [discard, Logged::Flush]);
}

#[test]
fn errors_of_the_disk_reach_the_guest() {
    let kinds = [
        (ErrorKind::Io(5), IOERR),
        (ErrorKind::ShortTransfer, IOERR),
        (ErrorKind::NoSpace, IOERR),
        (ErrorKind::Corrupt, IOERR),
        (ErrorKind::OutOfRange, IOERR),
        (ErrorKind::ReadOnly, IOERR),
        (ErrorKind::Unsupported, UNSUPP),
    ];
    for (kind, status) in kinds {
        let mut guest = Guest::new();
        guest.disk.fail_with(move |_| Some(kind));
        guest.driver.read(0, &at(DATA, 512));
        let used = guest.one();
        assert_eq!((used.status, used.len), (status, 1), "{kind}");
        guest.driver.write(0, &at(DATA, 512));
        assert_eq!(guest.one().status, status, "{kind}");
    }
}

#[test]
fn a_chain_too_short_for_a_header_is_an_error_and_one_without_status_is_returned() {
    let mut guest = Guest::new();
    guest.header(HEADER, 0, 0);
    let short = [(HEADER, 15, 0), (STATUS, 1, WRITE)];
    assert_eq!(guest.chain(&short, STATUS), (IOERR, 1));
    let none = [(STATUS, 1, WRITE)];
    assert_eq!(guest.chain(&none, STATUS), (IOERR, 1));
    // No writable byte: nowhere to put a status, nothing written.
    let no_status = [(HEADER, 16, 0), (DATA, 512, 0)];
    assert_eq!(guest.chain(&no_status, STATUS), (0xff, 0));
    // Readable after writable: the order is wrong.
    let order = [(HEADER, 16, 0), (DATA, 512, WRITE), (HEADER, 16, 0)];
    assert_eq!(guest.chain(&order, STATUS), (0xff, 0));
    let order = [(DATA, 512, WRITE), (HEADER, 16, 0), (STATUS, 1, WRITE)];
    assert_eq!(guest.chain(&order, STATUS), (IOERR, 1));
    assert_eq!(guest.disk.log(), []);
    assert_eq!(guest.interrupt.faults(), []);
}

#[test]
fn counters_and_latencies_are_kept_by_operation() {
    use virtio_devices::stats::Op;
    let mut guest = Guest::new();
    guest.driver.read(0, &at(DATA, 4096));
    guest.driver.write(0, &at(DATA, 512));
    guest.driver.write(1 << 40, &at(DATA, 512));
    guest.driver.flush();
    guest.driver.request(99, 0, &[], false);
    assert_eq!(guest.turn().len(), 5);
    let stats = guest.device.stats(0).unwrap();
    assert_eq!(stats.op(Op::Read).bytes(), 4096);
    assert_eq!(stats.op(Op::Write).completed(), 2);
    assert_eq!(stats.op(Op::Write).failed(), 1);
    assert_eq!(stats.op(Op::Write).bytes(), 512);
    assert_eq!(stats.op(Op::Flush).latency().count(), 1);
    assert_eq!(stats.op(Op::Other).failed(), 1);
    assert!(stats.op(Op::Read).latency().max() > 0);
    let names: Vec<&str> = Op::ALL.iter().map(|op| op.name()).collect();
    assert_eq!(names.len(), 6);
}

#[test]
fn a_disk_that_shrinks_under_the_guest_gives_errors() {
    let mut guest = with_disk(MockDiskConfig {
        capabilities: Capabilities {
            writable: true,
            ..Capabilities::default()
        },
        ..MockDiskConfig::default()
    });
    guest.driver.read(2000, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
    guest.device.resize(4096).unwrap();
    guest.driver.read(2000, &at(DATA, 512));
    assert_eq!(guest.one().status, IOERR);
    guest.driver.read(7, &at(DATA, 512));
    assert_eq!(guest.one().status, OK);
}
