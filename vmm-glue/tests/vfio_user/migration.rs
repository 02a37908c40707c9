//! Devices that move from one server to another: the states, the data, and data that is not what it says.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    thread,
    time::Duration,
};

use virtio_devices::{
    ahci::{driver::command, regs::px},
    ata::opcode,
    testing::{MockDisk, MockDiskConfig},
};
use vmm_glue::{pci::AhciFunction, vfio_user::NvmeFunction};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    ahci_driver::{Ahci, DATA, Issue, MSI},
    client::{BASE, CONFIG, Client, MASTER, MAX_DATA},
    nvme_driver::Nvme,
    server::{Server, ahci, ahci_with, nvme, nvme_over},
};

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
const MIGRATION: u32 = 1;
const STATE: u32 = 2;
const DATA_SIZE: u32 = 9;

pub const ERROR: u32 = 0;
pub const STOP: u32 = 1;
pub const RUNNING: u32 = 2;
pub const STOP_COPY: u32 = 3;
pub const RESUMING: u32 = 4;

pub const EINVAL: u32 = 22;
const ENOTTY: u32 = 25;

/// The client's side of a migration.
pub trait Moving {
    fn go(&mut self, state: u32) -> Result<(), u32>;
    fn state(&mut self) -> u32;
    fn read_state(&mut self) -> Vec<u8>;
    fn write_state(&mut self, data: &[u8]) -> Result<(), u32>;
    fn read_some(&mut self, size: u32) -> Result<Vec<u8>, u32>;
    /// Stops the device and takes its state.
    fn save(&mut self) -> Vec<u8>;
    /// Puts a state into the device and lets it run.
    fn restore(&mut self, data: &[u8]);
}

impl Moving for Client {
    fn go(&mut self, state: u32) -> Result<(), u32> {
        let data = [state.to_ne_bytes(), [0xff; 4]].concat();
        self.feature(SET | STATE, &data).map(|_| ())
    }

    fn state(&mut self) -> u32 {
        let data = self.feature(GET | STATE, &[]).unwrap();
        assert_eq!(data.len(), 8);
        u32::from_ne_bytes(data[..4].try_into().unwrap())
    }

    fn read_some(&mut self, size: u32) -> Result<Vec<u8>, u32> {
        let answer = self.words(17, &[8 + size, size], &[])?;
        let word = |at: usize| u32::from_ne_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(answer.len(), word(0) as usize);
        assert_eq!(answer.len(), 8 + word(4) as usize);
        Ok(answer[8..].to_vec())
    }

    fn read_state(&mut self) -> Vec<u8> {
        let mut data = Vec::new();
        loop {
            // Any piece will do; a short one is the last.
            let size = [MAX_DATA as u32, 1, 100][data.len() % 3];
            let piece = self.read_some(size).unwrap();
            data.extend_from_slice(&piece);
            if piece.len() < size as usize {
                return data;
            }
        }
    }

    fn write_state(&mut self, data: &[u8]) -> Result<(), u32> {
        for piece in data.chunks(777) {
            let mut body = Vec::new();
            body.extend_from_slice(&(8 + piece.len() as u32).to_ne_bytes());
            body.extend_from_slice(&(piece.len() as u32).to_ne_bytes());
            body.extend_from_slice(piece);
            assert!(self.call(18, &body, &[])?.is_empty());
        }
        Ok(())
    }

    fn save(&mut self) -> Vec<u8> {
        self.go(STOP_COPY).unwrap();
        assert_eq!(self.state(), STOP_COPY);
        let size = self.feature(GET | DATA_SIZE, &[]).unwrap();
        let data = self.read_state();
        assert_eq!(size, (data.len() as u64).to_ne_bytes());
        data
    }

    fn restore(&mut self, data: &[u8]) {
        self.go(RESUMING).unwrap();
        self.write_state(data).unwrap();
        self.go(STOP).unwrap();
        assert_eq!(self.state(), STOP);
        self.go(RUNNING).unwrap();
    }
}

/// Lets the requests that a disk holds go, in a moment.
fn release(disk: &MockDisk) -> thread::JoinHandle<()> {
    let disk = disk.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        disk.hold(false);
        disk.release_all();
    })
}

/// A controller with two of eight writes at the disk, and the others not even taken.
fn under_load(server: &Server<NvmeFunction>) -> Client {
    let mut client = server.driver();
    server.disk.hold(true);
    for index in 0..8 {
        let data = 0x8000 + index * 512;
        client
            .memory
            .write_all_at(&[index as u8 + 1; 512], data)
            .unwrap();
        let at = BASE + data;
        let entry = [
            (0, 1 | (100 + index as u32) << 16),
            (1, 1),
            (6, at as u32),
            (7, (at >> 32) as u32),
            (10, index as u32),
        ];
        client.post(1, index, &entry);
    }
    client.write(0x1008, 8);
    client.until("two writes", |_| server.disk.held() == 2);
    client
}

/// Identifiers of the commands that have ended in the I/O queue, all of them well.
fn ended(memory: &File) -> Vec<u16> {
    let mut cids = Vec::new();
    for index in 0..16 {
        let mut entry = [0; 16];
        memory
            .read_exact_at(&mut entry, 0x3000 + index * 16)
            .unwrap();
        if entry[14] & 1 != 0 {
            assert_eq!((entry[14] >> 1, entry[15]), (0, 0));
            cids.push(u16::from_le_bytes([entry[12], entry[13]]));
        }
    }
    cids.sort_unstable();
    cids
}

fn narrow() -> MockDisk {
    MockDisk::new(MockDiskConfig {
        capacity: 2,
        ..MockDiskConfig::default()
    })
}

#[test]
fn a_controller_moves_under_load_and_nothing_is_lost() {
    let disk = narrow();
    let one = nvme_over(disk.clone(), Box::new(disk.clone()));
    let mut client = under_load(&one);
    let releasing = release(&disk);
    client.go(STOP).unwrap();
    releasing.join().unwrap();
    // What was at the disk has ended, and nothing else was begun.
    assert_eq!(ended(&client.memory), [100, 101]);
    let data = client.save();
    assert_eq!(ended(&client.memory), [100, 101]);
    let memory = client.memory.try_clone().unwrap();
    drop(client);

    let two = nvme_over(disk.clone(), Box::new(disk.clone()));
    let mut client = Client::with_memory(&two.path(), memory);
    client.map();
    client.restore(&data);
    assert_eq!(client.read(CONFIG, 4) & 7, MASTER);
    client.until("the rest", |it| ended(&it.memory).len() == 8);
    assert_eq!(ended(&client.memory), (100..108).collect::<Vec<_>>());
    let contents = disk.contents();
    for index in 0..8_usize {
        let at = index * 512;
        assert_eq!(contents[at..at + 512], [index as u8 + 1; 512], "{index}");
    }
    // It goes on where it was: the admin queue has had two commands.
    assert_eq!(client.identify(2), 0);
    client.write(0x100c, 8);
    assert_eq!(client.transfer(8, 2), 0);
}

/// The first 512 bytes of the error log, and SMART, by two admin commands.
fn logs(client: &mut Client, index: u64) -> [Vec<u8>; 2] {
    let at = BASE + 0xa000;
    [(index, 1), (index + 1, 2)].map(|(index, page)| {
        let entry = [
            (0, 2 | 8 << 16),
            (1, u32::MAX),
            (6, at as u32),
            (7, (at >> 32) as u32),
            (10, page | 127 << 16),
        ];
        assert_eq!(client.command(0, index, &entry), 0);
        let mut data = vec![0; 512];
        client.memory.read_exact_at(&mut data, 0xa000).unwrap();
        data
    })
}

#[test]
fn what_a_controller_has_logged_and_counted_moves_with_it() {
    let one = nvme();
    let mut client = one.driver();
    assert_eq!(client.transfer(0, 1), 0);
    let mut beyond = Client::io(2);
    beyond[4] = (10, 1 << 30);
    assert_ne!(client.command(1, 1, &beyond), 0);
    let before = logs(&mut client, 2);
    // The number of the entry; the units that were written.
    assert_eq!((before[0][0], before[1][48]), (1, 1));
    let data = client.save();
    let memory = client.memory.try_clone().unwrap();
    drop(client);
    let two = nvme();
    // Another client was here before.
    let mut other = two.driver();
    assert_ne!(other.command(1, 0, &beyond), 0);
    drop(other);
    let mut client = Client::with_memory(&two.path(), memory);
    client.map();
    client.restore(&data);
    assert_eq!(logs(&mut client, 4), before);
    assert_ne!(client.command(1, 2, &beyond), 0);
    let after = logs(&mut client, 6);
    assert_eq!(after[0][0], 2);
    assert_eq!(after[0][64..128], before[0][..64]);
}

#[test]
fn messages_come_after_the_device_runs_again() {
    let disk = narrow();
    let one = nvme_over(disk.clone(), Box::new(disk.clone()));
    let mut client = under_load(&one);
    let releasing = release(&disk);
    let data = client.save();
    releasing.join().unwrap();
    let memory = client.memory.try_clone().unwrap();
    drop(client);
    let two = nvme_over(disk.clone(), Box::new(disk.clone()));
    let mut client = Client::with_memory(&two.path(), memory);
    client.map();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    client.go(RESUMING).unwrap();
    client.write_state(&data).unwrap();
    client.go(STOP).unwrap();
    let fds = [event.as_raw_fd()];
    client
        .words(8, &[20, 1 << 2 | 1 << 5, 2, 1, 1], &fds)
        .unwrap();
    thread::sleep(Duration::from_millis(60));
    assert!(event.read().is_err());
    assert_eq!(ended(&client.memory).len(), 2);
    client.go(RUNNING).unwrap();
    client.until("a message", |_| event.read().is_ok());
}

#[test]
fn what_is_said_of_migration_is_true() {
    let one = nvme();
    let two = ahci();
    for mut client in [one.client(), two.client()] {
        // STOP_COPY alone: no peer-to-peer states, no pre-copy.
        let flags = client.feature(GET | MIGRATION, &[]).unwrap();
        assert_eq!(flags, 1_u64.to_ne_bytes());
        assert_eq!(client.state(), RUNNING);
        for (flags, answer) in [
            (PROBE | MIGRATION, Ok(())),
            (PROBE | GET | MIGRATION, Ok(())),
            (PROBE | SET | MIGRATION, Err(EINVAL)),
            (PROBE | GET | SET | STATE, Ok(())),
            (PROBE | GET | DATA_SIZE, Ok(())),
            (GET | SET | STATE, Err(EINVAL)),
            (STATE, Err(EINVAL)),
            (SET | MIGRATION, Err(EINVAL)),
            (SET | DATA_SIZE, Err(EINVAL)),
            (GET | STATE | 1 << 19, Err(EINVAL)),
            // DMA is not logged.
            (PROBE | SET | 6, Err(ENOTTY)),
            (PROBE | SET | 7, Err(ENOTTY)),
            (PROBE | GET | 8, Err(ENOTTY)),
            (PROBE, Err(ENOTTY)),
            (PROBE | 10, Err(ENOTTY)),
        ] {
            assert_eq!(client.feature(flags, &[]).map(|_| ()), answer, "{flags:#x}");
        }
        // Without a state; with no room for the answer.
        assert_eq!(client.words(16, &[64, SET | STATE], &[]), Err(EINVAL));
        let short = client.words(16, &[8, GET | STATE], &[]).unwrap();
        assert_eq!(short[..4], 16_u32.to_ne_bytes());
        assert_eq!(short.len(), 8);
    }
}

#[test]
fn every_transition_that_there_is_and_no_other() {
    let server = nvme();
    let mut client = server.client();
    client.map();
    let used = |client: &mut Client| {
        client.enable_again();
        client.create_queues();
        assert_eq!(client.transfer(0, 2), 0);
    };
    used(&mut client);
    for state in [ERROR, 5, 6, 7, 8, 0xffff_ffff] {
        for from in [RUNNING, STOP, STOP_COPY, RESUMING] {
            client.go(from).unwrap();
            assert_eq!(client.go(state), Err(EINVAL), "{from} {state}");
            assert_eq!(client.state(), from);
            client.call(13, &[], &[]).unwrap();
            assert_eq!(client.state(), RUNNING);
        }
    }
    // Ways through STOP are gone in one step, and back.
    used(&mut client);
    for state in [
        STOP_COPY, STOP, STOP_COPY, RUNNING, STOP_COPY, STOP_COPY, RUNNING,
    ] {
        client.go(state).unwrap();
        assert_eq!(client.state(), state);
    }
    assert_eq!(client.transfer(1, 2), 0);
    // Data only where there is some.
    for state in [RUNNING, STOP, RESUMING] {
        client.go(state).unwrap();
        assert_eq!(client.read_some(8), Err(EINVAL));
        client.call(13, &[], &[]).unwrap();
    }
    for state in [RUNNING, STOP, STOP_COPY] {
        client.go(state).unwrap();
        assert_eq!(client.write_state(&[0; 8]), Err(EINVAL));
        client.call(13, &[], &[]).unwrap();
    }
    // Larger than a message may be; more than there is room for; a size that is not there.
    client.go(STOP_COPY).unwrap();
    assert_eq!(client.read_some(MAX_DATA as u32 + 1), Err(EINVAL));
    assert_eq!(client.words(17, &[15, 8], &[]), Err(EINVAL));
    assert_eq!(client.words(17, &[8], &[]), Err(EINVAL));
    assert!(client.read_some(8).is_ok());
    client.go(RESUMING).unwrap();
    assert_eq!(client.words(18, &[16, 9, 0, 0], &[]), Err(EINVAL));
    assert_eq!(client.words(18, &[16, u32::MAX, 0], &[]), Err(EINVAL));
    // Nothing is no state. What comes then is an error, which a reset ends.
    assert_eq!(client.go(RUNNING), Err(EINVAL));
    assert_eq!(client.state(), ERROR);
    for state in [STOP, RUNNING, STOP_COPY, RESUMING] {
        assert_eq!(client.go(state), Err(EINVAL));
    }
    client.call(13, &[], &[]).unwrap();
    used(&mut client);
}

#[test]
fn memory_is_exchanged_while_the_device_is_stopped() {
    let server = nvme();
    let mut client = server.driver();
    client.go(STOP).unwrap();
    client.unmap().unwrap();
    // A doorbell now is the client's mistake, and is looked at later.
    client.post(1, 0, &Client::io(2));
    client.write(0x1008, 1);
    client.map();
    thread::sleep(Duration::from_millis(30));
    assert!(ended(&client.memory).is_empty());
    client.go(RUNNING).unwrap();
    client.until("the read", |it| ended(&it.memory) == [9]);
    // Nor does a client that leaves in any state leave anything behind.
    for state in [STOP, STOP_COPY, RESUMING] {
        client.go(state).unwrap();
        drop(client);
        client = server.client();
        assert_eq!(client.state(), RUNNING);
        client.map();
        client.set_up();
        assert_eq!(client.transfer(0, 2), 0);
    }
}

#[test]
fn an_adapter_moves_under_load_and_nothing_is_lost() {
    let one = ahci();
    let disk = one.disk.clone();
    let mut client = one.client();
    client.map();
    let event = client.interrupt_with(MSI);
    client.start();
    client.memory.write_all_at(&[7; 512], DATA).unwrap();
    // One write at the disk, one that was issued and cannot be taken meanwhile.
    disk.hold(true);
    let issue = |slot| Issue {
        slot,
        write: true,
        bytes: 512,
        ..Issue::default()
    };
    client.issue_on(0, &command(opcode::WRITE_DMA_EXT, 1, 1), issue(0));
    client.until("the write", |_| disk.held() == 1);
    client.issue_on(0, &command(opcode::WRITE_DMA_EXT, 2, 1), issue(5));
    let releasing = release(&disk);
    client.go(STOP).unwrap();
    releasing.join().unwrap();
    assert_eq!(client.port(px::CI), 1 << 5);
    assert!(event.read().is_ok());
    assert_eq!(disk.contents()[512..1536], [[7; 512], [0; 512]].concat());
    let data = client.save();
    let memory = client.memory.try_clone().unwrap();
    drop(client);

    let two = ahci_over(disk.clone());
    let mut client = Client::with_memory(&two.path(), memory);
    client.map();
    let event = client.interrupt_with(MSI);
    client.restore(&data);
    client.until("the other write", |it| it.port(px::CI) == 0);
    client.until("its message", |_| event.read().is_ok());
    assert_eq!(disk.contents()[512..1536], [7; 1024]);
    client.finish();
    client.issue(&command(opcode::READ_DMA_EXT, 2, 1), false);
    client.finish();
}

/// The adapter over a disk that another one had.
fn ahci_over(disk: MockDisk) -> Server<AhciFunction> {
    let server = ahci();
    let hba = server.function.hba();
    let config = virtio_devices::ata::DiskConfig::of(&disk);
    hba.plug_disk(0, Box::new(disk), config).unwrap();
    server
}

#[test]
fn an_optical_drive_keeps_what_the_guest_has_set() {
    let medium = || Some(MockDisk::new(MockDiskConfig::default()));
    let one = ahci_with(medium());
    let mut client = one.client();
    client.map();
    client.start_on(1);
    let packet = |client: &mut Client, bytes: [u8; 12]| {
        let mut task = command(0xa0, 0, 0);
        task.lba = 0xf000 << 8;
        let issue = Issue {
            packet: Some(bytes),
            ..Issue::default()
        };
        client.issue_on(1, &task, issue);
        client.until("the packet", |it| {
            it.register(1, px::CI) == 0 || it.register(1, px::IS) & 1 << 30 != 0
        });
        client.register(1, px::TFD) & 1 == 0
    };
    let mut ready = [0; 12];
    // Twice, should a unit attention be told first.
    let _ = packet(&mut client, ready);
    client.set_register(1, px::CMD, 0);
    client.start_on(1);
    ready[0] = 0x1e;
    ready[4] = 1;
    assert!(packet(&mut client, ready), "the tray is locked");
    let data = client.save();
    let memory = client.memory.try_clone().unwrap();
    drop(client);
    let two = ahci_with(medium());
    let mut client = Client::with_memory(&two.path(), memory);
    client.map();
    client.restore(&data);
    let mut eject = [0; 12];
    (eject[0], eject[4]) = (0x1b, 2);
    assert!(!packet(&mut client, eject), "still locked");
    // Not into a drive with another medium.
    let small = MockDiskConfig {
        size: 1 << 19,
        ..MockDiskConfig::default()
    };
    let three = ahci_with(Some(MockDisk::new(small)));
    let mut client = three.client();
    client.go(RESUMING).unwrap();
    client.write_state(&data).unwrap();
    assert_eq!(client.go(STOP), Err(EINVAL));
}
