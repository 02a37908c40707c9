//! Data in every way that ATA moves it.

use virtio_devices::{
    ahci::{
        driver::{Issue, command},
        regs::is,
    },
    ata::{TaskFile, opcode},
    testing::Logged,
};

use crate::common::{DATA, Machine, Setup, pattern};

const LONG: u32 = 4096 * 64;

/// A 28-bit command.
pub fn command28(code: u8, lba: u64, sectors: u16) -> TaskFile {
    let mut task = command(code, lba & 0xff_ffff, sectors & 0xff);
    task.device |= (lba >> 24) as u8 & 0xf;
    task
}

fn round_trip(read: u8, write: u8, ext: bool, len: u32, lba: u64) {
    let mut machine = Machine::new(Setup::default());
    let sectors = (len / 512) as u16;
    let task = |code| {
        if ext {
            command(code, lba, sectors)
        } else {
            command28(code, lba, sectors)
        }
    };
    // Sectors of 28-bit commands: 256 at most.
    let data = pattern(len as usize, 7);
    machine.driver.put(DATA, &data);
    let end = machine.write(task(write), len).ok();
    assert_eq!(end.count, len);
    assert_ne!(end.is & is::DHRS, 0);
    let start = lba as usize * 512;
    assert_eq!(machine.disk.contents()[start..start + len as usize], data);
    machine.driver.put(DATA, &vec![0; len as usize]);
    let end = machine.read(task(read), len).ok();
    assert_eq!(end.count, len);
    assert_eq!(machine.data(len as usize), data);
}

#[test]
fn every_command_at_every_length_and_place() {
    let pio = (opcode::READ_SECTORS, opcode::WRITE_SECTORS, false);
    let dma = (opcode::READ_DMA, opcode::WRITE_DMA, false);
    let pio_ext = (opcode::READ_SECTORS_EXT, opcode::WRITE_SECTORS_EXT, true);
    let dma_ext = (opcode::READ_DMA_EXT, opcode::WRITE_DMA_EXT, true);
    for (read, write, ext) in [pio, dma, pio_ext, dma_ext] {
        for len in [512, 4096, 8192, 0x1f000] {
            let last = (8 << 20) / 512 - u64::from(len) / 512;
            for lba in [0, 1, last] {
                round_trip(read, write, ext, len, lba);
            }
        }
    }
    round_trip(opcode::READ_DMA_EXT, opcode::WRITE_DMA_EXT, true, LONG, 1);
    round_trip(
        opcode::READ_SECTORS_EXT,
        opcode::WRITE_SECTORS_EXT,
        true,
        LONG,
        1,
    );
}

#[test]
fn small_descriptors() {
    let mut machine = Machine::new(Setup {
        descriptors: 256,
        ..Setup::default()
    });
    let data = pattern(4096, 3);
    machine.driver.put(DATA, &data);
    let pieces: Vec<_> = (0..128).map(|at| (DATA + at * 32, 32)).collect();
    let mut issue = Issue {
        task: command28(opcode::WRITE_DMA, 0, 8),
        write: true,
        data: &pieces,
        ..Issue::default()
    };
    assert_eq!(machine.run(&issue).ok().count, 4096);
    assert_eq!(machine.disk.contents()[..4096], data);
    machine.driver.put(DATA, &[0; 4096]);
    issue.task.command = opcode::READ_DMA;
    issue.write = false;
    machine.run(&issue).ok();
    assert_eq!(machine.data(4096), data);
}

#[test]
fn pio_reads_end_with_pio_setup() {
    let mut machine = Machine::new(Setup::default());
    machine
        .driver
        .put(machine.driver.layout().received(), &[0; 0x60]);
    let end = machine
        .read(command28(opcode::READ_SECTORS, 0, 3), 1536)
        .ok();
    assert_eq!(end.is & (is::PSS | is::DHRS), is::PSS);
    let setup = machine
        .driver
        .take(machine.driver.layout().received() + 0x20, 20);
    assert_eq!(setup[..4], [0x5f, 0x60, 0x58, 0]);
    assert_eq!(setup[15..18], [0x50, 0, 2], "status at the end, 512 bytes");
    assert_eq!(machine.register_fis(), [0; 20]);
}

#[test]
fn pio_writes_interrupt_for_all_blocks_but_the_first() {
    let mut machine = Machine::new(Setup::default());
    let end = machine
        .write(command28(opcode::WRITE_SECTORS, 0, 1), 512)
        .ok();
    assert_eq!(end.is & (is::PSS | is::DHRS), is::DHRS);
    let end = machine
        .write(command28(opcode::WRITE_SECTORS, 0, 2), 1024)
        .ok();
    assert_eq!(end.is & (is::PSS | is::DHRS), is::PSS | is::DHRS);
}

#[test]
fn force_unit_access_reaches_the_disk() {
    let mut machine = Machine::new(Setup::default());
    machine
        .write(command(opcode::WRITE_DMA_FUA_EXT, 4, 8), 4096)
        .ok();
    let durable = |log: &[Logged]| {
        log.iter()
            .filter(|op| matches!(op, Logged::Write { fua: true, .. }))
            .count()
    };
    assert_eq!(durable(&machine.disk.log()), 1);
    machine
        .write(command(opcode::WRITE_DMA_EXT, 4, 8), 4096)
        .ok();
    assert_eq!(durable(&machine.disk.log()), 1);
}

#[test]
fn flush_reaches_the_disk() {
    let mut machine = Machine::new(Setup::default());
    for code in [opcode::FLUSH_CACHE, opcode::FLUSH_CACHE_EXT] {
        machine.disk.clear_log();
        let end = machine.plain(command(code, 0, 0)).ok();
        assert_ne!(end.is & is::DHRS, 0);
        assert_eq!(machine.disk.log(), [Logged::Flush]);
    }
}
