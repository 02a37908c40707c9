//! An NVMe controller behind the server: enabled, identified, used and reset over the socket.

use std::{
    io::{ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use virtio_devices::testing::{MockDisk, MockDiskConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    client::{BASE, Client},
    image,
    nvme_driver::Nvme,
    server::{nvme, nvme_over},
};

#[test]
fn a_client_uses_the_controller_and_the_next_one_finds_it_fresh() {
    let server = nvme();
    for round in 1..=2_u8 {
        let mut client = server.client();
        let info = client.words(4, &[16, 0, 0, 0], &[]).unwrap();
        assert_eq!(info[8..16], [9, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(client.read(7, 8) >> 8, 0x01_0802);
        let region = client.words(5, &[32, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
        assert_eq!(region[16..24], 0x4000_u64.to_ne_bytes());
        client.map();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let fds = [event.as_raw_fd()];
        client
            .words(8, &[20, 1 << 2 | 1 << 5, 2, 1, 1], &fds)
            .unwrap();
        assert_eq!(client.read(0, 0x1c), 0);
        client.set_up();
        client.memory.write_all_at(&[round; 512], 0x8000).unwrap();
        assert_eq!(client.transfer(0, 1), 0);
        assert_eq!(server.disk.contents()[3 * 512..4 * 512], [round; 512]);
        client.memory.write_all_at(&[0; 512], 0x8000).unwrap();
        assert_eq!(client.transfer(1, 2), 0);
        let mut data = [0; 512];
        client.memory.read_exact_at(&mut data, 0x8000).unwrap();
        assert_eq!(data, [round; 512]);
        assert!(event.read().unwrap() > 0);
        // A reset is answered when it is over.
        client.call(13, &[], &[]).unwrap();
        assert_eq!(client.read(0, 0x1c), 0);
        client.unmap().unwrap();
    }
}

#[test]
fn an_unmap_waits_for_what_is_in_flight() {
    let server = nvme();
    let mut client = server.driver();
    server.disk.hold(true);
    let at = BASE + 0x8000;
    let mut entry = [0; 64];
    entry[..4].copy_from_slice(&(2_u32 | 9 << 16).to_le_bytes());
    entry[4] = 1;
    entry[24..32].copy_from_slice(&at.to_le_bytes());
    client.memory.write_all_at(&entry, 0x2000).unwrap();
    client.write(0x1008, 1);
    client.until("the read", |_| server.disk.held() == 1);
    let disk = server.disk.clone();
    let release = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        disk.hold(false);
        disk.release_all();
    });
    let started = Instant::now();
    client.unmap().unwrap();
    assert!(started.elapsed() >= Duration::from_millis(150));
    release.join().unwrap();
}

#[test]
fn a_client_that_breaks_the_rules_costs_its_connection_alone() {
    let server = nvme();
    // No version first; a header that lies; a message that ends in the middle.
    for bytes in [
        [1, 0, 13, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].as_slice(),
        &[1, 0, 1, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 1],
    ] {
        let mut socket = UnixStream::connect(server.path()).unwrap();
        socket.write_all(bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    }
    let mut client = server.client();
    // Every command with bodies of every small size gets an answer.
    for command in 2..20 {
        for len in [0, 4, 8, 15, 16, 20, 24, 32, 40] {
            let _ = client.call(command, &vec![0xff; len], &[]);
            let _ = client.call(command, &vec![0; len], &[]);
        }
    }
    assert_eq!(client.call(9, &Client::access(0x3ffe, 0, 4), &[]), Err(22));
    assert_eq!(client.call(9, &Client::access(0, 0, 2 << 20), &[]), Err(7));
    client.map();
    client.enable();
}

#[test]
fn a_memfd_that_shrinks_costs_the_connection_alone() {
    let server = nvme();
    for shrunk in [0, 0x2000] {
        let mut client = server.driver();
        // The submission queue of the I/O queue pair is at 2000h: nothing is there any more.
        client.memory.set_len(shrunk).unwrap();
        client.write(0x1008, 1);
        let mut rest = Vec::new();
        let end = client.socket.read_to_end(&mut rest);
        assert!(end.is_ok() || end.is_err_and(|it| it.kind() == ErrorKind::ConnectionReset));
    }
    let mut client = server.driver();
    assert_eq!(client.transfer(0, 1), 0);
}

#[test]
fn memory_without_a_descriptor_is_reached_by_messages() {
    let server = nvme();
    let mut client = server.client();
    client.map_by_messages();
    assert_eq!(client.map_range(3, BASE + 4096, 4096, &[]), Err(17));
    client.set_up();
    for round in 1..=3_u8 {
        let index = u64::from(round - 1) * 2;
        client.memory.write_all_at(&[round; 512], 0x8000).unwrap();
        assert_eq!(client.transfer(index, 1), 0);
        assert_eq!(server.disk.contents()[3 * 512..4 * 512], [round; 512]);
        // What is around the data stays as the client has it.
        client.memory.write_all_at(&[99; 1024], 0x7f00).unwrap();
        assert_eq!(client.transfer(index + 1, 2), 0);
        let mut data = [0; 1024];
        client.memory.read_exact_at(&mut data, 0x7f00).unwrap();
        let mut expected = [99; 1024];
        expected[0x100..0x300].fill(round);
        assert_eq!(data, expected);
    }
    let accesses = client.accesses;
    assert!(accesses[0] >= 8 && accesses[1] >= 8, "{accesses:?}");
    // In pieces of what the client takes at once: Identify has 4096 bytes.
    assert_eq!(client.identify(2), 0);
    assert!(client.accesses[1] >= accesses[1] + 5);
    client.unmap().unwrap();
    let accesses = client.accesses;
    client.write(0x1008, 7);
    client.until("a fatal status", |it| it.read(0, 0x1c) & 2 != 0);
    assert_eq!(client.accesses, accesses);
}

#[test]
fn memory_with_and_without_descriptors_beside_each_other() {
    let server = nvme();
    // The queues are mapped, the data is not; then it may only be read, then only be written.
    let mut client = server.driver_mixed();
    client.memory.write_all_at(&[7; 512], 0x8000).unwrap();
    assert_eq!(client.transfer(0, 1), 0);
    assert_eq!(client.accesses, [1, 0]);
    assert_eq!(client.transfer(1, 2), 0);
    assert_eq!(client.accesses, [1, 1]);
    for (index, flags, statuses) in [(2, 1, [0, 4]), (4, 2, [4, 0]), (6, 0, [4, 4])] {
        client.unmap_range(BASE + 0x8000, 0x1000).unwrap();
        client.map_range(flags, BASE + 0x8000, 0x1000, &[]).unwrap();
        for (ahead, status) in (0..).zip(statuses) {
            let got = client.transfer(index + ahead, 1 + ahead as u32) & 0xff;
            assert_eq!(got, status, "flags {flags}, opcode {}", 1 + ahead);
        }
    }
    assert_eq!(client.map_range(4, BASE + 0x9000, 0x1000, &[]), Err(22));
}

#[test]
fn a_read_that_the_client_refuses_is_an_error_of_that_command() {
    let server = nvme();
    let mut client = server.driver_mixed();
    client.refused_below = u64::MAX;
    assert_eq!(client.transfer(0, 1) & 0xff, 4);
    client.refused_below = 0;
    assert_eq!(client.transfer(1, 1), 0);
    // A write that it refuses was promised to be possible: that ends the connection.
    client.refused_below = u64::MAX;
    client.post(1, 2, &Client::io(2));
    client.write(0x1008, 3);
    let started = Instant::now();
    while !client.is_gone() {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    let mut client = server.client();
    client.map();
    client.enable();
}

#[test]
fn a_client_that_waits_for_us_and_does_not_answer_is_answered() {
    let server = nvme();
    let mut client = server.driver_by_messages();
    client.deaf = true;
    client.post(1, 0, &Client::io(1));
    client.write(0x1008, 1);
    let started = Instant::now();
    while !client.has_message() {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    // The worker waits for the entry, the reset for the worker, the client for the reset.
    client.call(13, &[], &[]).unwrap();
    client.deaf = false;
    assert_eq!(client.read(0, 0x1c), 0);
    // And one that goes away in the middle.
    client.set_up();
    client.post(1, 0, &Client::io(1));
    client.write(0x1008, 1);
    while !client.has_message() {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    drop(client);
    let mut client = server.driver();
    assert_eq!(client.transfer(0, 1), 0);
}

#[test]
fn a_reset_and_an_unmap_are_answered_after_every_operation() {
    let server = nvme();
    for (round, opcode) in [(0, 1), (1, 2)] {
        for command in [13, 3] {
            let mut client = server.driver();
            server.disk.hold(true);
            for index in 0..4 {
                client.post(1, index, &Client::io(opcode));
            }
            client.write(0x1008, 4);
            client.until("the operations", |_| server.disk.held() == 4);
            let released = Arc::new(AtomicBool::new(false));
            let (disk, last) = (server.disk.clone(), Arc::clone(&released));
            let release = thread::spawn(move || {
                // What answers too early has the time to do so.
                thread::sleep(Duration::from_millis(100));
                for _ in 0..3 {
                    assert!(disk.release(0));
                }
                thread::sleep(Duration::from_millis(100));
                last.store(true, Ordering::SeqCst);
                disk.hold(false);
                disk.release_all();
            });
            if command == 13 {
                client.call(13, &[], &[]).unwrap();
            } else {
                client.unmap().unwrap();
            }
            assert!(released.load(Ordering::SeqCst), "{round} {command}");
            release.join().unwrap();
            assert_eq!(server.disk.held(), 0);
        }
    }
}

#[test]
fn an_image_that_somebody_else_truncates_gives_errors_and_the_server_lives() {
    let (file, image) = image::raw(1 << 20);
    let server = nvme_over(MockDisk::new(MockDiskConfig::default()), image);
    let mut client = server.driver();
    assert_eq!(client.transfer(0, 2), 0);
    // Block 3 is gone, then the whole file.
    file.set_len(1024).unwrap();
    assert_ne!(client.transfer(1, 2), 0);
    file.set_len(0).unwrap();
    assert_ne!(client.transfer(2, 2), 0);
    file.set_len(1 << 20).unwrap();
    client.memory.write_all_at(&[9; 512], 0x8000).unwrap();
    assert_eq!(client.transfer(3, 2), 0);
    let mut data = [9; 512];
    client.memory.read_exact_at(&mut data, 0x8000).unwrap();
    assert_eq!(data, [0; 512]);
}
