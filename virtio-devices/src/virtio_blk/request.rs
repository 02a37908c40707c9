//! What a chain asks for: a pure function of the copied chain, the bytes it names and the device.
//!
//! Header, data and status may be cut into descriptors anywhere, or share them: the header is the
//! first 16 readable bytes, the status is the last writable byte.

use virtio_bindings::bindings::virtio_blk as spec;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory};

use super::{
    ID_BYTES, Shared,
    config::{SECTOR, feature},
};
use crate::{
    memory::{Data, Segment, Window},
    stats::Op,
    virtio::Chain,
};

/// Status: done.
pub(crate) const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
/// Status: an error of the disk or of the request.
pub(crate) const IOERR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
/// Status: the device does not do this.
pub(crate) const UNSUPP: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;

/// Bytes of the header, and of a segment of a discard or write zeroes request.
const HEADER: usize = 16;

/// A part of a discard, secure erase or write zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) unmap: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Fill `data` from this byte of the disk.
    Read { offset: u64, len: u64 },
    /// Write `data` to this byte of the disk.
    Write { offset: u64, len: u64 },
    /// Flush.
    Flush,
    /// Discard all of `ranges`; then flush if it has to be durable.
    Discard { durable: bool },
    /// Write zeroes to all of `ranges`.
    WriteZeroes,
    /// Nothing any more: the status, and the bytes written to the guest before it.
    Done { op: Op, status: u8, written: u32 },
}

/// Buffers that are used again for every request.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    /// The parts of a discard, secure erase or write zeroes request.
    pub(crate) ranges: Vec<Range>,
}

/// Where the status of a chain goes.
pub(crate) fn status_address(chain: &Chain) -> Option<GuestAddress> {
    let last = chain.writable().last()?;
    last.address
        .0
        .checked_add(u64::from(last.len) - 1)
        .map(GuestAddress)
}

/// Works out what `chain` asks for. Data of reads and writes is appended to `data`.
pub(crate) fn parse<M: GuestMemory>(
    chain: &Chain,
    window: &mut Window<'_, M>,
    shared: &Shared,
    data: &mut Data,
    scratch: &mut Scratch,
) -> Action {
    let failed = |op| Action::Done {
        op,
        status: IOERR,
        written: 0,
    };
    let total = chain.readable_len() + chain.writable_len();
    if !chain.is_ordered()
        || chain.writable_len() == 0
        || chain.readable_len() < HEADER as u64
        || total > u64::from(u32::MAX)
    {
        return failed(Op::Other);
    }
    let Some(header) = header(chain.readable(), window) else {
        return failed(Op::Other);
    };
    let memory = window.memory();
    let kind = le32(&header, 0);
    let sector = le64(&header, 8);
    let readable = chain.readable_len() - HEADER as u64;
    let writable = chain.writable_len() - 1;
    match kind {
        spec::VIRTIO_BLK_T_IN => match io_offset(sector, writable, shared) {
            Some(offset) => {
                keep(chain.writable(), 0, writable, data);
                done_if_empty(
                    Action::Read {
                        offset,
                        len: writable,
                    },
                    Op::Read,
                    writable,
                )
            }
            None => failed(Op::Read),
        },
        spec::VIRTIO_BLK_T_OUT => match io_offset(sector, readable, shared) {
            Some(offset) if !shared.offers(feature::RO) => {
                keep(chain.readable(), HEADER as u64, readable, data);
                done_if_empty(
                    Action::Write {
                        offset,
                        len: readable,
                    },
                    Op::Write,
                    readable,
                )
            }
            _ => failed(Op::Write),
        },
        spec::VIRTIO_BLK_T_FLUSH => Action::Flush,
        spec::VIRTIO_BLK_T_GET_ID => get_id(chain.writable(), writable, memory, shared),
        spec::VIRTIO_BLK_T_DISCARD
        | spec::VIRTIO_BLK_T_WRITE_ZEROES
        | spec::VIRTIO_BLK_T_SECURE_ERASE => ranges(kind, chain, readable, memory, shared, scratch),
        _ => Action::Done {
            op: Op::Other,
            status: UNSUPP,
            written: 0,
        },
    }
}

/// The first 16 readable bytes.
fn header<M: GuestMemory>(
    segments: &[Segment],
    window: &mut Window<'_, M>,
) -> Option<[u8; HEADER]> {
    let first = segments.first()?;
    if first.len as usize >= HEADER
        && let Some(slice) = window.get(first.address, HEADER, Permissions::Read)
    {
        let header = slice.get_ref::<u128>(0).ok()?.load();
        return Some(header.to_ne_bytes());
    }
    let mut header = [0; HEADER];
    gather(window.memory(), segments, &mut header)?;
    Some(header)
}

/// The first byte of a read or write, if it is whole sectors inside the disk.
fn io_offset(sector: u64, len: u64, shared: &Shared) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    if !len.is_multiple_of(SECTOR) || end > shared.capacity() {
        return None;
    }
    sector.checked_mul(SECTOR)
}

fn done_if_empty(action: Action, op: Op, len: u64) -> Action {
    if len > 0 {
        return action;
    }
    Action::Done {
        op,
        status: OK,
        written: 0,
    }
}

fn get_id<M: GuestMemory>(segments: &[Segment], len: u64, memory: &M, shared: &Shared) -> Action {
    let mut id = [0; ID_BYTES];
    let serial = shared.config().serial.as_bytes();
    id[..serial.len()].copy_from_slice(serial);
    let mut left = &id[..ID_BYTES.min(usize::try_from(len).unwrap_or(ID_BYTES))];
    let written = left.len() as u32;
    for segment in segments {
        let take = left.len().min(segment.len as usize);
        if memory.write_slice(&left[..take], segment.address).is_err() {
            return Action::Done {
                op: Op::Other,
                status: IOERR,
                written: 0,
            };
        }
        left = &left[take..];
    }
    Action::Done {
        op: Op::Other,
        status: OK,
        written,
    }
}

/// Discard, secure erase, write zeroes: every segment is checked before any is executed.
fn ranges<M: GuestMemory>(
    kind: u32,
    chain: &Chain,
    len: u64,
    memory: &M,
    shared: &Shared,
    scratch: &mut Scratch,
) -> Action {
    let (op, needed) = match kind {
        spec::VIRTIO_BLK_T_DISCARD => (Op::Discard, feature::DISCARD),
        spec::VIRTIO_BLK_T_SECURE_ERASE => (Op::Discard, feature::SECURE_ERASE),
        _ => (Op::WriteZeroes, feature::WRITE_ZEROES),
    };
    let done = |status| Action::Done {
        op,
        status,
        written: 0,
    };
    if shared.offers(feature::RO) {
        return done(IOERR);
    }
    if !shared.offers(needed) {
        return done(UNSUPP);
    }
    let limit = u64::from(shared.config().max_discard_segments);
    if len == 0 || !len.is_multiple_of(HEADER as u64) || len / HEADER as u64 > limit {
        return done(IOERR);
    }
    scratch.bytes.clear();
    scratch.bytes.resize(HEADER + len as usize, 0);
    if gather(memory, chain.readable(), &mut scratch.bytes).is_none() {
        return done(IOERR);
    }
    scratch.ranges.clear();
    let unmap_allowed = op == Op::WriteZeroes;
    let mut status = OK;
    for segment in scratch.bytes[HEADER..].chunks_exact(HEADER) {
        let sector = le64(segment, 0);
        let sectors = le32(segment, 8);
        let flags = le32(segment, 12);
        let unmap = flags & spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && !unmap_allowed) {
            return done(UNSUPP);
        }
        let inside = sector
            .checked_add(u64::from(sectors))
            .is_some_and(|end| end <= shared.capacity());
        if !inside || sectors > shared.config().max_discard_sectors {
            // A later segment may still have flags that nobody knows, which says more.
            status = IOERR;
            continue;
        }
        if sectors > 0 {
            scratch.ranges.push(Range {
                offset: sector * SECTOR,
                len: u64::from(sectors) * SECTOR,
                unmap,
            });
        }
    }
    if status != OK || scratch.ranges.is_empty() {
        return done(status);
    }
    match kind {
        spec::VIRTIO_BLK_T_WRITE_ZEROES => Action::WriteZeroes,
        kind => Action::Discard {
            durable: kind == spec::VIRTIO_BLK_T_SECURE_ERASE,
        },
    }
}

/// Appends `len` bytes of `segments` from `skip` on.
fn keep(segments: &[Segment], mut skip: u64, mut len: u64, out: &mut Data) {
    for segment in segments {
        let size = u64::from(segment.len);
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = (size - skip).min(len);
        if take == 0 {
            break;
        }
        out.push(Segment {
            // A range that wraps is in no memory; the lookup refuses it.
            address: GuestAddress(segment.address.0.wrapping_add(skip)),
            len: take as u32,
        });
        skip = 0;
        len -= take;
    }
}

/// Copies the first bytes of `segments`, which have enough.
fn gather<M: GuestMemory>(memory: &M, segments: &[Segment], out: &mut [u8]) -> Option<()> {
    let mut left = out;
    for segment in segments {
        let take = left.len().min(segment.len as usize);
        let (now, later) = left.split_at_mut(take);
        memory.read_slice(now, segment.address).ok()?;
        left = later;
        if left.is_empty() {
            return Some(());
        }
    }
    None
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
