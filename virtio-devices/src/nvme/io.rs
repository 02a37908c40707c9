//! I/O commands of the NVM command set: which goes where, and the simple ones.

use std::{rc::Rc, sync::Arc};

use block::io::{Buffers, RequestOp};
use vm_memory::Permissions;

use super::{
    Namespace, Status,
    command::Command,
    opcode::io as opcode,
    pieces::{Stream, StreamKind},
    queues::NvmeQueues,
    request::{ATTRIBUTE_DEALLOCATE, check_marks, checked_range},
    slot::{Attached, Step},
};
use crate::{MemorySource, memory::BatchMemory, stats::Op, worker::Batch};

/// FUA, in dword 12.
const FUA: u32 = 1 << 30;
/// DEAC of Write Zeroes, in dword 12.
const DEALLOCATE: u32 = 1 << 25;

impl<S: MemorySource> NvmeQueues<S> {
    /// Starts an I/O command that was just taken.
    pub(super) fn io(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) {
        let outcome = match self.fuse(index, command, guest, batch) {
            Ok(true) => self.start_io(index, command, guest, batch),
            Ok(false) => Ok(()),
            Err(status) => Err(status),
        };
        if let Err(status) = outcome {
            self.end(index, status);
        }
    }

    /// Starts a command, or the first of a pair, that was parked.
    pub(super) fn retry(
        &mut self,
        index: u32,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) {
        if let Step::FusedCompare { second } = self.slots[index].step {
            self.start_pair(index, second, guest, batch);
            return;
        }
        let command = self.slots[index].command;
        if let Err(status) = self.start_io(index, &command, guest, batch) {
            self.end(index, status);
        }
    }

    fn start_io(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        if command.psdt() == 3 {
            return Err(Status::INVALID_FIELD);
        }
        if command.opcode == opcode::FLUSH && command.nsid == u32::MAX {
            return self.flush_all(index, batch);
        }
        let (place, used) = self.use_namespace(index, command)?;
        let namespace = &used.namespace;
        self.may(namespace, command)?;
        match command.opcode {
            opcode::READ => self.read(index, place, namespace, command, guest, batch),
            opcode::WRITE => self.write(index, place, namespace, command, guest, batch),
            opcode::FLUSH => self.flush(index, place, namespace, batch),
            opcode::WRITE_ZEROES => self.write_zeroes(index, place, namespace, command, batch),
            opcode::DATASET_MANAGEMENT => {
                self.dataset_management(index, place, namespace, command, guest, batch)
            }
            opcode::COMPARE | opcode::VERIFY => {
                self.start_stream(index, place, namespace, command, guest, batch)
            }
            opcode::COPY => self.start_copy(index, place, namespace, command, guest, batch),
            opcode::WRITE_UNCORRECTABLE => self.write_uncorrectable(index, namespace, command),
            _ => self.reservation(index, namespace, command, guest),
        }
    }

    fn read(
        &mut self,
        index: u32,
        place: usize,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let (offset, len) = self.transfer(namespace, command)?;
        let slot = &mut self.slots[index];
        (slot.op, slot.bytes) = (Op::Read, len);
        check_marks(namespace, offset, len)?;
        let buckets = self.map_data(index, command, len, true, guest)?;
        if buckets {
            let stream = Stream::new(StreamKind::Scatter, offset, len);
            return self.run_stream(index, stream, batch);
        }
        let buffers = guest
            .buffers(&self.slots[index].data, Permissions::Write)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        self.push(index, place, RequestOp::Read { offset, buffers }, batch)
    }

    fn write(
        &mut self,
        index: u32,
        place: usize,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let (offset, len) = self.transfer(namespace, command)?;
        let slot = &mut self.slots[index];
        (slot.op, slot.bytes) = (Op::Write, len);
        self.map_data(index, command, len, false, guest)?;
        let buffers = guest
            .buffers(&self.slots[index].data, Permissions::Read)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        if !self.enter(index, namespace) {
            return Ok(());
        }
        let fua = command.cdw12() & FUA != 0 || self.write_through();
        let op = RequestOp::Write {
            offset,
            buffers,
            fua,
        };
        self.push(index, place, op, batch)
    }

    fn flush(
        &mut self,
        index: u32,
        place: usize,
        namespace: &Namespace,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        self.slots[index].op = Op::Flush;
        if namespace.is_read_only() {
            self.end(index, Status::SUCCESS);
            return Ok(());
        }
        self.push(index, place, RequestOp::Flush, batch)
    }

    /// Flush of all namespaces.
    fn flush_all(&mut self, index: u32, batch: &mut Batch) -> Result<(), Status> {
        self.slots[index].op = Op::Flush;
        let writable = |at: &Rc<Attached>| !at.gone.get() && !at.namespace.is_read_only();
        let places: Vec<usize> = (0..self.namespaces.len())
            .filter(|place| self.namespaces[*place].as_ref().is_some_and(writable))
            .collect();
        let sanitizing = self.core.subsystem.sanitize.is_running();
        if sanitizing {
            return Err(Status::SANITIZE_IN_PROGRESS);
        }
        // Data planes first: either all are flushed, or the command fails before any is.
        for place in &places {
            self.plane(*place, batch)?;
        }
        for place in &places {
            self.push(index, *place, RequestOp::Flush, batch)?;
        }
        if places.is_empty() {
            self.end(index, Status::SUCCESS);
        }
        Ok(())
    }

    fn write_zeroes(
        &mut self,
        index: u32,
        place: usize,
        namespace: &Namespace,
        command: &Command,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let (offset, len) = checked_range(namespace, command)?;
        self.slots[index].op = Op::WriteZeroes;
        self.slots[index].bytes = len;
        if !self.enter(index, namespace) {
            return Ok(());
        }
        if command.cdw12() & FUA != 0 || self.write_through() {
            self.slots[index].step = Step::Flush;
        }
        let op = RequestOp::WriteZeroes {
            offset,
            len,
            may_unmap: command.cdw12() & DEALLOCATE != 0,
        };
        self.push(index, place, op, batch)
    }

    fn dataset_management(
        &mut self,
        index: u32,
        place: usize,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let count = (command.cdw10() & 0xff) + 1;
        self.slots[index].op = Op::Discard;
        let bytes = self.read_data(index, command, u64::from(count) * 16, guest)?;
        let mut ranges = Vec::with_capacity(count as usize);
        for range in bytes.chunks_exact(16) {
            let blocks = u64::from(super::command::le32(range, 4));
            let slba = super::command::le64(range, 8);
            ranges.push(
                namespace
                    .range(slba, blocks)
                    .ok_or(Status::LBA_OUT_OF_RANGE)?,
            );
        }
        ranges.retain(|(_, len)| *len > 0);
        let deallocate = command.cdw11() & ATTRIBUTE_DEALLOCATE != 0
            && namespace.disk().capabilities().discard
            && !ranges.is_empty();
        if !deallocate {
            self.end(index, Status::SUCCESS);
            return Ok(());
        }
        if !self.enter(index, namespace) {
            return Ok(());
        }
        if self.write_through() {
            self.slots[index].step = Step::Flush;
        }
        self.plane(place, batch)?;
        for (offset, len) in ranges {
            self.slots[index].bytes += len;
            // A deallocated block reads as zeroes: that is what DLFEAT says.
            let op = RequestOp::WriteZeroes {
                offset,
                len,
                may_unmap: true,
            };
            self.push(index, place, op, batch)?;
        }
        Ok(())
    }

    fn write_uncorrectable(
        &mut self,
        index: u32,
        namespace: &Arc<Namespace>,
        command: &Command,
    ) -> Result<(), Status> {
        if !namespace.has_sidecar() {
            return Err(Status::INVALID_OPCODE);
        }
        let (offset, len) = checked_range(namespace, command)?;
        if !self.enter(index, namespace) {
            return Ok(());
        }
        if !namespace.mark(|marks| marks.mark(offset, len)) {
            return Err(Status::CAPACITY_EXCEEDED);
        }
        self.persist(index, namespace);
        Ok(())
    }

    /// What a command does after its first block requests.
    pub(super) fn advance(
        &mut self,
        index: u32,
        step: Step,
        buffers: Option<Buffers>,
        batch: &mut Batch,
    ) {
        let status = self.slots[index].status;
        match step {
            Step::Flush if status.is_success() => {
                self.push_more(index, RequestOp::Flush, batch);
            }
            Step::Stream(stream) => self.next_chunk(index, stream, buffers, batch),
            Step::Copy(copy) => self.next_copy(index, copy, buffers, batch),
            Step::FusedCompare { second } => self.fused_compare(index, second, buffers, batch),
            Step::FusedWrite { first } => self.fused_written(index, first),
            _ => self.finish(index, status),
        }
    }
}
