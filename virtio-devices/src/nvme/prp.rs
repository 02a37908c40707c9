//! Data pointers as physical region pages (base specification 2.0, 4.1.1).

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::Status;
use crate::memory::{Data, Segment};

/// The most entries of a list that are looked at in one piece.
const CHUNK: usize = 512;

/// Appends a run, joining it with the last where they continue each other.
pub(super) fn append(data: &mut Data, address: u64, len: u32) {
    if let Some(last) = data.last_mut()
        && last.address.0.checked_add(u64::from(last.len)) == Some(address)
        && let Some(joined) = last.len.checked_add(len)
    {
        last.len = joined;
        return;
    }
    data.push(Segment {
        address: GuestAddress(address),
        len,
    });
}

/// Appends the `len` bytes that two PRP entries name. A list is copied page by page and each copy
/// is what counts; every page but the first, which may start anywhere in it, brings at least one
/// page of data, so that the length bounds the work. `page` is a power of two.
#[inline]
pub(super) fn map<M: GuestMemory>(
    memory: &M,
    [first, second]: [u64; 2],
    len: u64,
    page: u64,
    data: &mut Data,
) -> Result<(), Status> {
    if len == 0 {
        return Ok(());
    }
    if first & 3 != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    debug_assert!(page.is_power_of_two());
    let head = (page - (first & (page - 1))).min(len);
    append(data, first, head as u32);
    let left = len - head;
    if left == 0 {
        return Ok(());
    }
    map_rest(memory, second, left, page, data)
}

/// Appends what is beyond the first page.
fn map_rest<M: GuestMemory>(
    memory: &M,
    second: u64,
    mut left: u64,
    page: u64,
    data: &mut Data,
) -> Result<(), Status> {
    let in_page = page - 1;
    if second == 0 {
        // Left out: drivers clear what they do not use, and none has data there.
        return Err(Status::INVALID_FIELD);
    }
    if left <= page {
        if second & in_page != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        append(data, second, left as u32);
        return Ok(());
    }
    if second & 7 != 0 {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let mut list = second;
    loop {
        let room = (page - (list & in_page)) / 8;
        let needed = left.div_ceil(page);
        // Where the list goes on, its last entry in the page says where.
        let (here, chained) = if needed > room {
            (room - 1, true)
        } else {
            (needed, false)
        };
        left = entries(memory, list, here, left, page, data)?;
        if !chained {
            return Ok(());
        }
        let mut next = [0; 8];
        read(memory, &mut next, list.wrapping_add(here * 8))?;
        list = u64::from_le_bytes(next);
        if list & in_page != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
    }
}

/// Appends `count` whole or last pages; returns what is left of the length.
fn entries<M: GuestMemory>(
    memory: &M,
    mut list: u64,
    mut count: u64,
    mut left: u64,
    page: u64,
    data: &mut Data,
) -> Result<u64, Status> {
    let mut bytes = [0; CHUNK * 8];
    while count > 0 {
        let now = count.min(CHUNK as u64);
        let bytes = &mut bytes[..now as usize * 8];
        read(memory, bytes, list)?;
        for entry in bytes.chunks_exact(8) {
            let entry = super::command::le64(entry, 0);
            if entry & (page - 1) != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            let len = left.min(page);
            append(data, entry, len as u32);
            left -= len;
        }
        list = list.wrapping_add(now * 8);
        count -= now;
    }
    Ok(left)
}

pub(super) fn read<M: GuestMemory>(memory: &M, to: &mut [u8], from: u64) -> Result<(), Status> {
    memory
        .read_slice(to, GuestAddress(from))
        .map_err(|_| Status::DATA_TRANSFER_ERROR)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    type Memory = GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn list(memory: &Memory, at: u64, entries: &[u64]) {
        for (index, entry) in entries.iter().enumerate() {
            let at = GuestAddress(at + 8 * index as u64);
            memory.write_obj(*entry, at).unwrap();
        }
    }

    fn mapped(memory: &Memory, dptr: [u64; 2], len: u64) -> Result<Vec<(u64, u32)>, Status> {
        let mut data = Data::new();
        map(memory, dptr, len, 4096, &mut data)?;
        Ok(data.iter().map(|it| (it.address.0, it.len)).collect())
    }

    #[test]
    fn one_page_and_the_rest_of_one() {
        let memory = memory();
        assert_eq!(mapped(&memory, [0x1000, 9], 4096), Ok(vec![(0x1000, 4096)]));
        assert_eq!(mapped(&memory, [0x1e00, 9], 512), Ok(vec![(0x1e00, 512)]));
        assert_eq!(
            mapped(&memory, [0x1e00, 0x8000], 1024),
            Ok(vec![(0x1e00, 512), (0x8000, 512)])
        );
    }

    #[test]
    fn a_list_that_continues_is_followed() {
        let memory = memory();
        // Two entries fit before the end of the page: one page of data, then where it goes on.
        list(&memory, 0x2ff0, &[0x8000, 0x3000]);
        list(&memory, 0x3000, &[0xa000, 0xb000, 0xd000]);
        assert_eq!(
            mapped(&memory, [0x1000, 0x2ff0], 5 * 4096 - 100),
            Ok(vec![
                (0x1000, 4096),
                (0x8000, 4096),
                (0xa000, 8192),
                (0xd000, 3996)
            ])
        );
    }

    #[test]
    fn offsets_where_none_may_be_are_refused() {
        let memory = memory();
        let bad = Err(Status::PRP_OFFSET_INVALID);
        assert_eq!(mapped(&memory, [0x1001, 0], 512), bad);
        assert_eq!(mapped(&memory, [0x1000, 0x2200], 8192), bad);
        assert_eq!(mapped(&memory, [0x1000, 0x2004], 3 * 4096), bad);
        list(&memory, 0x2000, &[0x8000, 0x9010]);
        assert_eq!(mapped(&memory, [0x1000, 0x2000], 3 * 4096), bad);
        list(&memory, 0x2ff8, &[0x3008]);
        assert_eq!(mapped(&memory, [0x1000, 0x2ff8], 3 * 4096), bad);
    }

    #[test]
    fn a_list_outside_memory_is_a_transfer_error_and_a_loop_ends() {
        let memory = memory();
        assert_eq!(
            mapped(&memory, [0x1000, 1 << 40], 3 * 4096),
            Err(Status::DATA_TRANSFER_ERROR)
        );
        // A list whose last entry names itself: the length is used up all the same.
        list(&memory, 0x2000, &[0x2000; 512]);
        let all = mapped(&memory, [0x1000, 0x2000], 2 << 20).unwrap();
        assert_eq!(all.iter().map(|it| u64::from(it.1)).sum::<u64>(), 2 << 20);
    }
}
