//! Front ends and servers that go away in the middle, and come back.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command},
    thread,
    time::Duration,
};

use block::{AsyncDiskFile, Format, OpenOptions};
use common::{Client, DATA, QUEUE_SIZE, Running, config, eventually};
use vhost::VhostBackend;
use virtio_devices::testing::{Logged, MockDisk, MockDiskConfig};
use vm_memory::GuestAddress;
use vmm_glue::vhost_user::{StopSignals, VhostUserBlkServer};

fn mock() -> MockDisk {
    MockDisk::new(MockDiskConfig::default())
}

fn at(slot: u64) -> GuestAddress {
    GuestAddress(DATA.0 + slot * 4096)
}

#[test]
fn a_front_end_that_vanishes_costs_nothing() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(2));
    for round in 0..3u8 {
        let mut client = Client::new(&server.path, 2);
        client.check(0, 0, round);
        disk.hold(true);
        for slot in 0..8 {
            client.write(
                usize::from(slot % 2 == 0),
                slot * 4096,
                at(slot),
                4096,
                0x40 + round,
            );
        }
        client.submit(0);
        client.submit(1);
        eventually("requests reach the disk", || disk.held() == 8);
        // The front end goes, its memory stays with the server for as long as the disk needs it.
        drop(client);
        let release = thread::spawn({
            let disk = disk.clone();
            move || {
                thread::sleep(Duration::from_millis(30));
                disk.hold(false);
                disk.release_all();
            }
        });
        release.join().unwrap();
        let mut client = Client::new(&server.path, 2);
        client.check(1, 64 << 10, round);
        assert_eq!(disk.contents()[..8 * 4096], [0x40 + round; 8 * 4096]);
    }
}

#[test]
fn a_guest_survives_the_reconnect_of_its_front_end() {
    let disk = mock();
    let server = Running::new(Box::new(disk.clone()), config(2));
    let mut client = Client::new(&server.path, 2);
    client.check(0, 0, 1);
    client.check(1, 0, 2);
    for round in 0..20u8 {
        // Requests in flight when the connection goes; the guest does not notice.
        for slot in 0..8 {
            client.write(
                usize::from(slot % 2 == 0),
                slot * 4096,
                at(slot),
                4096,
                round,
            );
        }
        client.submit(0);
        client.submit(1);
        let (guest, rings, inflight) = client.into_guest();
        client = Client::attach(&server.path, guest, rings, inflight);
        for queue in 0..2 {
            assert!(client.wait(queue, 4).iter().all(|used| used.status == 0));
        }
        assert_eq!(disk.contents()[..8 * 4096], [round; 8 * 4096]);
    }
}

/// The name of the test that is the server process of others, and what it is told.
const CHILD: &str = "the_server_process";
const SOCKET: &str = "PLATTER_TEST_SOCKET";
const IMAGE: &str = "PLATTER_TEST_IMAGE";

/// Not a test of its own: serves the image in `IMAGE`, or, without, a disk that never finishes
/// anything.
#[test]
fn the_server_process() {
    let Ok(socket) = std::env::var(SOCKET) else {
        return;
    };
    let signals = StopSignals::block().unwrap();
    let disk: Box<dyn AsyncDiskFile> = match std::env::var(IMAGE) {
        Ok(image) => OpenOptions::new()
            .format(Format::Raw)
            .lock_wait(common::PATIENCE)
            .open(image)
            .unwrap(),
        Err(_) => {
            let disk = mock();
            disk.hold(true);
            Box::new(disk)
        }
    };
    let mut server = VhostUserBlkServer::bind(socket, disk, config(1)).unwrap();
    server.stop_on(signals).unwrap();
    server.run().unwrap();
}

fn child(socket: &Path, image: Option<&Path>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", CHILD, "--test-threads", "1"])
        .env(SOCKET, socket);
    match image {
        Some(image) => command.env(IMAGE, image),
        None => command.env_remove(IMAGE),
    };
    command.stdout(std::process::Stdio::null());
    // The harness of the child has a thread of its own before our code runs there, so the signals
    // are blocked before that.
    // SAFETY: blocking signals is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| StopSignals::block().map(std::mem::forget));
    }
    let mut child = command.spawn().unwrap();
    eventually("the server listens", || {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the server process ended"
        );
        std::os::unix::net::UnixStream::connect(socket).is_ok()
    });
    child
}

/// Kills the process at once, and waits for it.
fn kill(mut child: Child) {
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn requests_of_a_killed_server_are_done_again_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let process = child(&socket, None);
    let mut client = Client::new(&socket, 1);
    // All to the same place: the last one must win, so the order counts.
    for slot in 0..10u8 {
        client.write(0, 0, at(u64::from(slot)), 4096, slot);
    }
    client.submit(0);
    let used_before = client.rings[0].driver.in_flight();
    assert_eq!(used_before, 10);
    thread::sleep(Duration::from_millis(100));
    kill(process);

    let disk = mock();
    let server = Running::at(&socket, Box::new(disk.clone()), config(1));
    let (guest, rings, inflight) = client.into_guest();
    let mut client = Client::attach(&server.path, guest, rings, inflight);
    assert!(client.wait(0, 10).iter().all(|used| used.status == 0));
    let writes = disk
        .log()
        .iter()
        .filter(|op| matches!(op, Logged::Write { .. }))
        .count();
    assert_eq!(writes, 10);
    assert_eq!(disk.contents()[..4096], [9; 4096]);
    // And the ring goes on as if nothing had been.
    for round in 0..u64::from(QUEUE_SIZE) {
        client.check(0, 8192, round as u8);
    }
    let base = client.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 10 + 2 * u32::from(QUEUE_SIZE));
}

#[test]
fn a_server_killed_over_and_over_loses_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let image = dir.path().join("disk.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut process = child(&socket, Some(&image));
    let mut client = Client::new(&socket, 1);
    let mut round = 0u8;
    for kills in 0..6u64 {
        // A stream of requests, with the kill somewhere in it: at another point each time.
        let begin = std::time::Instant::now();
        let until = Duration::from_millis(3 + 7 * kills);
        while begin.elapsed() < until {
            round = round.wrapping_add(1);
            for slot in 0..8 {
                client.write(0, slot * 4096, at(slot), 4096, round);
            }
            client.submit(0);
            if begin.elapsed() < until {
                assert!(client.wait(0, 8).iter().all(|used| used.status == 0));
            }
        }
        let pending = client.rings[0].driver.in_flight();
        kill(process);
        process = child(&socket, Some(&image));
        let (guest, rings, inflight) = client.into_guest();
        client = Client::attach(&socket, guest, rings, inflight);
        assert!(client.wait(0, pending).iter().all(|used| used.status == 0));
        for slot in 0..8 {
            client.read(0, slot * 4096, at(slot + 8), 4096);
        }
        client.finish(0);
        assert_eq!(client.guest.bytes(at(8), 8 * 4096), vec![round; 8 * 4096]);
    }
    // SIGTERM is an orderly end.
    client.rings[0].driver.flush().unwrap();
    client.finish(0);
    // SAFETY: the process is our own child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(process.id() as i32, libc::SIGTERM) }, 0);
    let status = process.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
    assert_eq!(
        std::fs::read(&image).unwrap()[..8 * 4096],
        [round; 8 * 4096]
    );
}
