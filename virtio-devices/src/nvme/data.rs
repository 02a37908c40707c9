//! Moving small data between the guest and memory of ours: what is checked is the copy.

use vm_memory::{Bytes, GuestMemory};

use super::{Status, command::Command, prp, queues::NvmeQueues, sgl};
use crate::{
    MemorySource,
    memory::{BatchMemory, Data},
};

/// Copies `bytes` to the parts of `data` from `skip` on, stepping over bit buckets.
pub(super) fn scatter<M: GuestMemory>(
    memory: &M,
    data: &Data,
    mut skip: u64,
    mut bytes: &[u8],
) -> Result<(), Status> {
    for segment in data {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = ((len - skip) as usize).min(bytes.len());
        let (now, later) = bytes.split_at(take);
        if segment.address != sgl::BUCKET {
            let at = vm_memory::GuestAddress(segment.address.0.wrapping_add(skip));
            memory
                .write_slice(now, at)
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        }
        skip = 0;
        bytes = later;
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Copies the parts of `data` from `skip` on to `bytes`.
pub(super) fn gather<M: GuestMemory>(
    memory: &M,
    data: &Data,
    mut skip: u64,
    mut bytes: &mut [u8],
) -> Result<(), Status> {
    for segment in data {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = ((len - skip) as usize).min(bytes.len());
        let (now, later) = bytes.split_at_mut(take);
        let at = vm_memory::GuestAddress(segment.address.0.wrapping_add(skip));
        memory
            .read_slice(now, at)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        skip = 0;
        bytes = later;
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}

impl<S: MemorySource> NvmeQueues<S> {
    /// Appends the memory that the data pointer names to the slot; returns whether there are bit
    /// buckets in it.
    pub(super) fn map_data(
        &mut self,
        index: u32,
        command: &Command,
        len: u64,
        to_guest: bool,
        guest: &BatchMemory<'_, S::M>,
    ) -> Result<bool, Status> {
        let page = self.page();
        let data = &mut self.slots[index].data;
        data.clear();
        if command.psdt() == 0 {
            prp::map(&**guest.memory, command.dptr, len, page, data)?;
            return Ok(false);
        }
        sgl::map(&**guest.memory, command.dptr, len, to_guest, data)
    }

    /// Copies `len` bytes from where a command's data pointer points.
    pub(super) fn read_data(
        &mut self,
        index: u32,
        command: &Command,
        len: u64,
        guest: &BatchMemory<'_, S::M>,
    ) -> Result<Vec<u8>, Status> {
        self.map_data(index, command, len, false, guest)?;
        let mut bytes = vec![0; len as usize];
        gather(&**guest.memory, &self.slots[index].data, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies `bytes` to where a command's data pointer points, but at most `len`.
    pub(super) fn write_data(
        &mut self,
        index: u32,
        command: &Command,
        len: u64,
        bytes: &[u8],
        guest: &BatchMemory<'_, S::M>,
    ) -> Result<(), Status> {
        self.map_data(index, command, len, true, guest)?;
        let take = bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        scatter(&**guest.memory, &self.slots[index].data, 0, &bytes[..take])
    }
}
