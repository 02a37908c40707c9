//! Front ends that break the rules: an error for them, and a server that goes on.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use common::{
    Client, HIGH, PATIENCE, QUEUE_SIZE, REGION, Running, USER, config, connect, features,
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{FrontendReq as Req, VhostUserConfigFlags, VhostUserInflight},
    },
};
use virtio_devices::testing::{MockDisk, MockDiskConfig};
use vmm_sys_util::{
    eventfd::{EFD_NONBLOCK, EventFd},
    sock_ctrl_msg::ScmSocket,
};

fn server(queues: u16) -> Running {
    Running::new(
        Box::new(MockDisk::new(MockDiskConfig::default())),
        config(queues),
    )
}

/// A message as bytes; `flags` as they are.
fn message(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Sends bytes and descriptors; the server must close the connection, and nothing else.
fn is_refused(server: &Running, bytes: &[u8], fds: &[RawFd]) {
    let mut socket = UnixStream::connect(&server.path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_with_fds(&[bytes], fds).unwrap();
    let mut rest = Vec::new();
    match socket.read_to_end(&mut rest) {
        Ok(_) => assert!(rest.is_empty(), "answered {rest:?} to {bytes:?}"),
        // Closed with something unread.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    assert!(server.is_alive());
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn malformed_messages_cost_the_connection() {
    let server = server(2);
    let ok = 1;
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let fd = fd.as_raw_fd();
    // Versions, replies, unknown requests, sizes.
    is_refused(&server, &message(1, 0, 0, &[]), &[]);
    is_refused(&server, &message(1, 2, 0, &[]), &[]);
    is_refused(&server, &message(1, ok | 4, 0, &[]), &[]);
    is_refused(&server, &message(0, ok, 0, &[]), &[]);
    is_refused(&server, &message(0x1_0000, ok, 0, &[]), &[]);
    is_refused(&server, &message(1, ok, u32::MAX, &[]), &[]);
    is_refused(&server, &message(2, ok, 4, &[0; 4]), &[]);
    is_refused(&server, &message(2, ok, 16, &[0; 16]), &[]);
    // Features that were not offered.
    for request in [
        Req::IOTLB_MSG,
        Req::VRING_KICK,
        Req::SET_STATUS,
        Req::POSTCOPY_ADVISE,
    ] {
        is_refused(&server, &message(request as u32, ok, 0, &[]), &[]);
    }
    is_refused(
        &server,
        &message(Req::SET_FEATURES as u32, ok, 8, &words(&[u64::MAX])),
        &[],
    );
    let bits = words(&[1 << 63]);
    is_refused(
        &server,
        &message(Req::SET_PROTOCOL_FEATURES as u32, ok, 8, &bits),
        &[],
    );
    // Memory tables: no head, counts that lie, descriptors missing or too many.
    let table = Req::SET_MEM_TABLE as u32;
    is_refused(&server, &message(table, ok, 0, &[]), &[]);
    is_refused(&server, &message(table, ok, 8, &words(&[1])), &[]);
    is_refused(
        &server,
        &message(table, ok, 8, &words(&[u64::from(u32::MAX)])),
        &[fd],
    );
    let region = words(&[1, 0, 4096, USER, 0]);
    is_refused(&server, &message(table, ok, 40, &region), &[]);
    is_refused(&server, &message(table, ok, 40, &region), &[fd, fd]);
    is_refused(&server, &message(table, ok, 40, &region), &[fd]);
    is_refused(&server, &message(table, ok, 40, &region), &[fd; 33]);
    // Rings that are not there, and descriptors that should be.
    for request in [
        Req::SET_VRING_NUM,
        Req::SET_VRING_BASE,
        Req::GET_VRING_BASE,
        Req::SET_VRING_ENABLE,
    ] {
        for index in [2u64, 255, u64::from(u32::MAX)] {
            let body = words(&[index | 1 << 32]);
            is_refused(&server, &message(request as u32, ok, 8, &body), &[]);
        }
    }
    for request in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        is_refused(
            &server,
            &message(request as u32, ok, 8, &words(&[2])),
            &[fd],
        );
        is_refused(&server, &message(request as u32, ok, 8, &words(&[0])), &[]);
        is_refused(
            &server,
            &message(request as u32, ok, 8, &words(&[0])),
            &[fd, fd],
        );
    }
    is_refused(
        &server,
        &message(Req::SET_VRING_KICK as u32, ok, 8, &words(&[0x100])),
        &[],
    );
    is_refused(
        &server,
        &message(Req::SET_VRING_ADDR as u32, ok, 40, &words(&[9, 0, 0, 0, 0])),
        &[],
    );
    is_refused(
        &server,
        &message(Req::SET_CONFIG as u32, ok, 4, &[0; 4]),
        &[],
    );
    is_refused(
        &server,
        &message(Req::SET_CONFIG as u32, ok, 12, &[0xff; 12]),
        &[],
    );
    is_refused(
        &server,
        &message(Req::SET_INFLIGHT_FD as u32, ok, 24, &[0; 24]),
        &[fd],
    );
    is_refused(
        &server,
        &message(Req::SET_LOG_BASE as u32, ok, 16, &words(&[4096, 0])),
        &[fd],
    );
    is_refused(
        &server,
        &message(Req::SET_BACKEND_REQ_FD as u32, ok, 0, &[]),
        &[],
    );
    is_refused(
        &server,
        &message(Req::ADD_MEM_REG as u32, ok, 40, &words(&[0, 0, 4096, 0, 0])),
        &[],
    );

    // A peer that leaves in the middle of a message.
    let mut half = UnixStream::connect(&server.path).unwrap();
    half.write_all(&message(2, ok, 8, &[0; 3])).unwrap();
    drop(half);

    Client::new(&server.path, 2).check(1, 0, 1);
}

/// A front end that has negotiated everything and set nothing up.
fn fresh(path: &Path) -> Frontend {
    connect(path, features(1))
}

#[test]
fn bad_memory_is_refused_and_the_connection_lives() {
    let server = server(1);
    let mut frontend = fresh(&server.path);
    let guest = common::Guest::new();
    let good = guest.regions();
    let file = tempfile::tempfile().unwrap();
    let empty = common::memfd(0);
    let folder = std::fs::File::open("/").unwrap();
    let event = EventFd::new(0).unwrap();
    let region =
        |guest: u64, size: u64, user: u64, offset: u64, fd: RawFd| VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: user,
            mmap_offset: offset,
            mmap_handle: fd,
        };
    let fd = guest.file.as_raw_fd();
    let bad = [
        // Beyond the file.
        region(0, REGION, USER, REGION + 4096, fd),
        region(0, 2 * REGION + 1, USER, 0, fd),
        region(0, 4096, USER, u64::MAX - 4096, fd),
        region(0, 4096, USER, i64::MAX as u64 & !4095, fd),
        // Overflows.
        region(u64::MAX - 4095, 4097, USER, 0, fd),
        region(0, 4097, u64::MAX - 4095, 0, fd),
        region(0, u64::MAX, 0, 0, fd),
        // Not memory.
        region(0, 4096, USER, 0, file.as_raw_fd()),
        region(0, 4096, USER, 0, empty.as_raw_fd()),
        region(0, 4096, USER, 0, folder.as_raw_fd()),
        region(0, 4096, USER, 0, event.as_raw_fd()),
    ];
    for region in &bad {
        assert!(
            frontend.set_mem_table(&[*region]).is_err(),
            "{:#x}",
            region.mmap_offset
        );
        assert!(frontend.add_mem_region(region).is_err());
    }
    // Overlaps, in guest and in user addresses.
    for (guest, user) in [(REGION - 4096, USER << 4), (1 << 40, USER + 4096)] {
        let second = region(guest, REGION, user, REGION, fd);
        assert!(frontend.set_mem_table(&[good[0], second]).is_err());
        frontend.set_mem_table(&good[..1]).unwrap();
        assert!(frontend.add_mem_region(&second).is_err());
    }
    // The table that was good before still is.
    drop(frontend);
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    assert!(client.frontend.set_mem_table(&[bad[0]]).is_err());
    client.check(0, 0, 2);
}

#[test]
fn regions_need_no_alignment() {
    let server = server(1);
    let guest = common::Guest::new();
    let frontend = fresh(&server.path);
    let mut regions = guest.regions();
    // As QEMU cuts memory in front of 640 KiB, in the middle of a huge page.
    regions[0].memory_size = 0xa0200;
    regions[1].mmap_offset = REGION + 0xc0200;
    regions[1].memory_size = 0x1000;
    frontend.set_mem_table(&regions).unwrap();
}

#[test]
fn bad_rings_are_refused() {
    let server = server(1);
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    let good = client.addresses(0);
    // A running ring stays as it is.
    let moved = VringConfigData {
        used_ring_addr: USER + 64,
        ..good
    };
    assert!(client.frontend.set_vring_addr(0, &moved).is_err());
    assert!(client.frontend.set_vring_num(0, QUEUE_SIZE / 2).is_err());
    assert!(client.frontend.set_vring_base(0, 0).is_err());
    client.frontend.set_vring_addr(0, &good).unwrap();
    assert!(
        client
            .frontend
            .set_features(features(1) & !(1 << 29))
            .is_err()
    );
    client.check(0, 0, 2);

    for size in [0, 3, 512, 32768, 65535] {
        assert!(client.frontend.set_vring_num(0, size).is_err(), "{size}");
    }
    let base = client.frontend.get_vring_base(0).unwrap() as u16;
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    for (desc, avail, used) in [
        // Outside memory, across the end of a region, guest instead of user addresses, unaligned.
        (0, good.avail_ring_addr, good.used_ring_addr),
        (
            USER + REGION - 16,
            good.avail_ring_addr,
            good.used_ring_addr,
        ),
        (good.desc_table_addr, u64::MAX - 1, good.used_ring_addr),
        (good.desc_table_addr, good.avail_ring_addr, USER + REGION),
        (good.desc_table_addr, good.avail_ring_addr, HIGH),
        (
            good.desc_table_addr + 8,
            good.avail_ring_addr,
            good.used_ring_addr,
        ),
        (
            good.desc_table_addr,
            good.avail_ring_addr + 1,
            good.used_ring_addr,
        ),
        (
            good.desc_table_addr,
            good.avail_ring_addr,
            good.used_ring_addr + 2,
        ),
    ] {
        let bad = VringConfigData {
            desc_table_addr: desc,
            avail_ring_addr: avail,
            used_ring_addr: used,
            ..good
        };
        client.frontend.set_vring_addr(0, &bad).unwrap();
        assert!(
            client.frontend.set_vring_kick(0, &kick).is_err(),
            "{desc:#x} {avail:#x} {used:#x}"
        );
    }
    client.start_ring(0, base);
    client.check(0, 0, 3);
}

#[test]
fn bad_configuration_and_inflight_requests_are_refused() {
    let server = server(1);
    let mut frontend = fresh(&server.path);
    for (offset, size) in [
        (256u32, 1u32),
        (200, 57),
        (0, 257),
        (4000, 8),
        (32, 2),
        (33, 1),
    ] {
        let buf = vec![0; size as usize];
        let none = VhostUserConfigFlags::empty();
        assert!(
            frontend.set_config(offset, none, &buf).is_err(),
            "{offset} {size}"
        );
    }
    let asked = VhostUserInflight::new(0, 0, 1, QUEUE_SIZE);
    let (inflight, file) = frontend.get_inflight_fd(&asked).unwrap();
    let bad = [
        VhostUserInflight::new(inflight.mmap_size, 4096, 1, QUEUE_SIZE),
        VhostUserInflight::new(inflight.mmap_size, 0, 2, QUEUE_SIZE),
        VhostUserInflight::new(inflight.mmap_size, 0, 1, 4096),
        VhostUserInflight::new(64, 0, 1, QUEUE_SIZE),
        VhostUserInflight::new(u64::MAX, u64::MAX - 7, u16::MAX, 256),
    ];
    for inflight in &bad {
        assert!(
            frontend
                .set_inflight_fd(inflight, file.as_raw_fd())
                .is_err()
        );
    }
    let unsealed = common::memfd(1 << 20);
    assert!(
        frontend
            .set_inflight_fd(&inflight, unsealed.as_raw_fd())
            .is_err()
    );
    frontend
        .set_inflight_fd(&inflight, file.as_raw_fd())
        .unwrap();
    drop(frontend);
    // This one has no reply that could carry an error.
    for (queues, size) in [(2, QUEUE_SIZE), (1, 1024)] {
        let mut frontend = fresh(&server.path);
        let asked = VhostUserInflight::new(0, 0, queues, size);
        assert!(frontend.get_inflight_fd(&asked).is_err());
    }
    Client::new(&server.path, 1).check(0, 0, 1);
}

#[test]
fn reading_beyond_the_configuration_space_gives_an_empty_reply() {
    let server = server(1);
    // The front end of the `vhost` crate waits for a payload that an error does not have.
    let mut socket = UnixStream::connect(&server.path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for (offset, size) in [
        (256u32, 1u32),
        (200, 57),
        (0, 257),
        (u32::MAX, 1),
        (1, u32::MAX),
        (0, 8),
    ] {
        let mut body: Vec<u8> = [offset, size, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        body.resize(12 + (size as usize).min(300), 0);
        let bytes = message(Req::GET_CONFIG as u32, 1, body.len() as u32, &body);
        socket.write_all(&bytes).unwrap();
        let good = offset == 0 && size == 8;
        let mut reply = vec![0; if good { 32 } else { 24 }];
        socket.read_exact(&mut reply).unwrap();
        let word = |at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 1 | 4);
        assert_eq!(word(8), if good { 20 } else { 12 });
        assert_eq!(word(16), if good { 8 } else { 0 });
    }
}

#[test]
fn blocking_descriptors_do_not_block() {
    let server = server(1);
    let mut client = Client::new(&server.path, 1);
    let base = client.frontend.get_vring_base(0).unwrap() as u16;
    // A doorbell that nobody has rung and an interrupt whose counter is full.
    client.rings[0].kick = EventFd::new(0).unwrap();
    client.rings[0].call = EventFd::new(0).unwrap();
    client.rings[0].call.write(u64::MAX - 1).unwrap();
    client.start_ring(0, base);
    for round in 0..10 {
        client.check(0, 0, round);
    }
    client.frontend.get_vring_base(0).unwrap();
}

#[test]
fn a_forged_inflight_area_is_refused_or_harmless() {
    let server = server(1);
    let client = Client::new(&server.path, 1);
    let (guest, rings, inflight) = client.into_guest();
    let (inflight, file) = inflight.unwrap();
    let at = |offset: u64, bytes: &[u8]| {
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset).unwrap();
    };
    // All heads in flight although nothing was ever posted: their chains are the driver's idle
    // ones, and are done or refused like any other.
    for head in 0..u64::from(QUEUE_SIZE) {
        at(16 + 16 * head, &[1]);
    }
    let mut frontend = connect(&server.path, features(1));
    frontend.set_mem_table(&guest.regions()).unwrap();
    frontend
        .set_inflight_fd(&inflight, file.as_raw_fd())
        .unwrap();
    let addresses = common::addresses(&rings[0].driver);
    frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
    frontend.set_vring_addr(0, &addresses).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    let _ = frontend.set_vring_kick(0, &rings[0].kick);
    // A layout from somewhere else.
    let _ = frontend.get_vring_base(0);
    at(8, &7u16.to_ne_bytes());
    assert!(frontend.set_vring_kick(0, &rings[0].kick).is_err());
    drop(frontend);
    Client::new(&server.path, 1).check(0, 0, 1);
}

#[test]
fn guest_memory_that_shrinks_costs_the_connection_alone() {
    let server = server(1);
    let mut client = Client::new(&server.path, 1);
    client.check(0, 0, 1);
    let file = client.guest.file.try_clone().unwrap();
    file.set_len(0).unwrap();
    client.rings[0].kick.write(1).unwrap();
    // Whatever it asks now, the connection is shut down.
    common::eventually("the end of the connection", || {
        client.frontend.get_features().is_err()
    });
    assert!(server.is_alive());
    let mut next = Client::new(&server.path, 1);
    next.check(0, 0, 2);
}

#[test]
fn an_image_that_somebody_else_truncates_gives_errors_and_the_server_lives() {
    let (file, disk) = common::image::raw(1 << 20);
    let server = Running::new(disk, config(1));
    let mut client = Client::new(&server.path, 1);
    client.check(0, 64 << 10, 1);
    let status = |client: &mut Client| {
        client.read(0, 64 << 10, common::DATA, 4096);
        client.submit(0);
        client.wait(0, 1)[0].status
    };
    for left in [4096, 0] {
        file.set_len(left).unwrap();
        assert_ne!(status(&mut client), 0, "{left}");
    }
    assert!(server.is_alive());
    file.set_len(1 << 20).unwrap();
    assert_eq!(status(&mut client), 0);
    client.check(0, 0, 2);
}
