//! I/O commands of the NVM command set: checks, and the block requests of the simple ones.

use std::sync::{Arc, atomic::Ordering};

use block::io::{Buffers, RequestOp};
use vm_memory::Permissions;

use super::{
    Namespace, Status,
    command::Command,
    core::Mail,
    front::NvmeQueues,
    namespace::flag,
    prp,
    reservation::Access,
    sgl,
    slot::Step,
    stream::{Stream, StreamKind},
};
use crate::{MemorySource, memory::BatchMemory, stats::Op, worker::Batch};

pub(super) mod opcode {
    pub(in crate::nvme) const FLUSH: u8 = 0x00;
    pub(in crate::nvme) const WRITE: u8 = 0x01;
    pub(in crate::nvme) const READ: u8 = 0x02;
    pub(in crate::nvme) const WRITE_UNCORRECTABLE: u8 = 0x04;
    pub(in crate::nvme) const COMPARE: u8 = 0x05;
    pub(in crate::nvme) const WRITE_ZEROES: u8 = 0x08;
    pub(in crate::nvme) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(in crate::nvme) const VERIFY: u8 = 0x0c;
    pub(in crate::nvme) const RESERVATION_REGISTER: u8 = 0x0d;
    pub(in crate::nvme) const RESERVATION_REPORT: u8 = 0x0e;
    pub(in crate::nvme) const RESERVATION_ACQUIRE: u8 = 0x11;
    pub(in crate::nvme) const RESERVATION_RELEASE: u8 = 0x15;
    pub(in crate::nvme) const COPY: u8 = 0x19;
}

/// FUA, in dword 12.
const FUA: u32 = 1 << 30;
/// DEAC of Write Zeroes, in dword 12.
const DEALLOCATE: u32 = 1 << 25;
/// PRACT of the protection information, in dword 12: there is none.
const PRACT: u32 = 1 << 29;

/// AD of Dataset Management, in dword 11.
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;

/// What a command does to a namespace, for the checks that all share.
fn access(command: &Command) -> Option<Access> {
    match command.opcode {
        // A flush changes nothing that a reservation protects from reading hosts.
        opcode::FLUSH
        | opcode::WRITE
        | opcode::WRITE_ZEROES
        | opcode::WRITE_UNCORRECTABLE
        | opcode::COPY => Some(Access::Write),
        opcode::DATASET_MANAGEMENT if command.cdw11() & ATTRIBUTE_DEALLOCATE != 0 => {
            Some(Access::Write)
        }
        opcode::READ | opcode::COMPARE | opcode::VERIFY | opcode::DATASET_MANAGEMENT => {
            Some(Access::Read)
        }
        _ => None,
    }
}

impl<S: MemorySource> NvmeQueues<S> {
    /// Starts an I/O command that was just taken.
    pub(super) fn io(&mut self, index: u32, guest: &mut BatchMemory<'_, S::M>, batch: &mut Batch) {
        let command = self.slots[index].command;
        let outcome = match self.fuse(index, &command, guest, batch) {
            Ok(true) => self.start_io(index, &command, guest, batch),
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
        let (place, namespace) = self.use_namespace(index, command)?;
        self.may(&namespace, command)?;
        match command.opcode {
            opcode::READ => self.read(index, place, &namespace, command, guest, batch),
            opcode::WRITE => self.write(index, place, &namespace, command, guest, batch),
            opcode::FLUSH => self.flush(index, place, &namespace, batch),
            opcode::WRITE_ZEROES => self.write_zeroes(index, place, &namespace, command, batch),
            opcode::DATASET_MANAGEMENT => {
                self.dataset_management(index, place, &namespace, command, guest, batch)
            }
            opcode::COMPARE | opcode::VERIFY => {
                self.start_stream(index, place, &namespace, command, guest, batch)
            }
            opcode::COPY => self.start_copy(index, place, &namespace, command, guest, batch),
            opcode::WRITE_UNCORRECTABLE => self.write_uncorrectable(index, &namespace, command),
            _ => self.reservation(index, &namespace, command, guest),
        }
    }

    /// The namespace of a command.
    pub(super) fn use_namespace(
        &mut self,
        index: u32,
        command: &Command,
    ) -> Result<(usize, Arc<Namespace>), Status> {
        let known = access(command).is_some()
            || matches!(
                command.opcode,
                opcode::RESERVATION_REGISTER
                    | opcode::RESERVATION_REPORT
                    | opcode::RESERVATION_ACQUIRE
                    | opcode::RESERVATION_RELEASE
            );
        if !known {
            return Err(Status::INVALID_OPCODE);
        }
        if command.nsid == 0 || command.nsid > super::subsystem::MAX_NAMESPACES {
            return Err(Status::INVALID_NAMESPACE);
        }
        // An identifier that is not active here is a field like any other.
        self.attach(index, command.nsid)
            .ok_or(Status::INVALID_FIELD)
    }

    /// The state of the namespace, or a reservation, may forbid a command.
    pub(super) fn may(&self, namespace: &Namespace, command: &Command) -> Result<(), Status> {
        let flags = namespace.flags();
        let sanitize = &self.core.subsystem.sanitize;
        if flags == 0 && !sanitize.has_failed() {
            return Ok(());
        }
        let access = access(command);
        if flags & flag::SANITIZING != 0 {
            return Err(Status::SANITIZE_IN_PROGRESS);
        }
        if sanitize.has_failed() {
            return Err(Status::SANITIZE_FAILED);
        }
        if flags & flag::FORMATTING != 0 {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if flags & flag::GONE != 0 {
            return Err(Status::INVALID_NAMESPACE);
        }
        if flags & flag::READ_ONLY != 0
            && access == Some(Access::Write)
            && command.opcode != opcode::FLUSH
        {
            return Err(Status::NAMESPACE_WRITE_PROTECTED);
        }
        if flags & flag::RESERVED != 0
            && let Some(access) = access
            && !namespace
                .reservations()
                .allows(self.core.host_id().0, access)
        {
            return Err(Status::RESERVATION_CONFLICT);
        }
        Ok(())
    }

    /// Counts a write at the gate of its namespace. `false`: it was parked and is tried again.
    pub(super) fn enter(&mut self, index: u32, namespace: &Namespace) -> bool {
        if namespace.gate.enter(self.index) {
            self.slots[index].gated = true;
            return true;
        }
        self.let_go(index);
        self.park(index);
        false
    }

    fn write_through(&self) -> bool {
        self.core.hot.write_through.load(Ordering::Relaxed)
    }

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

    /// First byte and length of a read, write or compare.
    pub(super) fn transfer(
        &self,
        namespace: &Namespace,
        command: &Command,
    ) -> Result<(u64, u64), Status> {
        let (offset, len) = checked_range(namespace, command)?;
        if len > self.core.config.max_transfer() {
            return Err(Status::INVALID_FIELD);
        }
        Ok((offset, len))
    }

    fn push(
        &mut self,
        index: u32,
        place: usize,
        op: RequestOp,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let plane = self.plane(place, batch)?;
        let id = self.slots.id(index);
        if !batch.push_to(plane, id, op) {
            return Err(Status::INTERNAL_ERROR);
        }
        self.slots[index].pending += 1;
        Ok(())
    }

    /// Adds a block request of a command in flight; a failure ends it.
    pub(super) fn push_more(&mut self, index: u32, op: RequestOp, batch: &mut Batch) {
        let result = match self.slots[index].namespace {
            Some(place) => self.push(index, place, op, batch),
            None => Err(Status::INTERNAL_ERROR),
        };
        if let Err(status) = result {
            self.end(index, status);
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
        self.slots[index].op = Op::Read;
        self.slots[index].bytes = len;
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
        self.slots[index].op = Op::Write;
        self.slots[index].bytes = len;
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
        let writable = |at: &super::slot::Attached| !at.gone && !at.namespace.is_read_only();
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

    /// Ends a command once the sidecar of its namespace has been written.
    pub(super) fn persist(&mut self, index: u32, namespace: &Arc<Namespace>) {
        if !namespace.has_sidecar() {
            self.end(index, Status::SUCCESS);
            return;
        }
        self.slots[index].step = Step::Outside;
        let token = self.slots.id(index);
        let (core, worker) = (Arc::clone(&self.core), self.index);
        let namespace = Arc::clone(namespace);
        self.core.subsystem.jobs.run(move || {
            let status = match namespace.persist() {
                Ok(()) => Status::SUCCESS,
                Err(error) => {
                    tracing::error!(nsid = namespace.nsid(), %error, "not remembered");
                    Status::INTERNAL_ERROR
                }
            };
            core.ports[worker].send(Mail::Ended {
                token,
                status,
                dw0: 0,
            });
        });
    }

    /// The block requests of a simple command have ended.
    pub(super) fn finish(&mut self, index: u32, status: Status) {
        let slot = &self.slots[index];
        let writes = matches!(slot.op, Op::Write | Op::WriteZeroes | Op::Discard);
        if writes
            && status.is_success()
            && let Some(place) = slot.namespace
            && let Some(Some(attached)) = self.namespaces.get(place)
            && attached.namespace.flags() & flag::UNCORRECTABLE != 0
        {
            let namespace = Arc::clone(&attached.namespace);
            let command = slot.command;
            if self.clear_marks(&namespace, &command) {
                self.persist(index, &namespace);
                return;
            }
        }
        self.end(index, status);
    }

    /// A write makes blocks readable again.
    fn clear_marks(&self, namespace: &Namespace, command: &Command) -> bool {
        match command.opcode {
            opcode::WRITE | opcode::WRITE_ZEROES => namespace
                .range(command.slba(), command.blocks())
                .is_some_and(|(offset, len)| namespace.mark(|marks| marks.clear(offset, len))),
            _ => false,
        }
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

/// First byte and length of the blocks that a command names.
pub(super) fn checked_range(
    namespace: &Namespace,
    command: &Command,
) -> Result<(u64, u64), Status> {
    if command.cdw12() & PRACT != 0 {
        return Err(Status::INVALID_PROTECTION_INFORMATION);
    }
    namespace
        .range(command.slba(), command.blocks())
        .ok_or(Status::LBA_OUT_OF_RANGE)
}

/// Blocks marked uncorrectable cannot be read.
pub(super) fn check_marks(namespace: &Namespace, offset: u64, len: u64) -> Result<(), Status> {
    if namespace.flags() & flag::UNCORRECTABLE != 0
        && namespace.uncorrectable().overlaps(offset, len)
    {
        return Err(Status::UNRECOVERED_READ_ERROR);
    }
    Ok(())
}
