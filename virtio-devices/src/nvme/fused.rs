//! Fused Compare and Write: alone behind the gate of the namespace, so that no other write of any
//! queue or controller comes between the two.

use block::io::{AlignedBuf, Buffers, RequestOp};
use vm_memory::Permissions;

use super::{
    Status, command::Command, data, opcode::io as opcode, queues::NvmeQueues, request::check_marks,
    slot::Step,
};
use crate::{MemorySource, memory::BatchMemory, stats::Op, worker::Batch};

const FIRST: u8 = 1;
const SECOND: u8 = 2;

impl<S: MemorySource> NvmeQueues<S> {
    /// Looks at the fused bits. Returns whether the command goes on as a normal one.
    #[inline]
    pub(super) fn fuse(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<bool, Status> {
        let queue = usize::from(self.slots[index].queue);
        let waiting = match self.sqs.get_mut(queue) {
            Some(Some(sq)) => sq.fused.take(),
            _ => None,
        };
        if command.fuse() == 0 && waiting.is_none() {
            return Ok(true);
        }
        self.fuse_with(queue, waiting, index, command, guest, batch)
    }

    /// [`fuse`](Self::fuse), where this command or the one before is a half.
    fn fuse_with(
        &mut self,
        queue: usize,
        waiting: Option<u32>,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<bool, Status> {
        match (command.fuse(), waiting) {
            (SECOND, Some(first)) if command.opcode == opcode::WRITE => {
                self.slots[index].step = Step::FusedWait;
                self.start_pair(first, index, guest, batch);
                Ok(false)
            }
            (fuse, waiting) => {
                if let Some(first) = waiting {
                    self.end(first, Status::ABORTED_MISSING_FUSED);
                }
                match fuse {
                    0 => Ok(true),
                    FIRST if command.opcode == opcode::COMPARE => {
                        self.slots[index].step = Step::FusedWait;
                        self.put_back(queue, Some(index));
                        Ok(false)
                    }
                    SECOND if waiting.is_none() => Err(Status::ABORTED_MISSING_FUSED),
                    _ => Err(Status::INVALID_FIELD),
                }
            }
        }
    }

    fn put_back(&mut self, queue: usize, first: Option<u32>) {
        if let Some(Some(sq)) = self.sqs.get_mut(queue) {
            sq.fused = first;
        }
    }

    pub(super) fn start_pair(
        &mut self,
        first: u32,
        second: u32,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) {
        if let Err(status) = self.try_pair(first, second, guest, batch) {
            self.end_pair(first, status, second, Status::ABORTED_FAILED_FUSED);
        }
    }

    pub(super) fn end_pair(&mut self, first: u32, one: Status, second: u32, two: Status) {
        self.end(first, one);
        self.end(second, two);
    }

    fn try_pair(
        &mut self,
        first: u32,
        second: u32,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let (compare, write) = (self.slots[first].command, self.slots[second].command);
        if compare.psdt() == 3 || write.psdt() == 3 {
            return Err(Status::INVALID_FIELD);
        }
        if compare.nsid != write.nsid
            || compare.slba() != write.slba()
            || compare.blocks() != write.blocks()
        {
            return Err(Status::INVALID_FIELD);
        }
        // A pair that was parked may use its namespace already.
        let used = self.slots[first].namespace;
        let used = used.and_then(|place| self.namespaces.get(place)?.as_ref());
        let used = match used {
            Some(attached) => std::rc::Rc::clone(attached),
            None => self.use_namespace(first, &compare)?.1,
        };
        let namespace = &*used.namespace;
        self.may(namespace, &compare)?;
        self.may(namespace, &write)?;
        let (offset, len) = self.transfer(namespace, &compare)?;
        if compare.blocks() > 1 {
            // ACWU says one block.
            return Err(Status::ATOMIC_WRITE_UNIT_EXCEEDED);
        }
        check_marks(namespace, offset, len)?;
        self.map_data(first, &compare, len, false, guest)?;
        self.map_data(second, &write, len, false, guest)?;
        self.slots[first].step = Step::FusedCompare { second };
        let asked_before = std::mem::take(&mut self.slots[first].alone);
        if !asked_before && !namespace.gate.claim() {
            // Another pair is in there.
            self.let_go(first);
            self.park(first);
            return Ok(());
        }
        self.slots[first].alone = true;
        if !namespace.gate.is_quiet() {
            // The claim stays, so that writes drain; the use of the namespace stays with it.
            self.park(first);
            return Ok(());
        }
        let buffers = Buffers::owned(AlignedBuf::zeroed(len as usize));
        self.push_more(first, RequestOp::Read { offset, buffers }, batch);
        Ok(())
    }

    /// The first command has read what is on the disk.
    pub(super) fn fused_compare(
        &mut self,
        first: u32,
        second: u32,
        buffers: Option<Buffers>,
        batch: &mut Batch,
    ) {
        let status = self.slots[first].status;
        let buffer = buffers.and_then(Buffers::into_owned);
        let Some(buffer) = buffer.filter(|_| status.is_success()) else {
            let read = Status::UNRECOVERED_READ_ERROR;
            self.end_pair(first, read, second, Status::ABORTED_FAILED_FUSED);
            return;
        };
        let mut wanted = vec![0; buffer.len()];
        let same =
            data::gather(&*self.memory, &self.slots[first].data, 0, &mut wanted).and_then(|()| {
                if *wanted == *buffer {
                    Ok(())
                } else {
                    Err(Status::COMPARE_FAILURE)
                }
            });
        if let Err(status) = same {
            self.end_pair(first, status, second, Status::ABORTED_FAILED_FUSED);
            return;
        }
        self.fused_write(first, second, batch);
    }

    fn fused_write(&mut self, first: u32, second: u32, batch: &mut Batch) {
        let memory = std::sync::Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, 0, 0);
        let command = self.slots[second].command;
        let place = self.slots[first].namespace;
        let range = place.and_then(|place| {
            let attached = self.namespaces.get(place)?.as_ref()?;
            attached.namespace.range(command.slba(), command.blocks())
        });
        let buffers = guest.buffers(&self.slots[second].data, Permissions::Read);
        let (Some((offset, len)), Ok(buffers), Some(place)) = (range, buffers, place) else {
            let failed = Status::DATA_TRANSFER_ERROR;
            self.end_pair(first, Status::SUCCESS, second, failed);
            return;
        };
        if let Some(Some(attached)) = self.namespaces.get(place) {
            attached.enter();
        }
        // It stays alone until the second has written, whatever happens meanwhile.
        self.slots[first].step = Step::FusedCompare { second };
        let slot = &mut self.slots[second];
        slot.namespace = Some(place);
        slot.op = Op::Write;
        slot.bytes = len;
        slot.step = Step::FusedWrite { first };
        let write_through = self
            .core
            .hot
            .write_through
            .load(std::sync::atomic::Ordering::Relaxed);
        let op = RequestOp::Write {
            offset,
            buffers,
            fua: command.cdw12() & 1 << 30 != 0 || write_through,
        };
        self.push_more(second, op, batch);
        if !matches!(self.slots[second].step, Step::FusedWrite { .. }) {
            // It has ended with an error already.
            self.end(first, Status::SUCCESS);
        }
    }

    /// The second command has written: both end, the first one first.
    pub(super) fn fused_written(&mut self, second: u32, first: u32) {
        let status = self.slots[second].status;
        self.end(first, Status::SUCCESS);
        self.finish(second, status);
    }
}
