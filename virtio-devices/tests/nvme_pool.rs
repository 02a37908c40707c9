//! A pool of images that outlives its server.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use std::{path::Path, sync::Arc};

use block::{AsyncDiskFile, Format, OpenOptions};
use nvme_common::{DATA, Guest, PAGE, Setup, le64, read, scope, write};
use virtio_devices::nvme::{
    NamespaceConfig, PoolConfig, Status, Subsystem, SubsystemConfig, driver::Entry,
};

const CAPACITY: u64 = 8 << 20;

fn open(path: &Path) -> Result<Box<dyn AsyncDiskFile>, block::Error> {
    OpenOptions::new().format(Format::Raw).open(path)
}

fn setup(folder: &Path) -> Setup {
    Setup {
        subsystem: SubsystemConfig {
            pool: Some(PoolConfig {
                folder: folder.to_owned(),
                capacity: CAPACITY,
                create: Arc::new(|path, bytes| {
                    std::fs::File::create_new(path)?.set_len(bytes)?;
                    Ok(open(path)?)
                }),
                open: Arc::new(|path| Ok(open(path)?)),
            }),
            ..SubsystemConfig::default()
        },
        disks: Vec::new(),
        ..Setup::default()
    }
}

fn start(folder: &Path) -> Guest {
    Guest::with_queues(setup(folder), 1)
}

/// Closes everything, as a server that ends does.
fn stop(guest: Guest) {
    for namespace in guest.subsystem.namespaces() {
        namespace.disk().close().unwrap();
    }
    drop(guest);
}

fn create(guest: &mut Guest, blocks: u64, format: u8) -> u32 {
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &blocks.to_le_bytes());
    guest.put(PAGE + 8, &blocks.to_le_bytes());
    guest.put(PAGE + 26, &[format]);
    guest.admin_ok(Entry::new(0x0d).data(PAGE, 0))
}

fn attachment(guest: &mut Guest, nsid: u32, select: u32) {
    guest.fill(PAGE, 4096, 0);
    guest.put(PAGE, &[1, 0]);
    guest.admin_ok(Entry::new(0x15).nsid(nsid).data(PAGE, 0).cdw(10, select));
}

fn free(guest: &mut Guest) -> u64 {
    le64(&guest.identify(1, 0), 296)
}

/// NGUID and descriptors.
fn names(guest: &mut Guest, nsid: u32) -> (Vec<u8>, Vec<u8>) {
    let page = guest.identify(0x11, nsid);
    let list = guest.identify(3, nsid);
    (page[104..120].to_vec(), list[..64].to_vec())
}

#[test]
fn managing_namespaces_has_an_effect_on_the_whole_subsystem() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = start(folder.path());
    let effects = guest.log(5, 4096);
    // The subsystem and namespaces; attaching one has an effect on controllers, too.
    assert_eq!(scope(&effects, false, 0x0d), Some(32 | 1));
    assert_eq!(scope(&effects, false, 0x15), Some(32 | 2 | 1));
}

#[test]
fn namespaces_come_back_with_their_data_names_and_attachments() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = start(folder.path());
    assert_eq!(create(&mut guest, 4096, 0), 1);
    assert_eq!(create(&mut guest, 256, 1), 2);
    assert_eq!(create(&mut guest, 512, 0), 3);
    for nsid in [1, 2, 3] {
        attachment(&mut guest, nsid, 0);
    }
    attachment(&mut guest, 3, 1);
    for (nsid, byte) in [(1, 0x11), (2, 0x22)] {
        guest.fill(DATA, 4096, byte);
        guest.io_ok(write(7, 1).nsid(nsid));
    }
    let left = CAPACITY - (2 << 20) - (1 << 20) - (256 << 10);
    assert_eq!(free(&mut guest), left);
    let before = [1, 2].map(|nsid| names(&mut guest, nsid));
    assert_ne!(before[0], before[1]);
    stop(guest);

    let mut guest = start(folder.path());
    assert_eq!(free(&mut guest), left, "they count against the capacity");
    assert_eq!([1, 2].map(|nsid| names(&mut guest, nsid)), before);
    for (nsid, byte, len) in [(1, 0x11, 512), (2, 0x22, 4096)] {
        guest.fill(DATA, 4096, 0);
        guest.io_ok(read(7, 1).nsid(nsid));
        assert_eq!(guest.bytes(DATA, len), vec![byte; len]);
    }
    // Detached it was, and detached it is: it can be attached again, and deleted.
    assert_eq!(guest.status(read(0, 1).nsid(3)), Status::INVALID_FIELD);
    attachment(&mut guest, 3, 0);
    guest.io_ok(read(0, 1).nsid(3));
    guest.admin_ok(Entry::new(0x0d).nsid(1).cdw(10, 1));
    assert_eq!(free(&mut guest), left + (2 << 20));
    // What is made in the place of the old one is another one.
    assert_eq!(create(&mut guest, 4096, 0), 1);
    attachment(&mut guest, 1, 0);
    let new = names(&mut guest, 1);
    assert_ne!(new.0, before[0].0);
    guest.io_ok(read(7, 1));
    assert_eq!(guest.bytes(DATA, 512), vec![0; 512]);
    stop(guest);

    let mut guest = start(folder.path());
    assert_eq!(names(&mut guest, 1), new);
    guest.io_ok(read(0, 1).nsid(3));
    let files = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(files.count(), 6);
}

#[test]
fn half_a_namespace_is_left_alone_and_its_place_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("namespace-1.raw"), [1; 4096]).unwrap();
    std::fs::write(path("namespace-2.nvme"), "what is this").unwrap();
    let mut guest = start(folder.path());
    assert!(guest.subsystem.namespaces().is_empty());
    assert_eq!(create(&mut guest, 8, 0), 3);
    stop(guest);
    assert_eq!(std::fs::read(path("namespace-1.raw")).unwrap(), [1; 4096]);
    // A whole one that cannot be used is an error that names it.
    std::fs::write(path("namespace-2.raw"), [1; 4096]).unwrap();
    let error = Subsystem::new(setup(folder.path()).subsystem)
        .err()
        .unwrap();
    assert!(error.to_string().contains("namespace-2.nvme"), "{error}");
    std::fs::remove_file(path("namespace-2.nvme")).unwrap();
    // An image that somebody else uses.
    let held = open(&path("namespace-3.raw")).unwrap();
    let error = Subsystem::new(setup(folder.path()).subsystem)
        .err()
        .unwrap();
    assert!(error.to_string().contains("namespace-3.raw"), "{error}");
    held.close().unwrap();
    drop(held);
    assert_eq!(start(folder.path()).subsystem.namespaces().len(), 1);
}

#[test]
fn the_host_of_the_server_deletes_what_a_guest_made() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = start(folder.path());
    assert_eq!(create(&mut guest, 4096, 0), 1);
    attachment(&mut guest, 1, 0);
    guest.io_ok(write(0, 1));
    guest.admin_ok(Entry::new(9).cdw(10, 0x0b).cdw(11, 0x100));
    let request = guest.post_admin(Entry::new(0x0c));
    // Without its image it would be back at the next start.
    let error = guest.subsystem.remove_namespace(1).unwrap_err();
    let error = error.to_string();
    for part in ["namespace 1 ", "pool", "namespace-1.raw"] {
        assert!(error.contains(part), "{error}");
    }
    guest.io_ok(read(0, 1));
    assert!(guest.take_admin(request).is_none());
    guest.subsystem.delete_namespace(1).unwrap();
    guest.process();
    assert_eq!(guest.take_admin(request).unwrap().dw0, 0x0004_0002);
    assert_eq!(guest.status(read(0, 1)), Status::INVALID_FIELD);
    assert_eq!(free(&mut guest), CAPACITY);
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files(), 0);
    assert!(guest.subsystem.delete_namespace(1).is_err());
    // What was given by hand is not ours to delete.
    let path = folder.path().join("given");
    std::fs::File::create_new(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let disk = open(&path).unwrap();
    let config = NamespaceConfig::default();
    let nsid = guest.subsystem.add_namespace(disk, &config).unwrap();
    let error = guest.subsystem.delete_namespace(nsid).unwrap_err();
    assert!(error.to_string().contains("given"), "{error}");
    guest.subsystem.remove_namespace(nsid).unwrap();
    assert_eq!(files(), 1);
}
