//! What I/O commands share: checks, block requests, and how they end.

use std::{
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use block::io::RequestOp;

use super::{
    Namespace, Status,
    command::Command,
    core::Mail,
    namespace::flag,
    opcode::io as opcode,
    queues::NvmeQueues,
    reservation::Access,
    slot::{Attached, Step},
};
use crate::{MemorySource, stats::Op, worker::Batch};

/// PRACT of the protection information, in dword 12: there is none.
const PRACT: u32 = 1 << 29;

/// AD of Dataset Management, in dword 11.
pub(super) const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;

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

/// Whether there is such an I/O command.
fn is_known(opcode: u8) -> bool {
    matches!(
        opcode,
        opcode::FLUSH
            | opcode::WRITE
            | opcode::READ
            | opcode::WRITE_UNCORRECTABLE
            | opcode::COMPARE
            | opcode::WRITE_ZEROES
            | opcode::DATASET_MANAGEMENT
            | opcode::VERIFY
            | opcode::RESERVATION_REGISTER
            | opcode::RESERVATION_REPORT
            | opcode::RESERVATION_ACQUIRE
            | opcode::RESERVATION_RELEASE
            | opcode::COPY
    )
}

impl<S: MemorySource> NvmeQueues<S> {
    /// The namespace of a command.
    #[inline]
    pub(super) fn use_namespace(
        &mut self,
        index: u32,
        command: &Command,
    ) -> Result<(usize, Rc<Attached>), Status> {
        if !is_known(command.opcode) {
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
    #[inline]
    pub(super) fn may(&self, namespace: &Namespace, command: &Command) -> Result<(), Status> {
        let flags = namespace.flags();
        if flags == 0 && !self.core.subsystem.sanitize.has_failed() {
            return Ok(());
        }
        self.may_with(flags, namespace, command)
    }

    /// [`may`](Self::may), where something is out of the ordinary.
    fn may_with(&self, flags: u32, namespace: &Namespace, command: &Command) -> Result<(), Status> {
        let sanitize = &self.core.subsystem.sanitize;
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

    pub(super) fn write_through(&self) -> bool {
        self.core.hot.write_through.load(Ordering::Relaxed)
    }

    /// First byte and length of a read, write or compare.
    #[inline]
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

    #[inline]
    pub(super) fn push(
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
    #[inline]
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
}

/// First byte and length of the blocks that a command names.
#[inline]
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
#[inline]
pub(super) fn check_marks(namespace: &Namespace, offset: u64, len: u64) -> Result<(), Status> {
    if namespace.flags() & flag::UNCORRECTABLE != 0
        && namespace.uncorrectable().overlaps(offset, len)
    {
        return Err(Status::UNRECOVERED_READ_ERROR);
    }
    Ok(())
}
