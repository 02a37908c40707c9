//! A guest that breaks every rule.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{DATA, Guest, INDIRECT, IOERR, MEMORY, NEXT, OK, Setup, WRITE};
use virtio_devices::{Error, Interrupt, virtio::QueueFault};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;
const TABLE: u64 = DATA - 0x4000;

/// Posts head 0, lets the device look, and returns why the queue broke.
fn fault(guest: &mut Guest) -> Option<QueueFault> {
    guest.driver.post(0);
    let _ = guest.driver.publish();
    guest.process();
    let fault = guest.worker.front().fault();
    assert_eq!(guest.device.needs_reset(), fault.is_some());
    assert_eq!(guest.interrupt.faults().len(), usize::from(fault.is_some()));
    assert_eq!(guest.disk.log(), []);
    fault
}

fn broken_chain() -> Option<QueueFault> {
    Some(QueueFault::BrokenChain { head: 0 })
}

fn broken_indirect() -> Option<QueueFault> {
    Some(QueueFault::BrokenIndirect { head: 0 })
}

#[test]
fn a_loop_breaks_the_queue() {
    let mut guest = Guest::new();
    guest.desc(0, HEADER, 16, NEXT, 1);
    guest.desc(1, DATA, 512, NEXT, 0);
    assert_eq!(fault(&mut guest), broken_chain());
    let mut guest = Guest::new();
    guest.desc(0, HEADER, 16, NEXT, 0);
    assert_eq!(fault(&mut guest), broken_chain());
}

#[test]
fn a_next_index_outside_the_table_breaks_the_queue() {
    for next in [64, 65, 0x8000, 0xffff] {
        let mut guest = Guest::new();
        guest.desc(0, HEADER, 16, NEXT, next);
        assert_eq!(fault(&mut guest), broken_chain());
    }
}

#[test]
fn a_chain_as_long_as_the_queue_is_fine() {
    let mut guest = Guest::new();
    guest.header(HEADER, 0, 0);
    let mut parts = vec![(HEADER, 16, 0)];
    parts.extend((0..62).map(|index| (DATA + 512 * index, 512, WRITE)));
    parts.push((STATUS, 1, WRITE));
    assert_eq!(parts.len(), 64);
    assert_eq!(guest.chain(&parts, STATUS), (OK, 62 * 512 + 1));
}

#[test]
fn a_head_outside_the_table_breaks_the_queue() {
    for head in [64, 0xffff] {
        let mut guest = Guest::new();
        guest.driver.post(head);
        let _ = guest.driver.publish();
        guest.process();
        assert_eq!(
            guest.worker.front().fault(),
            Some(QueueFault::HeadOutOfRange { head })
        );
    }
}

#[test]
fn a_head_in_flight_cannot_be_posted_again() {
    let mut guest = Guest::new();
    guest.disk.hold(true);
    let slot = guest.driver.read(0, &[(GuestAddress(DATA), 512)]).unwrap();
    assert_eq!(guest.turn(), []);
    guest.driver.post(slot * 6);
    assert_eq!(guest.turn(), []);
    assert_eq!(
        guest.worker.front().fault(),
        Some(QueueFault::DuplicateHead { head: slot * 6 })
    );
    // In the same batch, too; the first one still ends, once.
    let mut guest = Guest::new();
    guest.driver.read(0, &[(GuestAddress(DATA), 512)]).unwrap();
    guest.driver.post(0);
    assert_eq!(guest.turn().len(), 1);
    assert!(guest.device.needs_reset());
    assert_eq!(guest.used().0, 1);
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_queue() {
    for jump in [65u16, 0x4000, 0x8000, 0xffff] {
        let mut guest = Guest::new();
        let index = GuestAddress(guest.driver.avail_ring().0 + 2);
        guest.memory.write_obj(jump, index).unwrap();
        guest.process();
        let expected = QueueFault::AvailableIndex {
            index: jump,
            next: 0,
        };
        assert_eq!(guest.worker.front().fault(), Some(expected));
    }
}

#[test]
fn rings_outside_memory_are_refused_when_the_queue_is_made() {
    let guest = Guest::new();
    let make = |change: &dyn Fn(&mut virtio_queue::Queue)| {
        let mut queue = guest.driver.queue();
        change(&mut queue);
        let line: Arc<dyn Interrupt> = guest.interrupt.clone();
        guest
            .device
            .queue_worker(0, &queue, Arc::clone(&guest.memory), line)
            .err()
    };
    let end = MEMORY as u32;
    for address in [end, end - 16, 0xffff_fff0] {
        let low = Some(address);
        let refused = [
            make(&|queue| queue.set_desc_table_address(low, None)),
            make(&|queue| queue.set_avail_ring_address(low, None)),
            make(&|queue| queue.set_used_ring_address(low, None)),
            make(&|queue| queue.set_used_ring_address(low, Some(u32::MAX))),
        ];
        for error in refused {
            assert!(matches!(
                error,
                Some(Error::Queue {
                    fault: QueueFault::RingOutsideMemory { .. },
                    ..
                })
            ));
        }
    }
}

#[test]
fn an_indirect_table_must_hold_whole_descriptors_and_not_too_many() {
    for len in [0, 1, 15, 17, 16 * 67, 16 * 65536, u32::MAX, !15] {
        let mut guest = Guest::new();
        guest.desc(0, TABLE, len, INDIRECT, 0);
        assert_eq!(fault(&mut guest), broken_indirect(), "{len} bytes");
    }
}

#[test]
fn an_indirect_table_outside_memory_breaks_the_queue() {
    for address in [MEMORY as u64, MEMORY as u64 - 16, u64::MAX - 15, u64::MAX] {
        let mut guest = Guest::new();
        guest.desc(0, address, 32, INDIRECT, 0);
        guest
            .memory
            .write_obj(0x0001_0001_u64 << 32 | 16, GuestAddress(MEMORY as u64 - 8))
            .unwrap();
        assert_eq!(fault(&mut guest), broken_indirect(), "{address:#x}");
    }
}

#[test]
fn an_indirect_table_inside_an_indirect_table_breaks_the_queue() {
    let mut guest = Guest::new();
    guest.desc(0, TABLE, 32, INDIRECT, 0);
    guest.desc_at(TABLE, HEADER, 16, NEXT, 1);
    guest.desc_at(TABLE + 16, TABLE, 32, INDIRECT, 0);
    assert_eq!(fault(&mut guest), broken_indirect());
}

#[test]
fn an_indirect_descriptor_that_goes_on_breaks_the_queue() {
    let mut guest = Guest::new();
    guest.desc(0, TABLE, 32, INDIRECT | NEXT, 1);
    assert_eq!(fault(&mut guest), broken_indirect());
}

#[test]
fn a_loop_or_a_next_index_outside_an_indirect_table_breaks_the_queue() {
    for next in [0, 2, 0xffff] {
        let mut guest = Guest::new();
        guest.desc(0, TABLE, 32, INDIRECT, 0);
        guest.desc_at(TABLE, HEADER, 16, NEXT, 1);
        guest.desc_at(TABLE + 16, DATA, 512, NEXT, next);
        assert_eq!(fault(&mut guest), broken_indirect(), "next {next}");
    }
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors_and_be_flagged_writable() {
    let mut guest = Guest::new();
    guest.header(HEADER, 0, 0);
    guest.fill(STATUS, 1, 0xff);
    guest.desc(0, HEADER, 16, NEXT, 1);
    guest.desc(1, TABLE, 48, INDIRECT | WRITE, 0);
    // Out of order inside the table.
    guest.desc_at(TABLE, DATA, 512, WRITE | NEXT, 2);
    guest.desc_at(TABLE + 32, STATUS, 1, WRITE, 0);
    guest.driver.post(0);
    let _ = guest.driver.publish();
    guest.process();
    assert_eq!(guest.bytes(STATUS, 1), [OK]);
    assert_eq!(guest.used(), (1, 0, 513));
}

#[test]
fn a_driver_with_a_smaller_queue_may_use_longer_indirect_tables() {
    // The device said seg_max = 62; the transport gave the driver a queue of 16.
    let mut setup = Setup::default();
    setup.driver.queue_size = 16;
    setup.driver.max_segments = 62;
    setup.driver.indirect = true;
    let mut guest = Guest::with(setup);
    let data: Vec<_> = (0..62)
        .map(|index| (GuestAddress(DATA + 1024 * index), 512))
        .collect();
    guest.driver.read(0, &data);
    let used = guest.one();
    assert_eq!((used.status, used.len), (OK, 62 * 512 + 1));
}

#[test]
fn data_outside_memory_is_an_error_of_that_request() {
    let end = MEMORY as u64;
    let mut guest = Guest::new();
    for address in [end, end - 511, u64::MAX, u64::MAX - 511, 1 << 63] {
        for kind in [0, 1] {
            guest.header(HEADER, kind, 0);
            let flags = if kind == 0 { WRITE } else { 0 };
            let parts = [(HEADER, 16, 0), (address, 512, flags), (STATUS, 1, WRITE)];
            assert_eq!(guest.chain(&parts, STATUS), (IOERR, 1), "{address:#x}");
        }
        guest.header(HEADER, 8, 0);
        let id = [(HEADER, 16, 0), (address, 20, WRITE), (STATUS, 1, WRITE)];
        let expected = if address == end - 511 { OK } else { IOERR };
        assert_eq!(guest.chain(&id, STATUS).0, expected);
        guest.header(HEADER, 11, 0);
        let discard = [(HEADER, 16, 0), (address, 512, 0), (STATUS, 1, WRITE)];
        assert_eq!(guest.chain(&discard, STATUS), (IOERR, 1));
    }
    assert_eq!(guest.disk.log(), []);
    assert!(!guest.device.needs_reset());
}

#[test]
fn a_header_or_status_outside_memory_is_an_error_of_that_request() {
    let end = MEMORY as u64;
    let mut guest = Guest::new();
    for address in [end, end - 8, u64::MAX, u64::MAX - 8] {
        let parts = [(address, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        assert_eq!(guest.chain(&parts, STATUS), (IOERR, 1));
    }
    guest.header(HEADER, 0, 0);
    for address in [end, u64::MAX, u64::MAX - 1] {
        let parts = [(HEADER, 16, 0), (DATA, 512, WRITE), (address, 1, WRITE)];
        assert_eq!(guest.chain(&parts, STATUS), (0xff, 0));
    }
    // A status descriptor that wraps around the address space.
    let parts = [(HEADER, 16, 0), (DATA, 512, WRITE), (u64::MAX, 2, WRITE)];
    assert_eq!(guest.chain(&parts, STATUS), (0xff, 0));
}

#[test]
fn a_chain_of_more_than_four_gigabytes_is_an_error() {
    let mut guest = Guest::new();
    guest.header(HEADER, 0, 0);
    let parts = [
        (HEADER, 16, 0),
        (DATA, u32::MAX, WRITE),
        (DATA, u32::MAX, WRITE),
        (STATUS, 1, WRITE),
    ];
    assert_eq!(guest.chain(&parts, STATUS), (IOERR, 1));
    guest.header(HEADER, 1, 0);
    let parts = [
        (HEADER, 16, 0),
        (DATA, u32::MAX - 16, 0),
        (STATUS, 1, WRITE),
    ];
    assert_eq!(guest.chain(&parts, STATUS), (IOERR, 1));
    assert_eq!(guest.disk.log(), []);
}

#[test]
fn descriptors_may_overlap_each_other_and_the_rings() {
    let mut guest = Guest::new();
    guest.disk.write(0, &[0x77; 1024]);
    guest.header(HEADER, 0, 0);
    let parts = [
        (HEADER, 16, 0),
        (DATA, 512, WRITE),
        (DATA + 256, 512, WRITE),
        (STATUS, 1, WRITE),
    ];
    assert_eq!(guest.chain(&parts, STATUS), (OK, 1025));
    // The guest has the device overwrite its own descriptor table: its own loss.
    let table = guest.driver.desc_table().0;
    let parts = [(HEADER, 16, 0), (table, 1024, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(guest.chain(&parts, STATUS), (OK, 1025));
    guest.driver.post(0);
    let _ = guest.driver.publish();
    guest.process();
    assert!(guest.device.needs_reset());
}

#[test]
fn a_chain_that_changes_after_it_was_posted_is_used_as_copied() {
    let mut guest = Guest::new();
    guest.fill(DATA, 512, 1);
    guest.header(HEADER, 1, 0);
    guest.disk.hold(true);
    guest.post_chain(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    guest.process();
    // Header, descriptors and lengths change while the request is in flight.
    guest.header(HEADER, 0, u64::MAX);
    for index in 0..3 {
        guest.desc(index, u64::MAX, u32::MAX, NEXT | WRITE | INDIRECT, 0xffff);
    }
    guest.disk.release_all();
    guest.process();
    assert_eq!(guest.used(), (1, 0, 1));
    assert_eq!(guest.bytes(STATUS, 1), [OK]);
    assert_eq!(guest.disk.contents()[..512], [1; 512]);
}
