//! Guests that break the rules: the right status, never a panic, other queues unharmed.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{DATA, Guest, MEMORY, PAGE, Setup, read, write};
use virtio_devices::nvme::{Status, driver::Entry};

fn guest() -> Guest {
    Guest::with_queues(Setup::default(), 2)
}

#[test]
fn every_admin_opcode_with_every_kind_of_field() {
    let mut guest = guest();
    for opcode in 0..=u8::MAX {
        // Queue deletion would take the queues away, event requests do not end.
        if matches!(opcode, 0 | 4 | 0x0c) {
            continue;
        }
        for value in [0, 1, 0x0101_0101, 0x7fff_ffff, u32::MAX] {
            for data in [0, PAGE, 1 << 40, u64::MAX] {
                let mut entry = Entry::new(opcode).nsid(value).data(data, data);
                for dword in 10..16 {
                    entry = entry.cdw(dword, value);
                }
                guest.admin(entry);
            }
        }
    }
    // Shadow doorbells were set up somewhere; a reset takes them away.
    guest.disable();
    guest.enable();
    guest.create_pair(1, 64);
    guest.io_ok(read(0, 1));
}

#[test]
fn every_io_opcode_with_every_kind_of_field() {
    let mut guest = guest();
    for opcode in 0..=u8::MAX {
        for nsid in [0, 1, 2, u32::MAX] {
            for value in [0, 1, 0x0001_ffff, 0x7fff_ffff, u32::MAX] {
                for data in [0, DATA, MEMORY as u64 - 512, u64::MAX] {
                    let mut entry = Entry::new(opcode).nsid(nsid).data(data, data);
                    for dword in 10..16 {
                        entry = entry.cdw(dword, value);
                    }
                    for psdt in 0..4 {
                        guest.io(entry.flags(psdt << 6));
                    }
                }
            }
        }
    }
    guest.io_ok(read(0, 1));
    assert_eq!(guest.read32(nvme_common::CSTS), 1);
}

#[test]
fn every_identify_and_log_with_every_length() {
    let mut guest = guest();
    for cns in 0..=255 {
        for nsid in [0, 1, 2, 300, u32::MAX] {
            guest.admin(Entry::new(6).nsid(nsid).data(PAGE, 0).cdw(10, cns));
        }
    }
    for log in 0..=255_u32 {
        for dwords in [0, 1, 127, 1023, 1024, 0xffff] {
            for offset in [0, 4, 3, 512, 4096, 0xffff_fffc] {
                let entry = Entry::new(2)
                    .nsid(u32::MAX)
                    .data(PAGE, PAGE + 4096)
                    .cdw(10, log | dwords << 16)
                    .cdw(12, offset);
                guest.admin(entry);
            }
        }
    }
    guest.io_ok(read(0, 1));
}

#[test]
fn a_log_page_with_an_offset_shows_only_the_log() {
    let mut guest = guest();
    guest.fill(PAGE, 4096, 0xaa);
    let entry = Entry::new(2)
        .nsid(u32::MAX)
        .data(PAGE, 0)
        .cdw(10, 4 | 1023 << 16)
        .cdw(12, 4092);
    guest.admin_ok(entry);
    assert_eq!(guest.bytes(PAGE, 4096), vec![0; 4096]);
    assert_eq!(
        guest.admin(entry.cdw(12, 4100)).status,
        Status::INVALID_FIELD
    );
}

#[test]
fn data_outside_memory_is_an_error_of_that_command() {
    let mut guest = guest();
    let end = MEMORY as u64;
    for at in [end, end - 512 + 4, 1 << 50, u64::MAX - 4095] {
        assert_eq!(
            guest.status(read(0, 1).data(at & !3, end)),
            Status::DATA_TRANSFER_ERROR,
            "{at:#x}"
        );
    }
    assert_eq!(
        guest.status(read(0, 1).data(DATA + 2, 0)),
        Status::PRP_OFFSET_INVALID
    );
    guest.io_ok(read(0, 1));
}

#[test]
fn doorbells_that_mean_nothing_are_events_and_nothing_else() {
    let mut guest = guest();
    let request = guest.post_admin(Entry::new(0x0c));
    guest.process();
    // Beyond the queues; a queue that does not exist; a tail that is no entry.
    guest.write32(0x1000 + 8 * 5000, 1);
    guest.write32(0x1000 + 8 * 3, 1);
    let mut event = None;
    guest.until("an event", |guest| {
        event = guest.take_admin(request);
        event.is_some()
    });
    assert_eq!(event.unwrap().dw0, 0x0001_0000);
    let request = guest.post_admin(Entry::new(0x0c));
    guest.write32(0x1000 + 8, 64);
    guest.process();
    // The kind is masked until the error log is read.
    assert!(guest.take_admin(request).is_none());
    guest.log(1, 64);
    guest.process();
    let event = guest.take_admin(request).unwrap();
    assert_eq!(event.dw0, 0x0001_0100);
    guest.io_ok(read(0, 1));
}

#[test]
fn a_queue_outside_memory_fails_the_controller_and_a_reset_mends_it() {
    let mut guest = guest();
    let far = 1_u64 << 40;
    guest.admin_ok(Entry::new(5).data(far, 0).cdw(10, 3 | 63 << 16).cdw(11, 1));
    guest.admin_ok(
        Entry::new(1)
            .data(far, 0)
            .cdw(10, 3 | 63 << 16)
            .cdw(11, 1 | 3 << 16),
    );
    guest.write32(0x1000 + 8 * 3, 1);
    guest.process();
    assert_eq!(guest.read32(nvme_common::CSTS) & 2, 2);
    // The others go on.
    guest.io_ok(read(0, 1));
    guest.disable();
    guest.enable();
    assert_eq!(guest.read32(nvme_common::CSTS), 1);
}

#[test]
fn an_admin_queue_outside_memory_fails_the_controller() {
    let mut guest = Guest::with(Setup::default());
    guest.write32(nvme_common::AQA, 0x001f_001f);
    guest.write64(nvme_common::ASQ, 1 << 44);
    guest.write64(nvme_common::ACQ, 1 << 45);
    guest.write32(nvme_common::CC, nvme_common::CC_ENABLE);
    guest.process();
    guest.write32(0x1000, 1);
    guest.process();
    assert_eq!(guest.read32(nvme_common::CSTS) & 2, 2);
    guest.disable();
    guest.enable();
}

#[test]
fn a_command_that_changes_after_it_was_posted_is_taken_once() {
    let mut guest = guest();
    guest.disks[0].hold(true);
    guest.fill(DATA, 512, 1);
    guest.post(0, &[write(5, 1)]);
    guest.process();
    // The entry is overwritten while it is in flight.
    let (sq, _) = nvme_common::queue_addresses(1);
    guest.fill(sq, 64, 0xff);
    guest.let_disk_go();
    guest.process();
    let done = guest.poll(0);
    assert_eq!(done.len(), 1);
    assert!(done[0].status.is_success());
    assert_eq!(guest.disks[0].contents()[5 * 512..6 * 512], [1; 512]);
}

#[test]
fn register_accesses_of_odd_sizes_do_nothing() {
    let mut guest = guest();
    for len in [0, 1, 2, 3, 5, 7, 16] {
        guest.controller.write(0x14, &vec![0; len]);
    }
    guest.controller.write(0x15, &[0; 4]);
    guest.controller.write(u64::MAX - 3, &[0xff; 4]);
    guest.controller.write(u64::MAX - 3, &[0xff; 8]);
    let mut data = [0xee; 64];
    guest.controller.read(u64::MAX - 10, &mut data[..8]);
    guest.controller.read(0xff8, &mut data);
    guest.process();
    assert!(guest.ready());
    guest.io_ok(read(0, 1));
}

#[test]
fn more_than_the_queue_holds_stays_bounded() {
    let mut guest = guest();
    guest.disks[0].hold(true);
    // The host never takes a completion, and wraps the submission queue again and again.
    for _ in 0..20 {
        for slba in 0..63 {
            guest.queues[0].push(&read(slba, 1).cid(slba as u16));
        }
        guest.queues[0].ring(&guest.controller);
        guest.process();
        assert!(guest.disks[0].held() <= 64);
        if guest.disks[0].held() == 64 {
            break;
        }
    }
    guest.let_disk_go();
    guest.process();
    guest.disable();
    guest.enable();
}
