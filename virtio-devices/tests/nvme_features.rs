//! Features of namespaces, and log pages that are said to be there.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use block::Capabilities;
use nvme_common::{Guest, PAGE, Setup};
use virtio_devices::{
    nvme::{NamespaceConfig, Status, driver::Entry},
    testing::{MockDisk, MockDiskConfig},
};

const ERROR_RECOVERY: u32 = 0x05;
const NOTIFICATION_MASK: u32 = 0x82;
const PERSISTENCE: u32 = 0x83;
/// All namespaces.
const ALL: u32 = u32::MAX;

fn get(feature: u32, nsid: u32) -> Entry {
    Entry::new(0x0a).cdw(10, feature).nsid(nsid)
}

fn set(feature: u32, nsid: u32, value: u32) -> Entry {
    Entry::new(9).cdw(10, feature).cdw(11, value).nsid(nsid)
}

/// With namespaces 1 and 2; those whose place in `sidecars` is true have one, and can erase.
fn with_two(folder: &tempfile::TempDir, sidecars: [bool; 2]) -> Guest {
    let disk = |(at, sidecar): (usize, bool)| {
        let disk = MockDiskConfig {
            capabilities: Capabilities {
                overwrite: sidecar,
                ..MockDiskConfig::default().capabilities
            },
            ..MockDiskConfig::default()
        };
        let sidecar = sidecar.then(|| folder.path().join(format!("{at}.nvme")));
        let config = NamespaceConfig {
            sidecar,
            ..NamespaceConfig::default()
        };
        (disk, config)
    };
    Guest::with_queues(
        Setup {
            disks: sidecars.into_iter().enumerate().map(disk).collect(),
            ..Setup::default()
        },
        1,
    )
}

#[test]
fn every_namespace_has_values_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = with_two(&folder, [false; 2]);
    for (feature, value, all) in [(ERROR_RECOVERY, 10, 7), (NOTIFICATION_MASK, 2, 8)] {
        guest.admin_ok(set(feature, 1, value));
        assert_eq!(guest.admin_ok(get(feature, 1)), value, "{feature:#x}");
        assert_eq!(guest.admin_ok(get(feature, 2)), 0, "{feature:#x}");
        // Default and saved.
        for select in [1, 2] {
            assert_eq!(guest.admin_ok(get(feature | select << 8, 1)), 0);
        }
        guest.admin_ok(set(feature, ALL, all));
        for nsid in [1, 2] {
            assert_eq!(guest.admin_ok(get(feature, nsid)), all, "{feature:#x}");
        }
    }
    // One that comes in the place of another starts afresh.
    guest.subsystem.remove_namespace(2).unwrap();
    let disk = Box::new(MockDisk::new(MockDiskConfig::default()));
    let again = guest
        .subsystem
        .add_namespace(disk, &NamespaceConfig::default());
    assert_eq!(again.unwrap(), 2);
    assert_eq!(guest.admin_ok(get(ERROR_RECOVERY, 2)), 0);
    assert_eq!(guest.admin_ok(get(ERROR_RECOVERY, 1)), 7);
    guest.disable();
    guest.enable();
    assert_eq!(guest.admin_ok(get(ERROR_RECOVERY, 1)), 0);
}

#[test]
fn a_feature_of_a_namespace_needs_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = with_two(&folder, [true; 2]);
    for feature in [ERROR_RECOVERY, NOTIFICATION_MASK, PERSISTENCE] {
        for (nsid, expected) in [
            (0, Status::INVALID_NAMESPACE),
            // It could be there, and is not.
            (3, Status::INVALID_FIELD),
            (257, Status::INVALID_NAMESPACE),
        ] {
            let got = guest.admin(get(feature, nsid)).status;
            assert_eq!(got, expected, "get {feature:#x} of {nsid}");
            let got = guest.admin(set(feature, nsid, 0)).status;
            assert_eq!(got, expected, "set {feature:#x} of {nsid}");
        }
        // Together they have no value; with reservations that is a status of its own.
        let expected = match feature {
            ERROR_RECOVERY => Status::INVALID_NAMESPACE,
            _ => Status::INVALID_FIELD,
        };
        assert_eq!(guest.admin(get(feature, ALL)).status, expected);
        // What it can do does not depend on one.
        assert_eq!(guest.admin_ok(get(feature | 3 << 8, 0)) & 2, 2);
    }
}

#[test]
fn reservations_of_all_namespaces_persist_where_they_can() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = with_two(&folder, [true, false]);
    guest.admin_ok(set(PERSISTENCE, ALL, 1));
    assert_eq!(guest.admin_ok(get(PERSISTENCE, 1)), 1);
    assert_eq!(guest.admin_ok(get(PERSISTENCE, 2)), 0);
    assert_eq!(guest.admin_ok(get(PERSISTENCE | 1 << 8, 1)), 0, "default");
    drop(guest);
    let mut guest = with_two(&folder, [true, false]);
    assert_eq!(guest.admin_ok(get(PERSISTENCE, 1)), 1);
    guest.admin_ok(set(PERSISTENCE, ALL, 0));
    assert_eq!(guest.admin_ok(get(PERSISTENCE, 1)), 0);
    drop(guest);
    // Nothing to remember it in.
    let mut guest = with_two(&folder, [false; 2]);
    let refused = guest.admin(set(PERSISTENCE, ALL, 1)).status;
    assert_eq!(refused, Status::INVALID_FIELD);
}

#[test]
fn the_log_pages_that_are_there_can_be_read_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    for sidecar in [false, true] {
        let mut guest = with_two(&folder, [sidecar; 2]);
        let supported = guest.log(0, 1024);
        // LPA: bit 5 is about the pages 00h, 12h and 13h.
        assert_eq!(guest.identify(1, 0)[261] & 1 << 5, 1 << 5);
        for log in [0x00, 0x12, 0x13] {
            assert_eq!(supported[log * 4] & 1, 1, "{log:#x}");
        }
        for log in 0..=255_u32 {
            let read = Entry::new(2).data(PAGE, 0).nsid(ALL);
            let status = guest.admin(read.cdw(10, log | 127 << 16)).status;
            let there = supported[log as usize * 4] & 1 != 0;
            assert_eq!(status.is_success(), there, "{log:#x}: {status:?}");
        }
    }
}
