//! The admin command set: dispatch, queues, event requests, shadow doorbells.

use std::sync::{PoisonError, atomic::Ordering};

use super::{
    Status,
    command::Command,
    core::{Mail, NewCq, NewSq, Queue},
    doorbell::Shadow,
    events::MAX_REQUESTS,
    namespace::flag,
    opcode::admin as opcode,
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
    registers::MAX_ENTRIES,
    slot::Step,
};
use crate::{MemorySource, memory::BatchMemory};

impl<S: MemorySource> NvmeQueues<S> {
    /// Executes an admin command.
    pub(super) fn admin(&mut self, index: u32, guest: &mut BatchMemory<'_, S::M>) {
        let command = self.slots[index].command;
        match self.start_admin(index, &command, guest) {
            Ok(Outcome::Done(dw0)) => {
                self.slots[index].dw0 = dw0;
                self.end(index, Status::SUCCESS);
            }
            Ok(Outcome::Later) => self.slots[index].step = Step::Outside,
            Err(status) => self.end(index, status),
        }
    }

    fn start_admin(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        if command.fuse() != 0 || command.psdt() != 0 {
            // No fused admin commands, and no SGLs on the admin queue.
            return Err(Status::INVALID_FIELD);
        }
        let sanitize = &self.core.subsystem.sanitize;
        if sanitize.is_running() && !allowed_while_sanitizing(command.opcode) {
            return Err(Status::SANITIZE_IN_PROGRESS);
        }
        if sanitize.has_failed() && command.opcode == opcode::FORMAT_NVM {
            return Err(Status::SANITIZE_FAILED);
        }
        match command.opcode {
            opcode::DELETE_SQ => self.delete_sq(index, command),
            opcode::CREATE_SQ => self.create_sq(command),
            opcode::DELETE_CQ => self.delete_cq(index, command),
            opcode::CREATE_CQ => self.create_cq(command),
            opcode::GET_LOG_PAGE => self.get_log_page(index, command, guest),
            opcode::IDENTIFY => self.identify(index, command, guest),
            opcode::ABORT => self.abort(index, command),
            opcode::SET_FEATURES => self.set_features(index, command, guest),
            opcode::GET_FEATURES => self.get_features(index, command, guest),
            opcode::ASYNC_EVENT_REQUEST => self.event_request(index),
            opcode::NAMESPACE_MANAGEMENT if self.core.subsystem.config().pool.is_some() => {
                self.namespace_management(index, command, guest)
            }
            opcode::NAMESPACE_ATTACHMENT if self.core.subsystem.config().pool.is_some() => {
                self.namespace_attachment(index, command, guest)
            }
            opcode::DOORBELL_BUFFER_CONFIG => self.doorbell_buffer_config(command, guest),
            opcode::FORMAT_NVM => self.format_nvm(index, command),
            opcode::SANITIZE => self.sanitize(index, command),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    fn create_cq(&mut self, command: &Command) -> Answer {
        let id = command.cdw10() as u16;
        let size = (command.cdw10() >> 16) + 1;
        let flags = command.cdw11();
        let vector = (flags >> 16) as u16;
        let (page, sizes) = {
            let registers = self.core.registers();
            (registers.page(), registers.entry_sizes())
        };
        let queues = self.core.queues();
        if id == 0 || queues.cqs.get(usize::from(id)).is_none_or(Option::is_some) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        drop(queues);
        if !(2..=MAX_ENTRIES).contains(&size) || sizes.1 != 4 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if flags & 1 == 0 {
            // CAP.CQR: only contiguous queues.
            return Err(Status::INVALID_FIELD);
        }
        let base = command.dptr[0];
        if !base.is_multiple_of(page) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let interrupts = flags & 2 != 0;
        if interrupts && vector >= self.core.config.vectors {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        let new = NewCq {
            id,
            base,
            size,
            vector: interrupts.then_some(vector),
            tail: 0,
            phase: true,
        };
        let worker = self.core.worker_of(id);
        self.core.queues().cqs[usize::from(id)] = Some(Queue {
            new: new.clone(),
            closing: false,
        });
        self.core.doorbells.open_cq(id, size, worker, 0);
        self.core.ports[worker].send(Mail::CreateCq(new));
        Ok(Outcome::Done(0))
    }

    fn create_sq(&mut self, command: &Command) -> Answer {
        let id = command.cdw10() as u16;
        let size = (command.cdw10() >> 16) + 1;
        let flags = command.cdw11();
        let cq = (flags >> 16) as u16;
        let (page, sizes) = {
            let registers = self.core.registers();
            (registers.page(), registers.entry_sizes())
        };
        let queues = self.core.queues();
        if id == 0 || queues.sqs.get(usize::from(id)).is_none_or(Option::is_some) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        match queues.cqs.get(usize::from(cq)) {
            Some(Some(queue)) if !queue.closing => {}
            None => return Err(Status::INVALID_QUEUE_ID),
            Some(_) if cq == 0 => return Err(Status::INVALID_QUEUE_ID),
            Some(_) => return Err(Status::COMPLETION_QUEUE_INVALID),
        }
        drop(queues);
        if !(2..=MAX_ENTRIES).contains(&size) || sizes.0 != 6 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if flags & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let base = command.dptr[0];
        if !base.is_multiple_of(page) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let new = NewSq {
            id,
            base,
            size,
            cq,
            head: 0,
        };
        let worker = self.core.worker_of(cq);
        self.core.queues().sqs[usize::from(id)] = Some(Queue {
            new: new.clone(),
            closing: false,
        });
        self.core.doorbells.open_sq(id, size, worker, 0);
        self.core.ports[worker].send(Mail::CreateSq(new));
        Ok(Outcome::Done(0))
    }

    pub(super) fn delete_sq(&mut self, index: u32, command: &Command) -> Answer {
        let id = command.cdw10() as u16;
        let cq = {
            let mut queues = self.core.queues();
            match queues.sqs.get_mut(usize::from(id)) {
                Some(Some(queue)) if !queue.closing && id != 0 => {
                    queue.closing = true;
                    queue.new.cq
                }
                _ => return Err(Status::INVALID_QUEUE_ID),
            }
        };
        self.core.doorbells.close_sq(id);
        let token = self.slots.id(index);
        let worker = self.core.worker_of(cq);
        self.core.ports[worker].send(Mail::DeleteSq { id, token });
        Ok(Outcome::Later)
    }

    fn delete_cq(&mut self, index: u32, command: &Command) -> Answer {
        let id = command.cdw10() as u16;
        {
            let mut queues = self.core.queues();
            let used = queues.sqs.iter().flatten().any(|sq| sq.new.cq == id);
            match queues.cqs.get_mut(usize::from(id)) {
                Some(Some(queue)) if !queue.closing && id != 0 => {
                    if used {
                        return Err(Status::INVALID_QUEUE_DELETION);
                    }
                    queue.closing = true;
                }
                _ => return Err(Status::INVALID_QUEUE_ID),
            }
        }
        self.core.doorbells.close_cq(id);
        let token = self.slots.id(index);
        let worker = self.core.worker_of(id);
        self.core.ports[worker].send(Mail::DeleteCq { id, token });
        Ok(Outcome::Later)
    }

    /// A worker has let a queue go: the identifier is free again.
    pub(super) fn queue_deleted(&mut self, index: u32) {
        let command = self.slots[index].command;
        let id = usize::from(command.cdw10() as u16);
        let mut queues = self.core.queues();
        match command.opcode {
            opcode::DELETE_SQ => {
                if let Some(place) = queues.sqs.get_mut(id) {
                    *place = None;
                }
            }
            opcode::DELETE_CQ => {
                if let Some(place) = queues.cqs.get_mut(id) {
                    *place = None;
                }
            }
            _ => {}
        }
    }

    /// The admin commands that may have to wait until the host takes completions of an I/O queue.
    pub(super) fn waiting_for_host(&self) -> impl Iterator<Item = Command> + '_ {
        let busy = self.slots.iter().filter(|_| self.is_admin());
        let waiting = busy.filter(|slot| matches!(slot.step, Step::Outside) && !slot.ended);
        waiting
            .map(|slot| slot.command)
            .filter(|command| matches!(command.opcode, opcode::ABORT | opcode::DELETE_SQ))
    }

    fn event_request(&mut self, index: u32) -> Answer {
        if self.event_requests.len() >= MAX_REQUESTS {
            return Err(Status::AER_LIMIT_EXCEEDED);
        }
        self.event_requests.push_back(index);
        // Something may have happened before.
        self.core.hot.events.store(true, Ordering::SeqCst);
        Ok(Outcome::Later)
    }

    fn doorbell_buffer_config(
        &mut self,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let page = self.page();
        let [doorbells, event_index] = command.dptr;
        if !doorbells.is_multiple_of(page) || !event_index.is_multiple_of(page) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let mut byte = [0; 1];
        for start in [doorbells, event_index] {
            for at in [Some(start), start.checked_add(page - 1)] {
                let at = at.ok_or(Status::INVALID_FIELD)?;
                super::prp::read(&**guest.memory, &mut byte, at)
                    .map_err(|_| Status::INVALID_FIELD)?;
            }
        }
        // What the host has rung so far is where the shadow starts.
        let shadow = Shadow {
            doorbells,
            event_index,
        };
        let existing: Vec<u16> = {
            let queues = self.core.queues();
            let used = |id: &usize| queues.sqs[*id].is_some() || queues.cqs[*id].is_some();
            (1..queues.sqs.len())
                .filter(used)
                .map(|id| id as u16)
                .collect()
        };
        for id in existing.into_iter().chain([0]) {
            let (tail, _) = shadow.at(id, false);
            let (head, _) = shadow.at(id, true);
            super::shadow::store(&mut guest.control, tail, self.core.doorbells.tail(id));
            super::shadow::store(&mut guest.control, head, self.core.doorbells.head(id));
        }
        *self
            .core
            .shadow
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(shadow);
        self.core.hot.shadow_version.fetch_add(1, Ordering::SeqCst);
        for port in &self.core.ports {
            port.kick();
        }
        Ok(Outcome::Done(0))
    }

    /// Whether a namespace is being formatted.
    pub(super) fn is_formatting(namespace: &super::Namespace) -> bool {
        namespace.flags() & flag::FORMATTING != 0
    }
}

/// Base specification 2.0, figure 490: what goes on while a sanitize operation runs.
fn allowed_while_sanitizing(code: u8) -> bool {
    matches!(
        code,
        opcode::DELETE_SQ
            | opcode::CREATE_SQ
            | opcode::DELETE_CQ
            | opcode::CREATE_CQ
            | opcode::GET_LOG_PAGE
            | opcode::IDENTIFY
            | opcode::ABORT
            | opcode::SET_FEATURES
            | opcode::GET_FEATURES
            | opcode::ASYNC_EVENT_REQUEST
            | opcode::DOORBELL_BUFFER_CONFIG
    )
    // Sanitize itself gets the same status as all others.
}
