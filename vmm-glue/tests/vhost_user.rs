//! The vhost-user server, driven by the `vhost` crate's front end and our own driver.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    thread,
    time::Duration,
};

use block::{AsyncDiskFile, OpenOptions};
use common::{Client, DATA, HIGH_DATA, PATIENCE, Running, config, connect, eventually, features};
use vhost::{
    VhostBackend, VhostUserDirtyLogRegion,
    vhost_user::{
        VhostUserFrontend, VhostUserProtocolFeatures as Protocol, message::VhostUserConfigFlags,
    },
};
use virtio_devices::{
    testing::{MockDisk, MockDiskConfig},
    virtio_blk::{VirtioBlkConfig, WRITEBACK_OFFSET, feature},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_glue::vhost_user::{VhostUserBlkConfig, VhostUserBlkServer};

fn mock() -> MockDisk {
    MockDisk::new(MockDiskConfig::default())
}

#[test]
fn serves_an_image_on_two_queues() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let options = OpenOptions::new().format(block::Format::Raw);
    let disk = options.open(&image).unwrap();
    let server = Running::new(disk, config(2));

    let mut client = Client::new(&server.path, 2);
    assert_eq!(client.capacity(), (1 << 20) / 512);
    client.check(0, 0, 0x11);
    client.check(1, 64 << 10, 0x22);
    client.rings[0].driver.flush().unwrap();
    client.finish(0);
    client.rings[1].driver.get_id(&[(DATA, 20)]).unwrap();
    client.finish(1);
    assert_eq!(&client.guest.bytes(DATA, 11), b"vhost-test\0");
    // Both queues at once, many requests each.
    for round in 0..8u8 {
        for queue in 0..2 {
            for slot in 0..10 {
                let at = u64::from(slot) * 4096;
                let offset = (1 << 18) * (queue as u64 + 1) + at;
                let data = GuestAddress(HIGH_DATA.0 + offset);
                client.write(queue, offset, data, 4096, round * 16 + slot);
            }
        }
        client.submit(0);
        client.submit(1);
        client.wait(0, 10);
        client.wait(1, 10);
    }
    drop(client);
    server.stop().unwrap();

    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[..8192].iter().all(|byte| *byte == 0x11));
    assert!(
        bytes[64 << 10..(64 << 10) + 8192]
            .iter()
            .all(|byte| *byte == 0x22)
    );
    for queue in 0..2usize {
        for slot in 0..10usize {
            let at = (1 << 18) * (queue + 1) + slot * 4096;
            assert_eq!(bytes[at], 7 * 16 + slot as u8);
        }
    }
}

#[test]
fn offers_what_it_does() {
    let mut config = config(3);
    config.device.read_only = true;
    let server = Running::new(Box::new(mock()), config);
    let mut frontend = connect(&server.path, features(3) | feature::RO);
    assert_eq!(frontend.get_queue_num().unwrap(), 3);
    assert!(frontend.get_max_mem_slots().unwrap() >= 8);
    let protocol = frontend.get_protocol_features().unwrap();
    for wanted in [
        Protocol::MQ,
        Protocol::REPLY_ACK,
        Protocol::CONFIG,
        Protocol::INFLIGHT_SHMFD,
        Protocol::BACKEND_REQ,
        Protocol::RESET_DEVICE,
        Protocol::CONFIGURE_MEM_SLOTS,
    ] {
        assert!(protocol.contains(wanted), "{wanted:?}");
    }
    assert!(!protocol.contains(Protocol::STATUS));
    // A front end may ask for more of the configuration space than there is.
    let none = VhostUserConfigFlags::empty();
    let (_, bytes) = frontend.get_config(0, 256, none, &[0; 256]).unwrap();
    assert_eq!(bytes[34], 3);
    assert!(bytes[96..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_cache_mode_can_be_set_and_nothing_else() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(1));
    let mut client = Client::new(&server.path, 1);
    let write = VhostUserConfigFlags::WRITABLE;
    client
        .frontend
        .set_config(WRITEBACK_OFFSET as u32, write, &[0])
        .unwrap();
    client.check(0, 0, 1);
    let durable = disk.log().iter().any(|logged| {
        matches!(
            logged,
            virtio_devices::testing::Logged::Write { fua: true, .. }
        ) || matches!(logged, virtio_devices::testing::Logged::Flush)
    });
    assert!(durable, "{:?}", disk.log());
    assert!(client.frontend.set_config(0, write, &[1; 8]).is_err());
    assert!(
        client
            .frontend
            .set_config(WRITEBACK_OFFSET as u32, write, &[1, 1])
            .is_err()
    );
    client
        .frontend
        .set_config(0, VhostUserConfigFlags::LIVE_MIGRATION, &[1; 8])
        .unwrap();
    assert_eq!(client.capacity(), (1 << 20) / 512);
}

#[test]
fn get_vring_base_drains() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(1));
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    disk.hold(true);
    for slot in 0..5 {
        client.write(0, slot * 4096, DATA, 4096, 7);
    }
    client.submit(0);
    eventually("requests reach the disk", || disk.held() == 5);
    let release = thread::spawn({
        let disk = disk.clone();
        move || {
            thread::sleep(Duration::from_millis(50));
            disk.hold(false);
            disk.release_all();
        }
    });
    let base = client.frontend.get_vring_base(0).unwrap();
    release.join().unwrap();
    assert_eq!(base, 2 + 5);
    // Everything has been given back, and what is added now waits.
    assert_eq!(client.wait(0, 5).len(), 5);
    client.write(0, 0, DATA, 4096, 9);
    client.submit(0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(client.rings[0].driver.in_flight(), 1);
    client.start_ring(0, base as u16);
    client.wait(0, 1);
    client.check(0, 8192, 3);
}

#[test]
fn a_disabled_ring_waits() {
    let server = Running::new(Box::new(mock()), config(2));
    let mut client = Client::new(&server.path, 2);
    client.check(0, 0, 1);
    client.frontend.set_vring_enable(0, false).unwrap();
    client.write(0, 0, DATA, 4096, 2);
    client.submit(0);
    client.check(1, 8192, 3);
    assert_eq!(client.rings[0].driver.in_flight(), 1);
    client.frontend.set_vring_enable(0, true).unwrap();
    client.wait(0, 1);
}

#[test]
fn memory_changes_under_running_queues() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(2));
    let mut client = Client::new(&server.path, 2);
    client.check(0, 0, 1);
    let regions = client.guest.regions();
    disk.hold(true);
    client.write(0, 0, HIGH_DATA, 4096, 5);
    client.write(1, 4096, HIGH_DATA, 4096, 5);
    client.submit(0);
    client.submit(1);
    eventually("requests reach the disk", || disk.held() == 2);
    let release = thread::spawn({
        let disk = disk.clone();
        move || {
            thread::sleep(Duration::from_millis(50));
            disk.hold(false);
            disk.release_all();
        }
    });
    // The table without the region that both requests use: it waits for them.
    client.frontend.set_mem_table(&regions[..1]).unwrap();
    assert_eq!(disk.held(), 0);
    release.join().unwrap();
    client.wait(0, 1);
    client.wait(1, 1);
    // Now that memory is gone, and a request that names it fails.
    client.read(0, 0, HIGH_DATA, 4096);
    client.submit(0);
    assert_ne!(client.wait(0, 1)[0].status, 0);
    client.frontend.add_mem_region(&regions[1]).unwrap();
    client.check(0, 0, 6);
    client.check(1, 4096, 7);
    client.frontend.remove_mem_region(&regions[1]).unwrap();
    assert!(client.frontend.remove_mem_region(&regions[1]).is_err());
    client.frontend.add_mem_region(&regions[1]).unwrap();
    client.check(1, 4096, 8);
}

#[test]
fn a_resize_reaches_the_front_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let server = VhostUserBlkServer::bind(&path, Box::new(mock()), config(1)).unwrap();
    let device = server.device().clone();
    let _server = Running::of(&path, server);
    let mut client = Client::new(&path, 1);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    client.frontend.set_backend_request_fd(&theirs).unwrap();
    client.check(0, 0, 1);

    device.resize(2 << 20).unwrap();
    let mut header = [0u8; 12];
    ours.read_exact(&mut header).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body, no reply wanted.
    assert_eq!(header[..4], 2u32.to_ne_bytes());
    assert_eq!(header[4..8], 1u32.to_ne_bytes());
    assert_eq!(header[8..], 0u32.to_ne_bytes());
    assert_eq!(client.capacity(), (2 << 20) / 512);
    client.check(0, (2 << 20) - 8192, 2);
    // A channel that nobody empties holds nobody up.
    for round in 0..2000 {
        device.resize((2 << 20) + (round % 2) * 512).unwrap();
    }
    client.check(0, 0, 3);
}

#[test]
fn reset_device_starts_afresh() {
    let server = Running::new(Box::new(mock()), config(1));
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    client.frontend.reset_device().unwrap();
    client.write(0, 0, DATA, 4096, 2);
    client.submit(0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(client.rings[0].driver.in_flight(), 1);
    client.rings[0].driver = common::driver(&client.guest, 0);
    client.frontend.set_features(features(1)).unwrap();
    client.start_ring(0, 0);
    client.check(0, 0, 3);
}

#[test]
fn a_broken_ring_stops_alone() {
    let server = Running::new(Box::new(mock()), config(2));
    let mut client = Client::new(&server.path, 2);
    client.check(0, 0, 1);
    client.rings[0].driver.post(9999);
    let _ = client.rings[0].driver.publish();
    client.rings[0].kick.write(1).unwrap();
    let err = &client.rings[0].err;
    eventually("the error descriptor", || err.read().is_ok());
    client.check(1, 0, 2);
    // A front end that resets the ring can go on.
    client.frontend.get_vring_base(0).unwrap();
    client.rings[0].driver = common::driver(&client.guest, 0);
    client.start_ring(0, 0);
    client.check(0, 0, 3);
}

#[test]
fn logs_dirty_pages() {
    let server = Running::new(Box::new(mock()), config(1));
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    let size = ((common::HIGH + common::REGION) / 4096).div_ceil(8);
    let log = common::memfd(size);
    let region = VhostUserDirtyLogRegion {
        mmap_size: size,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    // One that its owner could shrink is refused; that costs the connection, as the reply of this
    // message can carry no error.
    assert!(client.frontend.set_log_base(0, Some(region)).is_err());
    drop(client);
    // SAFETY: F_ADD_SEALS takes an int.
    let sealed = unsafe {
        libc::fcntl(
            log.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW,
        )
    };
    assert_eq!(sealed, 0);
    let mut client = Client::new(&server.path, 1);
    client.frontend.set_log_base(0, Some(region)).unwrap();
    client.check(0, 0, 2);
    let dirty = |page: u64| {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut byte, page / 8).unwrap();
        byte[0] & (1 << (page % 8)) != 0
    };
    let page = HIGH_DATA.0 / 4096;
    assert!(!dirty(page));
    // Logging begins with the feature bit, in the middle of the run.
    client.frontend.set_features(features(1) | 1 << 26).unwrap();
    client.check(0, 0, 3);
    assert!(dirty(page) && dirty(page + 1) && !dirty(page + 2));
    assert!(dirty(client.rings[0].driver.used_ring().0 / 4096));
    assert!(!dirty(DATA.0 / 4096), "the disk only read that page");
    client.frontend.set_features(features(1)).unwrap();
    client.read(0, 0, GuestAddress(HIGH_DATA.0 + (1 << 16)), 4096);
    client.finish(0);
    assert!(!dirty(page + 16));
}

#[test]
fn polls_when_asked_to() {
    let config = VhostUserBlkConfig {
        poll: Duration::from_millis(5),
        ..config(1)
    };
    let server = Running::new(Box::new(mock()), config);
    let mut client = Client::new(&server.path, 1);
    for round in 0..20 {
        client.check(0, 0, round);
        if round == 10 {
            thread::sleep(Duration::from_millis(20));
        }
    }
    let base = client.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 40);
}

#[test]
fn stops_in_order_and_leaves_no_socket() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(1));
    let path = server.path.clone();
    let mut client = Client::new(&path, 1);
    client.check(0, 0, 1);
    disk.hold(true);
    client.write(0, 0, DATA, 4096, 4);
    client.submit(0);
    eventually("the request reaches the disk", || disk.held() == 1);
    let release = thread::spawn({
        let disk = disk.clone();
        move || {
            thread::sleep(Duration::from_millis(50));
            disk.hold(false);
            disk.release_all();
        }
    });
    server.stop().unwrap();
    release.join().unwrap();
    assert!(!path.exists());
    client.wait(0, 1);
    assert_eq!(disk.contents()[..4096], [4; 4096]);
}

#[test]
fn a_stalled_front_end_does_not_keep_it_from_stopping() {
    let server = Running::new(Box::new(mock()), config(1));
    let mut half = UnixStream::connect(&server.path).unwrap();
    half.write_all(&[1, 0, 0]).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(server.is_alive());
    server.stop().unwrap();
}

#[test]
fn once_ends_with_the_first_front_end() {
    let config = VhostUserBlkConfig {
        once: true,
        ..config(1)
    };
    let mut server = Running::new(Box::new(mock()), config);
    // Somebody who only looks is no front end.
    drop(UnixStream::connect(&server.path).unwrap());
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    drop(client);
    server.join().unwrap();
}

#[test]
fn takes_a_listening_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let disk: Box<dyn AsyncDiskFile> = Box::new(mock());
    let server = VhostUserBlkServer::from_listener(listener, disk, config(1)).unwrap();
    let server = Running::of(&path, server);
    Client::new(&path, 1).check(0, 0, 1);
    server.stop().unwrap();
    assert!(path.exists(), "the socket file is not ours");
}

#[test]
fn a_wrong_configuration_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let config = VhostUserBlkConfig {
        device: VirtioBlkConfig {
            num_queues: 0,
            ..VirtioBlkConfig::default()
        },
        ..VhostUserBlkConfig::default()
    };
    assert!(VhostUserBlkServer::bind(&path, Box::new(mock()), config).is_err());
    assert!(!path.exists());
}

#[test]
fn guest_memory_of_the_tests_is_what_they_think() {
    let guest = common::Guest::new();
    let regions = guest.regions();
    assert_eq!(regions.len(), guest.memory.num_regions());
    for (region, info) in guest.memory.iter().zip(&regions) {
        assert_eq!(region.start_addr().0, info.guest_phys_addr);
    }
    guest.memory.write_obj(7u32, HIGH_DATA).unwrap();
    assert_eq!(guest.bytes(HIGH_DATA, 4), 7u32.to_ne_bytes());
}
