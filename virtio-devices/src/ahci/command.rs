//! A command as it lies in guest memory: header, table, descriptors (AHCI 1.3.1, 4.2.2 and 4.2.3).
//! Everything is copied once, and the copy is what counts.

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::fis::{self, COMMAND_BYTES, FromHost};
use crate::memory::{Data, QueueMemory, Segment, Window};

/// Bytes of a command header.
const HEADER: usize = 32;

/// Where the command packet and the descriptors start in a command table.
const PACKET_AT: u64 = 0x40;
const PRDT_AT: u64 = 0x80;

/// Bytes of a descriptor, and how many are read at once.
const PRD: usize = 16;
const PRDS_AT_ONCE: usize = 64;

/// Why a command cannot be fetched or its data not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// An address that is not guest memory: PxIS.HBFS.
    Bus,
    /// Something that is no command FIS: PxIS.IFS.
    Interface,
    /// The descriptors have less room than the device has data: PxIS.OFS.
    Overflow,
}

/// A command header and what it leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    /// What the host sends to the device.
    pub(super) fis: FromHost,
    /// Where the number of bytes transferred goes.
    pub(super) count_at: GuestAddress,
    table: u64,
    /// Descriptors.
    descriptors: u16,
    /// The header says that a command packet follows.
    pub(super) atapi: bool,
}

/// Copies a structure of the guest.
pub(super) fn copy<M: GuestMemory>(
    window: &mut Window<'_, QueueMemory<M>>,
    address: u64,
    out: &mut [u8],
) -> Result<(), Fault> {
    if let Some(slice) = window.get(GuestAddress(address), out.len(), Permissions::Read) {
        slice.copy_to(out);
        return Ok(());
    }
    // It may lie across two regions.
    let memory = window.memory();
    memory
        .read_slice(out, GuestAddress(address))
        .map_err(|_| Fault::Bus)
}

/// Writes a structure of the guest.
pub(super) fn store<M: GuestMemory>(
    window: &mut Window<'_, QueueMemory<M>>,
    address: u64,
    bytes: &[u8],
) -> Result<(), Fault> {
    if let Some(slice) = window.get(GuestAddress(address), bytes.len(), Permissions::Write) {
        slice.copy_from(bytes);
        return Ok(());
    }
    let memory = window.memory();
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| Fault::Bus)
}

impl Command {
    /// Fetches the command in a slot of the list at `list`.
    pub(super) fn fetch<M: GuestMemory>(
        window: &mut Window<'_, QueueMemory<M>>,
        list: u64,
        slot: u32,
    ) -> Result<Self, Fault> {
        let at = list
            .checked_add(u64::from(slot) * HEADER as u64)
            .ok_or(Fault::Bus)?;
        let mut header = [0; 16];
        copy(window, at, &mut header)?;
        let [f0, _, p0, p1, _, _, _, _, t0, t1, t2, t3, t4, t5, t6, t7] = header;
        let table = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]) & !0x7f;
        // In double words; a command FIS has five.
        let length = usize::from(f0 & 0x1f) * 4;
        if !(COMMAND_BYTES..=PACKET_AT as usize).contains(&length) {
            return Err(Fault::Interface);
        }
        let mut bytes = [0; COMMAND_BYTES];
        copy(window, table, &mut bytes)?;
        Ok(Self {
            fis: fis::from_host(&bytes).ok_or(Fault::Interface)?,
            count_at: GuestAddress(at.wrapping_add(4)),
            table,
            descriptors: u16::from_le_bytes([p0, p1]),
            atapi: f0 & 0x20 != 0,
        })
    }

    /// The command packet.
    pub(super) fn packet<M: GuestMemory>(
        &self,
        window: &mut Window<'_, QueueMemory<M>>,
    ) -> Result<[u8; 16], Fault> {
        let at = self.table.checked_add(PACKET_AT).ok_or(Fault::Bus)?;
        let mut packet = [0; 16];
        copy(window, at, &mut packet)?;
        Ok(packet)
    }

    /// Appends the memory for `len` bytes of data to `out`; returns whether one of the descriptors
    /// asks for an interrupt.
    pub(super) fn data<M: GuestMemory>(
        &self,
        window: &mut Window<'_, QueueMemory<M>>,
        len: u64,
        out: &mut Data,
    ) -> Result<bool, Fault> {
        let mut table = [0; PRD * PRDS_AT_ONCE];
        let (mut left, mut interrupt) = (len, false);
        let mut done = 0;
        while left > 0 && done < usize::from(self.descriptors) {
            // Most commands need one; fetching more would only cost.
            let wanted = if done == 0 { 1 } else { PRDS_AT_ONCE };
            let count = wanted.min(usize::from(self.descriptors) - done);
            let at = PRDT_AT + (done * PRD) as u64;
            let at = self.table.checked_add(at).ok_or(Fault::Bus)?;
            let bytes = &mut table[..count * PRD];
            copy(window, at, bytes)?;
            for entry in bytes.chunks_exact(PRD) {
                let (address, flags) = descriptor(entry);
                // Byte count minus one, 22 bits.
                let size = u64::from(flags & 0x3f_ffff) + 1;
                let take = size.min(left);
                out.push(Segment {
                    address,
                    len: take as u32,
                });
                interrupt |= flags >> 31 != 0;
                left -= take;
                if left == 0 {
                    break;
                }
            }
            done += count;
        }
        if left > 0 {
            return Err(Fault::Overflow);
        }
        Ok(interrupt)
    }
}

fn descriptor(entry: &[u8]) -> (GuestAddress, u32) {
    let mut address = [0; 8];
    let mut flags = [0; 4];
    address.copy_from_slice(&entry[..8]);
    flags.copy_from_slice(&entry[12..16]);
    (
        GuestAddress(u64::from_le_bytes(address)),
        u32::from_le_bytes(flags),
    )
}

/// Copies `bytes` to the guest's data memory, which has room for them.
pub(super) fn scatter<M: GuestMemory>(
    window: &mut Window<'_, QueueMemory<M>>,
    data: &Data,
    bytes: &[u8],
) -> Result<(), Fault> {
    scatter_at(window, data, 0, bytes)
}

/// Copies `bytes` to the guest's data memory from its byte `skip` on.
pub(super) fn scatter_at<M: GuestMemory>(
    window: &mut Window<'_, QueueMemory<M>>,
    data: &Data,
    mut skip: u64,
    mut bytes: &[u8],
) -> Result<(), Fault> {
    for segment in data {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = bytes.len().min((len - skip) as usize);
        let at = segment.address.0.checked_add(skip).ok_or(Fault::Bus)?;
        store(window, at, &bytes[..take])?;
        bytes = &bytes[take..];
        skip = 0;
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Copies the guest's data memory to `bytes`.
pub(super) fn gather<M: GuestMemory>(
    window: &mut Window<'_, QueueMemory<M>>,
    data: &Data,
    mut bytes: &mut [u8],
) -> Result<(), Fault> {
    for segment in data {
        let take = bytes.len().min(segment.len as usize);
        let (now, later) = bytes.split_at_mut(take);
        copy(window, segment.address.0, now)?;
        bytes = later;
    }
    Ok(())
}
