//! The admin commands: what the controller says, features, logs, events, namespaces.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use std::sync::Arc;

use block::DiskFile;
use nvme_common::{DATA, Guest, PAGE, Setup, le32, le64, read, scope, with_sidecar, write};
use virtio_devices::{
    nvme::{NamespaceConfig, NvmeConfig, PoolConfig, Status, SubsystemConfig, driver::Entry},
    testing::{MockDisk, MockDiskConfig},
};

fn feature(id: u32) -> Entry {
    Entry::new(0x0a).cdw(10, id)
}

fn set(id: u32, value: u32) -> Entry {
    Entry::new(9).cdw(10, id).cdw(11, value)
}

fn with_pool(folder: &tempfile::TempDir) -> Setup {
    Setup {
        subsystem: SubsystemConfig {
            pool: Some(PoolConfig {
                folder: folder.path().to_owned(),
                capacity: 8 << 20,
                open: Arc::new(|path| Err(format!("{} is not reopened", path.display()).into())),
                create: Arc::new(|path, size| {
                    std::fs::write(path, b"")?;
                    Ok(Box::new(MockDisk::new(MockDiskConfig {
                        size,
                        ..MockDiskConfig::default()
                    })))
                }),
            }),
            ..SubsystemConfig::default()
        },
        ..with_sidecar(folder, false)
    }
}

#[test]
fn the_number_of_queues_is_negotiated_before_any_is_made() {
    let mut guest = Guest::new();
    assert_eq!(guest.admin_ok(set(7, 0x007f_007f)), 0x0003_0003);
    assert_eq!(guest.admin_ok(feature(7)), 0x0003_0003);
    assert_eq!(guest.admin(set(7, 0xffff)).status, Status::INVALID_FIELD);
    guest.create_pair(1, 64);
    assert_eq!(
        guest.admin(set(7, 0)).status,
        Status::COMMAND_SEQUENCE_ERROR
    );
}

#[test]
fn features_keep_their_values_until_a_reset() {
    let mut guest = Guest::new();
    for (id, value) in [
        (1, 0x0102_0303),
        (2, 3 << 5),
        (5, 10),
        (6, 0),
        (8, 0x0305),
        (0x0a, 1),
        (0x0b, 0x100),
    ] {
        let nsid = if id == 5 { 1 } else { 0 };
        guest.admin_ok(set(id, value).nsid(nsid));
        assert_eq!(guest.admin_ok(feature(id).nsid(nsid)), value, "{id:#x}");
        assert!(guest.admin_ok(feature(id | 3 << 8)) & 4 != 0);
        assert_eq!(
            guest.admin(set(id | 1 << 31, value).nsid(nsid)).status,
            Status::FEATURE_NOT_SAVEABLE
        );
    }
    guest.disable();
    guest.enable();
    assert_eq!(guest.admin_ok(feature(6)), 1);
    assert_eq!(guest.admin_ok(feature(8)), 0);
    for id in [0, 0x03, 0x0c, 0x0d, 0x77, 0xff] {
        assert_eq!(guest.admin(feature(id)).status, Status::INVALID_FIELD);
    }
    assert_eq!(
        guest.admin(set(6, 0).nsid(1)).status,
        Status::FEATURE_NOT_NAMESPACE_SPECIFIC
    );
    // DULBE is not offered.
    assert_eq!(
        guest.admin(set(5, 1 << 16).nsid(1)).status,
        Status::INVALID_FIELD
    );
}

#[test]
fn the_timestamp_goes_on_from_what_was_set() {
    let mut guest = Guest::new();
    guest.put(PAGE, &1_000_000_u64.to_le_bytes());
    guest.admin_ok(set(0x0e, 0).data(PAGE, 0));
    guest.admin_ok(feature(0x0e).data(PAGE, 0));
    let data = guest.bytes(PAGE, 8);
    let now = u64::from_le_bytes(data.try_into().unwrap());
    assert!((1_000_000..1_060_000).contains(&(now & 0xffff_ffff_ffff)));
    assert_eq!(now >> 48 & 0xff, 2);
}

#[test]
fn a_temperature_beyond_its_threshold_is_an_event() {
    let mut guest = Guest::new();
    guest.admin_ok(set(0x0b, 2));
    let request = guest.post_admin(Entry::new(0x0c));
    guest.admin_ok(set(4, 290));
    guest.process();
    let event = guest.take_admin(request).unwrap();
    assert_eq!(event.dw0, 0x0002_0101);
    assert_eq!(guest.log(2, 512)[0] & 2, 2);
    assert_eq!(guest.admin_ok(feature(4)), 290);
}

#[test]
fn event_requests_have_a_limit_and_can_be_aborted() {
    let mut guest = Guest::new();
    let requests: Vec<u16> = (0..8).map(|_| guest.post_admin(Entry::new(0x0c))).collect();
    assert_eq!(
        guest.admin(Entry::new(0x0c)).status,
        Status::AER_LIMIT_EXCEEDED
    );
    let abort = |cid: u16| Entry::new(8).cdw(10, u32::from(cid) << 16);
    assert_eq!(guest.admin_ok(abort(requests[3])), 0);
    let aborted = guest.take_admin(requests[3]).unwrap();
    assert_eq!(aborted.status, Status::ABORT_REQUESTED);
    assert_eq!(guest.admin_ok(abort(requests[3])), 1);
    assert_eq!(guest.admin_ok(abort(0x7777)), 1);
}

#[test]
fn a_resize_is_an_event_and_in_the_changed_list() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    guest.admin_ok(set(0x0b, 0x100));
    let request = guest.post_admin(Entry::new(0x0c));
    guest.process();
    guest.disks[0].resize(2 << 20).unwrap();
    guest.process();
    assert_eq!(guest.take_admin(request).unwrap().dw0, 0x0004_0002);
    let changed = guest.log(4, 4096);
    assert_eq!((le32(&changed, 0), le32(&changed, 4)), (1, 0));
    assert_eq!(le32(&guest.log(4, 4096), 0), 0);
    assert_eq!(le64(&guest.identify(0, 1), 0), 4096);
    guest.io_ok(read(4095, 1));
}

#[test]
fn namespaces_come_and_go_while_the_guest_runs() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let disk = MockDisk::new(MockDiskConfig::default());
    let nsid = guest
        .subsystem
        .add_namespace(Box::new(disk.clone()), &NamespaceConfig::default())
        .unwrap();
    assert_eq!(nsid, 2);
    guest.fill(DATA, 512, 5);
    guest.io_ok(write(0, 1).nsid(2));
    assert_eq!(disk.contents()[..512], [5; 512]);
    let list = guest.identify(2, 0);
    assert_eq!((le32(&list, 0), le32(&list, 4), le32(&list, 8)), (1, 2, 0));
    // One that is removed finishes what it has.
    disk.hold(true);
    guest.post(0, &[write(1, 1).nsid(2)]);
    guest.process();
    guest.subsystem.remove_namespace(2).unwrap();
    guest.process();
    assert_eq!(guest.status(read(0, 1).nsid(2)), Status::INVALID_FIELD);
    disk.hold(false);
    disk.release_all();
    guest.process();
    assert_eq!(guest.poll(0).len(), 1);
    assert!(guest.subsystem.remove_namespace(2).is_err());
    guest.io_ok(read(0, 1));
}

#[test]
fn identities_are_different_and_stay_the_same() {
    let ids = || {
        let mut guest = Guest::with(Setup {
            disks: vec![Default::default(), Default::default()],
            ..Setup::default()
        });
        guest.enable();
        let one = guest.identify(3, 1);
        let two = guest.identify(3, 2);
        let controller = guest.identify(1, 0);
        (
            one,
            two,
            controller[4..24].to_vec(),
            controller[768..1024].to_vec(),
        )
    };
    let first = ids();
    assert_ne!(first.0, first.1);
    assert_eq!(first, ids());
    assert_eq!(first.0[..2], [2, 16]);
    assert!(first.3.starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
}

#[test]
fn format_changes_the_block_size_and_remembers_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, false), 1);
    guest.fill(DATA, 4096, 5);
    guest.io_ok(write(0, 8));
    let format = Entry::new(0x80).nsid(1);
    assert_eq!(
        guest.admin(format.cdw(10, 2)).status,
        Status::INVALID_FORMAT
    );
    assert_eq!(
        guest.admin(format.cdw(10, 1 | 1 << 9)).status,
        Status::INVALID_FIELD
    );
    guest.admin_ok(format.cdw(10, 1));
    assert_eq!(guest.identify(0, 1)[26], 1);
    assert_eq!(le64(&guest.identify(0, 1), 0), 256);
    guest.io_ok(read(0, 1));
    assert_eq!(guest.bytes(DATA, 4096), [0; 4096]);
    drop(guest);
    let mut guest = Guest::with_queues(with_sidecar(&folder, false), 1);
    assert_eq!(guest.identify(0, 1)[26], 1);
    // Without a sidecar it is not offered.
    let mut guest = Guest::new();
    assert_eq!(le32(&guest.identify(1, 0), 256) & 2, 0);
    assert_eq!(guest.admin(format).status, Status::INVALID_OPCODE);
}

#[test]
fn namespaces_are_created_attached_detached_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_pool(&folder), 1);
    let page = guest.identify(1, 0);
    assert_eq!(le32(&page, 256) & 8, 8);
    assert_eq!(le64(&page, 280), 8 << 20);
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &4096_u64.to_le_bytes());
    guest.put(PAGE + 8, &4096_u64.to_le_bytes());
    let create = Entry::new(0x0d).data(PAGE, 0);
    let nsid = guest.admin_ok(create);
    assert_eq!(nsid, 2);
    let page = guest.identify(1, 0);
    assert_eq!(le64(&page, 296), 6 << 20);
    assert_eq!(le32(&guest.identify(2, 0), 4), 0);
    assert_eq!(le32(&guest.identify(0x10, 0), 4), 2);
    assert_eq!(le64(&guest.identify(0x11, 2), 0), 4096);
    assert_eq!(guest.status(write(0, 1).nsid(2)), Status::INVALID_FIELD);
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &[1, 0]);
    let attach = Entry::new(0x15).nsid(2).data(PAGE, 0);
    guest.admin_ok(attach);
    assert_eq!(
        guest.admin(attach).status,
        Status::NAMESPACE_ALREADY_ATTACHED
    );
    guest.io_ok(write(0, 1).nsid(2));
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &[1, 0]);
    guest.admin_ok(attach.cdw(10, 1));
    assert_eq!(guest.status(write(0, 1).nsid(2)), Status::INVALID_FIELD);
    assert_eq!(
        guest.admin(attach.cdw(10, 1)).status,
        Status::NAMESPACE_NOT_ATTACHED
    );
    guest.put(PAGE, &[1, 0, 9, 0]);
    assert_eq!(guest.admin(attach).status, Status::CONTROLLER_LIST_INVALID);
    guest.admin_ok(Entry::new(0x0d).nsid(2).cdw(10, 1));
    assert_eq!(le32(&guest.identify(0x10, 0), 4), 0);
    assert!(!folder.path().join("namespace-2.raw").exists());
    // One that was configured stays; too much is too much.
    assert_eq!(
        guest.admin(Entry::new(0x0d).nsid(1).cdw(10, 1)).status,
        Status::INVALID_FIELD
    );
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &(1_u64 << 20).to_le_bytes());
    guest.put(PAGE + 8, &(1_u64 << 20).to_le_bytes());
    assert_eq!(
        guest.admin(create).status,
        Status::NAMESPACE_INSUFFICIENT_CAPACITY
    );
}

/// Posts the creation of a namespace of that many blocks of 512 bytes.
fn create(guest: &mut Guest, blocks: u64) -> virtio_devices::nvme::driver::Completed {
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &blocks.to_le_bytes());
    guest.put(PAGE + 8, &blocks.to_le_bytes());
    guest.admin(Entry::new(0x0d).data(PAGE, 0))
}

#[test]
fn a_resize_in_a_pool_counts_against_its_capacity() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_pool(&folder), 1);
    let free = |guest: &mut Guest| le64(&guest.identify(1, 0), 296);
    for nsid in [2, 3] {
        assert_eq!(create(&mut guest, 4096).dw0, nsid);
    }
    assert_eq!(free(&mut guest), 4 << 20);
    let subsystem = Arc::clone(&guest.subsystem);
    // Of 8 MiB the other namespace has 2.
    assert!(subsystem.resize_namespace(2, (6 << 20) + 512).is_err());
    assert_eq!(free(&mut guest), 4 << 20);
    subsystem.resize_namespace(2, 6 << 20).unwrap();
    assert_eq!(free(&mut guest), 0);
    assert_eq!(le64(&guest.identify(0x11, 2), 0), (6 << 20) / 512);
    assert_eq!(
        create(&mut guest, 1).status,
        Status::NAMESPACE_INSUFFICIENT_CAPACITY
    );
    assert!(subsystem.resize_namespace(3, (2 << 20) + 512).is_err());
    subsystem.resize_namespace(2, 1 << 20).unwrap();
    assert_eq!(free(&mut guest), 5 << 20);
    subsystem.resize_namespace(3, 7 << 20).unwrap();
    assert_eq!(free(&mut guest), 0);
    // What is not of the pool does not count; sizes are whole blocks.
    subsystem.resize_namespace(1, 16 << 20).unwrap();
    assert_eq!(free(&mut guest), 0);
    for (nsid, size) in [(1, 0), (1, 1000), (9, 512)] {
        assert!(subsystem.resize_namespace(nsid, size).is_err());
    }
}

#[test]
fn only_several_controllers_say_that_they_are_several() {
    let mut one = Guest::new();
    let shared = |guest: &mut Guest| {
        let multi = guest.identify(1, 0)[76];
        (multi, guest.identify(0, 1)[30], guest.identify(8, 1)[1])
    };
    assert_eq!(shared(&mut one), (0, 0, 0));
    let mut two = Guest::of(&one.subsystem, Vec::new(), NvmeConfig::default());
    two.enable();
    assert_eq!(shared(&mut one), (2, 1, 1));
    assert_eq!(shared(&mut two), (2, 1, 1));
    drop(two);
    assert_eq!(shared(&mut one), (0, 0, 0));
}

#[test]
fn without_a_pool_namespaces_are_not_managed() {
    let mut guest = Guest::new();
    assert_eq!(le32(&guest.identify(1, 0), 256) & 8, 0);
    assert_eq!(guest.admin(Entry::new(0x0d)).status, Status::INVALID_OPCODE);
    assert_eq!(guest.admin(Entry::new(0x15)).status, Status::INVALID_OPCODE);
    // Firmware neither.
    assert_eq!(guest.admin(Entry::new(0x10)).status, Status::INVALID_OPCODE);
    assert_eq!(guest.admin(Entry::new(0x11)).status, Status::INVALID_OPCODE);
    assert_eq!(guest.identify(1, 0)[260], 3);
    assert_eq!(guest.log(3, 512)[0], 1);
}

#[test]
fn what_version_2_makes_mandatory_is_there() {
    let mut guest = Guest::new();
    for (cns, nsid) in [(3, 1), (6, 0), (8, 1), (0x1c, u32::MAX)] {
        guest.identify(cns, nsid);
    }
    let supported = guest.log(0, 1024);
    for log in [0_usize, 1, 2, 3, 4, 5, 0x12] {
        assert_eq!(supported[log * 4], 1, "{log:#x}");
        guest.log(log as u32, 512);
    }
    let effects = guest.log(5, 4096);
    // Supported, of the controller; then supported, of a namespace, whose blocks a write changes.
    assert_eq!(le32(&effects, 6 * 4), 1 | 1 << 21);
    assert_eq!(le32(&effects, 1024 + 2 * 4), 1 | 1 << 20);
    assert_eq!(le32(&effects, 1024 + 4), 3 | 1 << 20);
    assert_eq!(guest.read32(0x68) & 0xffff, 40);
}

#[test]
fn every_command_has_a_scope_because_lpa_says_so() {
    const NAMESPACE: u32 = 1;
    const CONTROLLER: u32 = 2;
    const SUBSYSTEM: u32 = 32;
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_queues(with_sidecar(&folder, true), 1);
    assert_eq!(guest.identify(1, 0)[261] & 1 << 5, 1 << 5);
    let effects = guest.log(5, 4096);
    let mut supported = [0, 0];
    for opcode in 0..=u8::MAX {
        if let Some(scope) = scope(&effects, false, opcode) {
            supported[0] += 1;
            let expected = match opcode {
                0x09 => CONTROLLER | NAMESPACE,
                0x80 => NAMESPACE,
                0x84 => SUBSYSTEM | NAMESPACE,
                _ => CONTROLLER,
            };
            assert_eq!(scope, expected, "admin command {opcode:#x}");
        }
        if let Some(scope) = scope(&effects, true, opcode) {
            supported[1] += 1;
            assert_eq!(scope, NAMESPACE, "I/O command {opcode:#x}");
        }
    }
    assert_eq!(supported, [13, 13]);
}

#[test]
fn shadow_doorbells_are_read_and_ask_for_a_ring() {
    let mut guest = Guest::with_queues(Setup::default(), 1);
    let (shadow, event) = (0x8000, 0x9000);
    guest.fill(shadow, 8192, 0);
    guest.admin_ok(Entry::new(0x7c).data(shadow, event));
    guest.process();
    // The event index of the tail is where the controller stands.
    assert_eq!(le32(&guest.bytes(event + 8, 4), 0), 0);
    for at in 0..3 {
        guest.queues[0].push(&read(at, 1).cid(at as u16 + 500));
    }
    guest.put(shadow + 8, &3_u32.to_le_bytes());
    // Nothing was rung: a worker that is awake for another reason sees it.
    guest.process();
    assert_eq!(guest.poll(0).len(), 3);
    guest.process();
    assert_eq!(le32(&guest.bytes(event + 8, 4), 0), 3);
    // A value that is no entry is ignored.
    guest.put(shadow + 8, &64_u32.to_le_bytes());
    guest.process();
    assert!(guest.poll(0).is_empty());
    assert_eq!(
        guest.admin(Entry::new(0x7c).data(shadow + 4, event)).status,
        Status::PRP_OFFSET_INVALID
    );
    assert_eq!(
        guest.admin(Entry::new(0x7c).data(1 << 40, event)).status,
        Status::INVALID_FIELD
    );
}

#[test]
fn interrupts_are_held_back_until_the_threshold_or_the_time() {
    let mut guest = Guest::with_queues(Setup::default(), 2);
    // Four entries or 2 ms.
    guest.admin_ok(set(8, 3 | 20 << 8));
    let before = guest.lines.count(1);
    guest.post(0, &[read(0, 1)]);
    guest.process();
    assert_eq!(guest.lines.count(1), before);
    guest.until("the time", |guest| guest.lines.count(1) == before + 1);
    guest.post(0, &[read(0, 1), read(1, 1), read(2, 1), read(3, 1)]);
    guest.process();
    assert_eq!(guest.lines.count(1), before + 2);
    // A vector can be left out.
    guest.admin_ok(set(9, 2 | 1 << 16));
    let before = guest.lines.count(2);
    guest.post(1, &[read(0, 1)]);
    guest.process();
    assert_eq!(guest.lines.count(2), before + 1);
}

#[test]
fn a_fused_pair_is_alone_among_the_queues_of_two_controllers() {
    let mut one = Guest::with_queues(Setup::default(), 1);
    let mut two = Guest::of(&one.subsystem, Vec::new(), NvmeConfig::default());
    two.enable();
    two.create_pair(1, 64);
    one.disks[0].hold(true);
    one.fill(DATA, 512, 0);
    one.post(
        0,
        &[
            Entry::new(5).nsid(1).blocks(0, 1).data(DATA, 0).flags(1),
            Entry::new(1).nsid(1).blocks(0, 1).data(DATA, 0).flags(2),
        ],
    );
    one.process();
    assert_eq!(one.disks[0].held(), 1);
    two.post(0, &[write(0, 1)]);
    two.process();
    assert_eq!(one.disks[0].held(), 1, "the other controller's write waits");
    one.disks[0].hold(false);
    one.disks[0].release_all();
    one.process();
    assert_eq!(one.poll(0).len(), 2);
    let mut done = 0;
    two.until("the write", |two| {
        done += two.poll(0).len();
        done == 1
    });
}
