//! Data pointers as scatter gather lists (base specification 2.0, 4.1.2).

use vm_memory::{GuestAddress, GuestMemory};

use super::{Status, command::le32, command::le64, prp};
use crate::memory::{Data, Segment};

/// Address of a run that a read throws away: a bit bucket.
pub(super) const BUCKET: GuestAddress = GuestAddress(u64::MAX);

/// The most segments and the most descriptors of one list. A list that loops comes to one of them.
const MAX_SEGMENTS: usize = 256;
const MAX_DESCRIPTORS: usize = 8192;
/// Descriptors copied at a time.
const CHUNK: usize = 128;
const DESCRIPTOR: usize = 16;

const DATA_BLOCK: u8 = 0;
const BIT_BUCKET: u8 = 1;
const SEGMENT: u8 = 2;
const LAST_SEGMENT: u8 = 3;

struct Descriptor {
    address: u64,
    len: u32,
    kind: u8,
}

impl Descriptor {
    fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let id = bytes.get(15).copied().unwrap_or(u8::MAX);
        if id & 15 != 0 {
            // Only addresses: no offsets into a controller memory buffer.
            return Err(Status::SGL_TYPE_INVALID);
        }
        Ok(Self {
            address: le64(bytes, 0),
            len: le32(bytes, 8),
            kind: id >> 4,
        })
    }
}

/// What an SGL has named so far.
struct Walk<'a> {
    left: u64,
    read: bool,
    buckets: bool,
    seen: usize,
    data: &'a mut Data,
}

impl Walk<'_> {
    /// A data block or bit bucket.
    fn take(&mut self, descriptor: &Descriptor) -> Result<(), Status> {
        self.seen += 1;
        if self.seen > MAX_DESCRIPTORS {
            return Err(Status::INVALID_SGL_COUNT);
        }
        let len = u64::from(descriptor.len);
        match descriptor.kind {
            // A bucket takes nothing of a write.
            BIT_BUCKET if !self.read => return Ok(()),
            DATA_BLOCK | BIT_BUCKET => {}
            SEGMENT | LAST_SEGMENT => return Err(Status::INVALID_SGL_SEGMENT),
            _ => return Err(Status::SGL_TYPE_INVALID),
        }
        if len > self.left {
            return Err(Status::DATA_SGL_LENGTH_INVALID);
        }
        self.left -= len;
        if len == 0 {
            return Ok(());
        }
        if descriptor.kind == BIT_BUCKET {
            self.buckets = true;
            self.data.push(Segment {
                address: BUCKET,
                len: descriptor.len,
            });
            return Ok(());
        }
        if descriptor.address.checked_add(len).is_none() {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        prp::append(self.data, descriptor.address, descriptor.len);
        Ok(())
    }
}

/// Appends the `len` bytes that the descriptor in `dptr` names; returns whether there are bit
/// buckets among them. `read` is the direction: towards the guest.
pub(super) fn map<M: GuestMemory>(
    memory: &M,
    dptr: [u64; 2],
    len: u64,
    read: bool,
    data: &mut Data,
) -> Result<bool, Status> {
    let mut inline = [0; DESCRIPTOR];
    inline[..8].copy_from_slice(&dptr[0].to_le_bytes());
    inline[8..].copy_from_slice(&dptr[1].to_le_bytes());
    let mut next = Descriptor::parse(&inline)?;
    let mut walk = Walk {
        left: len,
        read,
        buckets: false,
        seen: 0,
        data,
    };
    let mut segments = 0;
    while matches!(next.kind, SEGMENT | LAST_SEGMENT) {
        segments += 1;
        if segments > MAX_SEGMENTS {
            return Err(Status::INVALID_SGL_COUNT);
        }
        match segment(memory, &next, &mut walk)? {
            Some(following) => next = following,
            None => return end(&walk),
        }
    }
    walk.take(&next)?;
    end(&walk)
}

fn end(walk: &Walk<'_>) -> Result<bool, Status> {
    if walk.left > 0 {
        return Err(Status::DATA_SGL_LENGTH_INVALID);
    }
    Ok(walk.buckets)
}

/// Walks one segment; returns the descriptor of the next, which only the last one of a segment
/// may be.
fn segment<M: GuestMemory>(
    memory: &M,
    at: &Descriptor,
    walk: &mut Walk<'_>,
) -> Result<Option<Descriptor>, Status> {
    let count = at.len as usize / DESCRIPTOR;
    if count == 0 || !(at.len as usize).is_multiple_of(DESCRIPTOR) {
        return Err(Status::INVALID_SGL_SEGMENT);
    }
    if count > MAX_DESCRIPTORS {
        return Err(Status::INVALID_SGL_COUNT);
    }
    let mut bytes = [0; CHUNK * DESCRIPTOR];
    let mut done = 0;
    while done < count {
        let now = (count - done).min(CHUNK);
        let bytes = &mut bytes[..now * DESCRIPTOR];
        let from = at
            .address
            .checked_add((done * DESCRIPTOR) as u64)
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        prp::read(memory, bytes, from)?;
        for (index, descriptor) in bytes.chunks_exact(DESCRIPTOR).enumerate() {
            let descriptor = Descriptor::parse(descriptor)?;
            let is_last = done + index + 1 == count;
            if matches!(descriptor.kind, SEGMENT | LAST_SEGMENT) {
                if is_last && at.kind == SEGMENT {
                    return Ok(Some(descriptor));
                }
                return Err(Status::INVALID_SGL_SEGMENT);
            }
            walk.take(&descriptor)?;
        }
        done += now;
    }
    if at.kind == SEGMENT {
        // The last descriptor of a segment that is not the last one names the next.
        return Err(Status::INVALID_SGL_SEGMENT);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    type Memory = GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn descriptor(address: u64, len: u32, kind: u8) -> [u64; 2] {
        [address, u64::from(len) | u64::from(kind) << 60]
    }

    fn write(memory: &Memory, at: u64, list: &[[u64; 2]]) {
        for (index, [low, high]) in list.iter().enumerate() {
            let at = at + 16 * index as u64;
            memory.write_obj(*low, GuestAddress(at)).unwrap();
            memory.write_obj(*high, GuestAddress(at + 8)).unwrap();
        }
    }

    fn mapped(memory: &Memory, dptr: [u64; 2], len: u64) -> Result<Vec<(u64, u32)>, Status> {
        let mut data = Data::new();
        map(memory, dptr, len, true, &mut data)?;
        Ok(data.iter().map(|it| (it.address.0, it.len)).collect())
    }

    #[test]
    fn one_descriptor_of_exactly_the_length() {
        let memory = memory();
        assert_eq!(
            mapped(&memory, descriptor(0x1003, 512, 0), 512),
            Ok(vec![(0x1003, 512)])
        );
        for len in [511, 513] {
            assert_eq!(
                mapped(&memory, descriptor(0x1000, len, 0), 512),
                Err(Status::DATA_SGL_LENGTH_INVALID)
            );
        }
    }

    #[test]
    fn segments_are_followed_and_buckets_kept() {
        let memory = memory();
        write(
            &memory,
            0x4000,
            &[
                descriptor(0x1000, 100, 0),
                descriptor(0, 0, 0),
                descriptor(0x5000, 32, LAST_SEGMENT),
            ],
        );
        write(
            &memory,
            0x5000,
            &[descriptor(0, 12, BIT_BUCKET), descriptor(0x9000, 400, 0)],
        );
        assert_eq!(
            mapped(&memory, descriptor(0x4000, 48, SEGMENT), 512),
            Ok(vec![(0x1000, 100), (BUCKET.0, 12), (0x9000, 400)])
        );
    }

    #[test]
    fn segments_that_break_the_rules_are_refused() {
        let memory = memory();
        let bad = Err(Status::INVALID_SGL_SEGMENT);
        for len in [0, 15, 17] {
            assert_eq!(
                mapped(&memory, descriptor(0x4000, len, LAST_SEGMENT), 512),
                bad
            );
        }
        // A segment in the middle of one; a segment behind the last; none behind the first.
        write(
            &memory,
            0x4000,
            &[descriptor(0x5000, 16, SEGMENT), descriptor(0x1000, 512, 0)],
        );
        assert_eq!(mapped(&memory, descriptor(0x4000, 32, SEGMENT), 512), bad);
        assert_eq!(
            mapped(&memory, descriptor(0x4000, 16, LAST_SEGMENT), 512),
            bad
        );
        assert_eq!(mapped(&memory, descriptor(0x4010, 16, SEGMENT), 512), bad);
    }

    #[test]
    fn loops_end_and_unknown_kinds_are_refused() {
        let memory = memory();
        write(&memory, 0x4000, &[descriptor(0x4000, 16, SEGMENT)]);
        assert_eq!(
            mapped(&memory, descriptor(0x4000, 16, SEGMENT), 512),
            Err(Status::INVALID_SGL_COUNT)
        );
        for kind in [4, 5, 15] {
            assert_eq!(
                mapped(&memory, descriptor(0x4000, 512, kind), 512),
                Err(Status::SGL_TYPE_INVALID)
            );
        }
        assert_eq!(
            mapped(&memory, descriptor(1 << 40, 16, LAST_SEGMENT), 512),
            Err(Status::DATA_TRANSFER_ERROR)
        );
        assert_eq!(
            mapped(&memory, descriptor(u64::MAX - 3, 512, 0), 512),
            Err(Status::DATA_TRANSFER_ERROR)
        );
    }
}
