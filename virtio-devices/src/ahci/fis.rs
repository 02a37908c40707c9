//! Frame information structures (SATA 3.2, 10.5), and where received ones go (AHCI 1.3.1, 4.2.1).

use crate::ata::{Registers, TaskFile};

/// Offsets in the received FIS area.
pub(super) const DMA_SETUP_AT: u64 = 0x00;
pub(super) const PIO_SETUP_AT: u64 = 0x20;
pub(super) const REGISTER_AT: u64 = 0x40;
pub(super) const SET_DEVICE_BITS_AT: u64 = 0x58;

const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const DMA_SETUP: u8 = 0x41;
const PIO_SETUP: u8 = 0x5f;
const SET_DEVICE_BITS: u8 = 0xa1;

/// Bit 6 of the second byte.
const INTERRUPT: u8 = 0x40;
/// Bit 5 of the second byte: data goes to the host.
const TO_HOST: u8 = 0x20;

/// Bytes of a Register Host to Device FIS.
pub(super) const COMMAND_BYTES: usize = 20;

/// What the host sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromHost {
    /// A command.
    Command(TaskFile),
    /// A write of the Device Control register: bit 2 is SRST.
    Control(u8),
}

/// Reads a Register Host to Device FIS; `None` for any other.
pub(super) fn from_host(bytes: &[u8; COMMAND_BYTES]) -> Option<FromHost> {
    let [
        kind,
        flags,
        command,
        feature,
        l0,
        l1,
        l2,
        device,
        l3,
        l4,
        l5,
        feature_exp,
        count,
        count_exp,
        _icc,
        control,
        a0,
        a1,
        a2,
        a3,
    ] = *bytes;
    if kind != HOST_TO_DEVICE {
        return None;
    }
    if flags & 0x80 == 0 {
        return Some(FromHost::Control(control));
    }
    Some(FromHost::Command(TaskFile {
        command,
        features: u16::from_le_bytes([feature, feature_exp]),
        count: u16::from_le_bytes([count, count_exp]),
        lba: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, 0, 0]),
        device,
        auxiliary: u32::from_le_bytes([a0, a1, a2, a3]),
    }))
}

/// A Register Device to Host FIS.
pub(super) fn register(registers: &Registers, interrupt: bool) -> [u8; 20] {
    let mut fis = [0; 20];
    fis[0] = DEVICE_TO_HOST;
    fis[1] = if interrupt { INTERRUPT } else { 0 };
    put_registers(&mut fis, registers);
    fis
}

/// A PIO Setup FIS for a block of `len` bytes; `end` is the status once it was transferred.
pub(super) fn pio_setup(
    registers: &Registers,
    to_host: bool,
    interrupt: bool,
    end: u8,
    len: u32,
) -> [u8; 20] {
    let mut fis = [0; 20];
    fis[0] = PIO_SETUP;
    fis[1] = if interrupt { INTERRUPT } else { 0 } | if to_host { TO_HOST } else { 0 };
    put_registers(&mut fis, registers);
    fis[15] = end;
    fis[16..18].copy_from_slice(&(len as u16).to_le_bytes());
    fis
}

/// A Set Device Bits FIS: `completed` are the tags that have ended.
pub(super) fn set_device_bits(status: u8, error: u8, completed: u32) -> [u8; 8] {
    let mut fis = [0; 8];
    fis[0] = SET_DEVICE_BITS;
    fis[1] = INTERRUPT;
    // BSY and DRQ are not in it.
    fis[2] = status & 0x77;
    fis[3] = error;
    fis[4..8].copy_from_slice(&completed.to_le_bytes());
    fis
}

/// A DMA Setup FIS for the command with this tag.
pub(super) fn dma_setup(tag: u8, to_host: bool, len: u32) -> [u8; 28] {
    let mut fis = [0; 28];
    fis[0] = DMA_SETUP;
    fis[1] = if to_host { TO_HOST } else { 0 };
    fis[4] = tag;
    fis[20..24].copy_from_slice(&len.to_le_bytes());
    fis
}

/// PxTFD for these registers.
pub(super) fn task_file_data(registers: &Registers) -> u32 {
    u32::from(registers.status) | u32::from(registers.error) << 8
}

/// PxSIG for these registers.
pub(super) fn signature(registers: &Registers) -> u32 {
    (registers.lba as u32 & 0xff_ffff) << 8 | u32::from(registers.count & 0xff)
}

fn put_registers(fis: &mut [u8; 20], registers: &Registers) {
    let lba = registers.lba.to_le_bytes();
    fis[2] = registers.status;
    fis[3] = registers.error;
    fis[4..7].copy_from_slice(&lba[..3]);
    fis[7] = registers.device;
    fis[8..11].copy_from_slice(&lba[3..6]);
    fis[12..14].copy_from_slice(&registers.count.to_le_bytes());
}
