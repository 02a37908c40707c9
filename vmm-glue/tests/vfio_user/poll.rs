//! Doorbells that the client maps: they are written, and nobody is told.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use virtio_devices::testing::{MockDisk, MockDiskConfig};
use vmm_glue::vfio_user::{NvmeFunction, NvmeFunctionConfig};

use crate::{
    client::{BASE, Client},
    nvme_driver::Nvme,
    server::{Server, ahci, nvme, nvme_with},
};

fn polling() -> Server<NvmeFunction> {
    let disk = MockDisk::new(MockDiskConfig::default());
    let config = NvmeFunctionConfig {
        poll: true,
        ..NvmeFunctionConfig::default()
    };
    nvme_with(disk.clone(), Box::new(disk), &config)
}

/// A page that is mapped, for as long as the test runs.
struct Doorbells(*mut u8);

impl Doorbells {
    /// Maps what the region information says.
    fn of(client: &mut Client) -> Self {
        let short = client.words(5, &[32, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
        let word = |at: usize| u32::from_ne_bytes(short[at..at + 4].try_into().unwrap());
        assert_eq!((short.len(), word(0), word(4), word(12)), (32, 64, 15, 0));
        assert!(client.received.is_none());
        let info = client.words(5, &[64, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
        let file: File = client.received.take().unwrap();
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().unwrap());
        let quad = |at: usize| u64::from_ne_bytes(info[at..at + 8].try_into().unwrap());
        assert_eq!((info.len(), word(0), word(4), word(12)), (64, 64, 15, 32));
        // Sparse areas, version 1, no other capability; one area: the second page.
        assert_eq!((word(32), word(36), word(40)), (1 | 1 << 16, 0, 1));
        assert_eq!((quad(48), quad(56)), (0x1000, 0x1000));
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                0x1000,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                (quad(24) + quad(48)) as libc::off_t,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self(base.cast())
    }

    fn at(&self, index: usize) -> &AtomicU32 {
        assert!(index < 1024);
        // SAFETY: the page is mapped for good, and aligned.
        unsafe { AtomicU32::from_ptr(self.0.cast::<u32>().wrapping_add(index)) }
    }

    fn ring(&self, index: usize, value: u32) {
        self.at(index).store(value.to_le(), Ordering::SeqCst);
    }
}

/// The status of a completion, without a message to anybody.
fn completion(client: &Client, queue: u64, index: u64) -> Option<u16> {
    let mut entry = [0; 16];
    let at = queue * 0x2000 + 0x1000 + index * 16;
    client.memory.read_exact_at(&mut entry, at).unwrap();
    let status = u16::from_le_bytes([entry[14], entry[15]]);
    (status & 1 != 0).then_some(status >> 1)
}

fn wait_for(client: &Client, queue: u64, index: u64) -> u16 {
    let started = Instant::now();
    loop {
        if let Some(status) = completion(client, queue, index) {
            return status;
        }
        assert!(started.elapsed() < Duration::from_secs(20));
        thread::yield_now();
    }
}

#[test]
fn nothing_is_mappable_unless_the_server_polls() {
    let server = nvme();
    let mut client = server.client();
    let adapter = ahci();
    let mut other = adapter.client();
    for region in 0..9 {
        for client in [&mut client, &mut other] {
            let words = [64, 0, region, 0, 0, 0, 0, 0];
            let info = client.words(5, &words, &[]).unwrap();
            assert_eq!((info.len(), info[0], info[4] & 12), (32, 32, 0));
            assert!(client.received.is_none());
        }
    }
}

#[test]
fn a_doorbell_in_memory_starts_a_command_without_a_message() {
    let server = polling();
    let mut client = server.client();
    client.map();
    let doorbells = Doorbells::of(&mut client);
    client.enable();
    let messages = client.next;
    let at = BASE + 0xa000;
    let identify = [
        (0, 6 | 8 << 16),
        (6, at as u32),
        (7, (at >> 32) as u32),
        (10, 1),
    ];
    client.post(0, 0, &identify);
    doorbells.ring(0, 1);
    assert_eq!(wait_for(&client, 0, 0), 0);
    doorbells.ring(1, 1);
    assert_eq!(client.next, messages, "no message was sent");
    // The I/O queues as well; a message is as good as a write to memory.
    client.enable_again();
    client.create_queues();
    let messages = client.next;
    client.memory.write_all_at(&[3; 512], 0x8000).unwrap();
    for index in 0..40_u64 {
        let place = index % 16;
        client.post(1, place, &Client::io(1));
        doorbells.ring(2, (place as u32 + 1) % 16);
        let started = Instant::now();
        let phase = (index / 16 + 1) & 1;
        loop {
            let mut entry = [0; 16];
            let at = 0x2000 + 0x1000 + place * 16;
            client.memory.read_exact_at(&mut entry, at).unwrap();
            if u64::from(entry[14] & 1) == phase {
                assert_eq!((entry[14] >> 1, entry[15]), (0, 0));
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{index}");
            thread::yield_now();
        }
        doorbells.ring(3, (place as u32 + 1) % 16);
    }
    assert_eq!(client.next, messages, "no message was sent");
    assert_eq!(server.disk.contents()[3 * 512..4 * 512], [3; 512]);
}

#[test]
fn a_queue_that_is_made_again_starts_at_zero() {
    let server = polling();
    let mut client = server.client();
    client.map();
    let doorbells = Doorbells::of(&mut client);
    for _ in 0..2 {
        client.enable_again();
        client.create_queues();
        assert_eq!(doorbells.at(2).load(Ordering::SeqCst), 0);
        // The value that the old queue ended with is news to the new one.
        client.post(1, 0, &Client::io(2));
        doorbells.ring(2, 1);
        assert_eq!(wait_for(&client, 1, 0), 0);
    }
}

#[test]
fn values_that_are_none_do_nothing() {
    let server = polling();
    let mut client = server.client();
    client.map();
    let doorbells = Doorbells::of(&mut client);
    client.set_up();
    for value in [16, 17, 0x8000_0000, u32::MAX, 5000] {
        for index in [1, 2, 3, 4, 5, 6, 1023] {
            doorbells.ring(index, value);
        }
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(client.read(0, 0x1c), 1, "ready, and nothing fatal");
    client.post(1, 0, &Client::io(2));
    doorbells.ring(2, 1);
    assert_eq!(wait_for(&client, 1, 0), 0);
}

#[test]
fn the_page_of_a_client_that_is_gone_rings_nothing() {
    let server = polling();
    let mut client = server.client();
    client.map();
    let old = Doorbells::of(&mut client);
    client.enable();
    drop(client);
    let mut client = server.client();
    client.map();
    let new = Doorbells::of(&mut client);
    client.set_up();
    client.post(1, 0, &Client::io(2));
    old.ring(2, 1);
    thread::sleep(Duration::from_millis(60));
    assert_eq!(completion(&client, 1, 0), None);
    new.ring(2, 1);
    assert_eq!(wait_for(&client, 1, 0), 0);
}
