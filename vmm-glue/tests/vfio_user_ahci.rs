//! An AHCI host bus adapter behind the vfio-user server, from a client's seat: found, driven with
//! messages and with the line, reset, and left.
#![allow(missing_docs, clippy::unwrap_used)]

mod vfio_client;

use std::{
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::Arc,
    thread,
};

use vfio_client::{BASE, Client};
use virtio_devices::{
    ahci::{
        OpticalConfig,
        driver::{Layout, command, command_fis},
        regs::{self, cmd, ghc, px},
    },
    ata::{DiskConfig, TaskFile, opcode},
    testing::{MockDisk, MockDiskConfig},
};
use vm_memory::GuestMemoryAtomic;
use vmm_glue::{
    pci::{AhciFunction, AhciFunctionConfig},
    vfio_user::{StopHandle, VfioUserInterrupts, VfioUserMemory, VfioUserServer},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const LAYOUT: Layout = Layout {
    base: BASE,
    descriptors: 1,
};
/// Where data goes.
const DATA: u64 = 0x10_0000;
const ABAR: u32 = 5;
const INTX: u32 = 0;
const MSI: u32 = 1;

struct Server {
    disk: MockDisk,
    function: Arc<AhciFunction>,
    stop: StopHandle,
    thread: Option<thread::JoinHandle<()>>,
    folder: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = MockDisk::new(MockDiskConfig::default());
        let interrupts = Arc::new(VfioUserInterrupts::default());
        let memory = GuestMemoryAtomic::new(VfioUserMemory::new());
        let config = AhciFunctionConfig::default();
        let function = AhciFunction::new(config, &memory, interrupts.clone()).unwrap();
        let function = Arc::new(function);
        let plugged = Box::new(disk.clone());
        let config = DiskConfig::of(&*plugged);
        function.hba().plug_disk(0, plugged, config).unwrap();
        let empty = OpticalConfig::default();
        function.hba().plug_optical(1, None, empty).unwrap();
        let path = folder.path().join("s");
        let mut server = VfioUserServer::bind(&path, function.clone(), memory, interrupts).unwrap();
        let stop = server.stop_handle().unwrap();
        let thread = thread::spawn(move || server.run().unwrap());
        Self {
            disk,
            function,
            stop,
            thread: Some(thread),
            folder,
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.folder.path().join("s"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().map(thread::JoinHandle::join);
        assert!(ended.is_some_and(|it| it.is_ok()));
    }
}

/// The driver of port 0.
trait Ahci {
    fn port(&mut self, register: u64) -> u32;
    fn set_port(&mut self, register: u64, value: u32);
    fn interrupt_with(&mut self, index: u32) -> EventFd;
    fn start(&mut self);
    fn issue(&mut self, task: &TaskFile, write: bool);
    fn finish(&mut self);
}

fn port(register: u64) -> u64 {
    regs::PORTS + register
}

impl Ahci for Client {
    fn port(&mut self, register: u64) -> u32 {
        self.read(ABAR, port(register))
    }

    fn set_port(&mut self, register: u64, value: u32) {
        self.write_to(ABAR, port(register), value);
    }

    fn interrupt_with(&mut self, index: u32) -> EventFd {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let fds = [event.as_raw_fd()];
        self.words(8, &[20, 1 << 2 | 1 << 5, index, 0, 1], &fds)
            .unwrap();
        event
    }

    fn start(&mut self) {
        self.memory.write_all_at(&[0; 0x4000], 0).unwrap();
        for (register, value) in [(px::CLB, LAYOUT.list()), (px::FB, LAYOUT.received())] {
            self.set_port(register, value as u32);
            self.set_port(register + 4, (value >> 32) as u32);
        }
        self.set_port(px::SERR, u32::MAX);
        self.set_port(px::IE, u32::MAX);
        self.set_port(px::CMD, cmd::FRE);
        self.set_port(px::CMD, cmd::FRE | cmd::ST);
        self.write_to(ABAR, regs::GHC, ghc::AE | ghc::IE);
        self.until("ready", |it| it.port(px::TFD) & 0x89 == 0);
    }

    /// One command in slot 0, with 512 bytes at `DATA`.
    fn issue(&mut self, task: &TaskFile, write: bool) {
        let at = |address: u64| address - BASE;
        let mut header = [0; 16];
        header[0] = 5 | u8::from(write) << 6;
        header[2] = 1;
        header[8..].copy_from_slice(&LAYOUT.table(0).to_le_bytes());
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&(BASE + DATA).to_le_bytes());
        entry[12..].copy_from_slice(&511_u32.to_le_bytes());
        let table = at(LAYOUT.table(0));
        let memory = &self.memory;
        memory.write_all_at(&header, at(LAYOUT.list())).unwrap();
        memory.write_all_at(&command_fis(task), table).unwrap();
        memory.write_all_at(&entry, table + 0x80).unwrap();
        self.set_port(px::CI, 1);
    }

    fn finish(&mut self) {
        self.until("the command", |it| it.port(px::CI) == 0);
        assert_eq!(self.port(px::TFD) & 0x89, 0);
        let status = self.port(px::IS);
        assert_ne!(status, 0);
        self.set_port(px::IS, status);
        self.write_to(ABAR, regs::IS, 1);
    }
}

#[test]
fn a_client_finds_the_function_uses_it_and_leaves_it_fresh() {
    let server = Server::start();
    for (round, index) in [(1_u8, MSI), (2, INTX)] {
        let mut client = server.client();
        assert_eq!(client.read(7, 0), 0x2922_8086);
        assert_eq!(client.read(7, 8) >> 8, 0x01_0601);
        let region = client.words(5, &[32, 0, ABAR, 0, 0, 0, 0, 0], &[]).unwrap();
        assert_eq!(region[16..24], 0x1000_u64.to_ne_bytes());
        client.map();
        let event = client.interrupt_with(index);
        assert_eq!(client.port(px::CMD) & (cmd::ST | cmd::FRE), 0);
        client.start();
        client.memory.write_all_at(&[round; 512], DATA).unwrap();
        client.issue(&command(opcode::WRITE_DMA_EXT, 3, 1), true);
        client.finish();
        assert_eq!(server.disk.contents()[3 * 512..4 * 512], [round; 512]);
        client.memory.write_all_at(&[0; 512], DATA).unwrap();
        client.issue(&command(opcode::READ_DMA_EXT, 3, 1), false);
        client.finish();
        let mut data = [0; 512];
        client.memory.read_exact_at(&mut data, DATA).unwrap();
        assert_eq!(data, [round; 512]);
        assert!(event.read().unwrap() > 0);
        client.call(13, &[], &[]).unwrap();
        assert_eq!(client.port(px::CMD) & (cmd::ST | cmd::FRE), 0);
        client.unmap().unwrap();
    }
}

#[test]
fn the_line_is_signalled_again_until_its_cause_is_gone() {
    let server = Server::start();
    let mut client = server.client();
    client.map();
    let line = client.interrupt_with(INTX);
    client.start();
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.until("the command", |it| it.port(px::CI) == 0);
    client.until("the line", |_| line.read().is_ok());
    // The driver has not looked: unmasking tells it again.
    client.words(8, &[20, 1 | 1 << 4, INTX, 0, 1], &[]).unwrap();
    assert!(line.read().is_ok());
    client.finish();
    client.words(8, &[20, 1 | 1 << 4, INTX, 0, 1], &[]).unwrap();
    assert!(line.read().is_err());
}

#[test]
fn the_index_and_data_pair_reaches_every_register() {
    let server = Server::start();
    let mut client = server.client();
    // The capability tells where the pair is: BAR 4, dword 4.
    let mut at = u64::from(client.read(7, 0x34) & 0xff);
    while client.read(7, at) & 0xff != 0x12 {
        at = u64::from(client.read(7, at) >> 8 & 0xff);
        assert_ne!(at, 0);
    }
    assert_eq!(client.read(7, at) >> 16, 0x10);
    assert_eq!(client.read(7, at + 4), 0x48);
    assert_eq!(client.read(7, 0x20) & 3, 1);
    let plain = client.read(ABAR, regs::PI);
    client.write_to(4, 0x10, regs::PI as u32);
    assert_eq!(client.read(4, 0x10), regs::PI as u32);
    assert_eq!(client.read(4, 0x14), plain);
    client.write_to(4, 0x10, 0xffff_ffff);
    assert_eq!(client.read(4, 0x10), 0xffc);
    client.write_to(4, 0x10, port(px::CLB) as u32);
    client.write_to(4, 0x14, 0x1234_5400);
    assert_eq!(client.port(px::CLB), 0x1234_5400);
}

#[test]
fn an_unmap_and_a_reset_wait_for_what_is_in_flight() {
    let server = Server::start();
    let mut client = server.client();
    client.map();
    client.start();
    server.disk.hold(true);
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.until("the read", |_| server.disk.held() == 1);
    assert!(!vmm_glue::pci::PciFunction::is_idle(&*server.function));
    let disk = server.disk.clone();
    let release = thread::spawn(move || {
        disk.hold(false);
        disk.release_all();
    });
    client.unmap().unwrap();
    assert_eq!(server.disk.held(), 0);
    release.join().unwrap();
    client.call(13, &[], &[]).unwrap();
    assert!(vmm_glue::pci::PciFunction::is_idle(&*server.function));
}

#[test]
fn a_drive_that_is_plugged_into_a_running_port_is_seen() {
    let server = Server::start();
    let mut client = server.client();
    client.map();
    client.start();
    server.function.hba().unplug(0).unwrap();
    client.until("no link", |it| it.port(px::SSTS) == 0);
    assert_ne!(client.port(px::SERR) & 1 << 16, 0);
    let disk = Box::new(server.disk.clone());
    let config = DiskConfig::of(&*disk);
    server.function.hba().plug_disk(0, disk, config).unwrap();
    client.until("the link", |it| it.port(px::SSTS) & 0xf == 3);
    assert_ne!(client.port(px::SERR) & 1 << 26, 0);
}
