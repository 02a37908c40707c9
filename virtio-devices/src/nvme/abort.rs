//! Abort (base specification 2.0, 5.1). The worker of a queue looks for the command and ends it, if
//! the disk does not have it yet: it may still be in the submission queue, wait at the gate of its
//! namespace or for the other half of its pair, or for room at the disk. The Abort ends when the
//! completion of what it aborted has been posted (5.1.1).

use std::sync::Arc;

use super::{
    Status,
    command::Command,
    core::{AbortReply, Mail},
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
    slot::Step,
};
use crate::{
    MemorySource,
    memory::{QueueMemory, Window},
    worker::Batch,
};

/// Dword 0 of an Abort: bit 0 says that the command was not aborted.
fn dword(aborted: bool) -> u32 {
    u32::from(!aborted)
}

impl<S: MemorySource> NvmeQueues<S> {
    /// The Abort command itself.
    pub(super) fn abort(&mut self, index: u32, command: &Command) -> Answer {
        let queue = command.cdw10() as u16;
        let cid = (command.cdw10() >> 16) as u16;
        if queue == 0 {
            return Ok(Outcome::Done(dword(self.abort_event_request(cid))));
        }
        let cq = match self.core.queues().sqs.get(usize::from(queue)) {
            Some(Some(sq)) => sq.new.cq,
            _ => return Ok(Outcome::Done(dword(false))),
        };
        let token = self.slots.id(index);
        let worker = self.core.worker_of(cq);
        self.core.ports[worker].send(Mail::Abort { queue, cid, token });
        Ok(Outcome::Later)
    }

    /// Of admin commands an event request can be aborted; the others end by themselves.
    fn abort_event_request(&mut self, cid: u16) -> bool {
        let at = self
            .event_requests
            .iter()
            .position(|request| self.slots[*request].command.cid == cid);
        let Some(request) = at.and_then(|at| self.event_requests.remove(at)) else {
            return false;
        };
        self.end(request, Status::ABORT_REQUESTED);
        true
    }

    /// Aborts a command of a queue of this worker, if that can be.
    pub(super) fn abort_io(&mut self, queue: u16, cid: u16, token: u64, batch: &mut Batch) {
        if self.resetting {
            // The reset ends the Abort as well.
            return;
        }
        let target = match self.slots.in_flight(queue, cid) {
            Some(index) => Some(index).filter(|_| self.abort_taken(index, batch)),
            None => self.abort_waiting(queue, cid),
        };
        let aborted = target.map(|index| self.slots.id(index));
        self.abort_replies.push(AbortReply { token, aborted });
    }

    /// Sends what came of Aborts, except of those whose commands wait to be posted.
    pub(super) fn reply_to_aborts(&mut self) {
        let (slots, core) = (&self.slots, &self.core);
        self.abort_replies.retain(|reply| {
            let waits = reply.aborted.is_some_and(|id| slots.find(id).is_some());
            if !waits {
                core.ports[0].send(Mail::Ended {
                    token: reply.token,
                    status: Status::SUCCESS,
                    dw0: dword(reply.aborted.is_some()),
                });
            }
            waits
        });
    }

    /// A command that was taken: it ends unless the disk, or a thread for host work, has it.
    fn abort_taken(&mut self, target: u32, batch: &mut Batch) -> bool {
        if self.slots[target].ended {
            // By another Abort, or by one before a restore; it only waits to be posted.
            return self.slots[target].status == Status::ABORT_REQUESTED;
        }
        let queue = usize::from(self.slots[target].queue);
        if let Some(Some(sq)) = self.sqs.get_mut(queue)
            && sq.fused == Some(target)
        {
            // Its second half will find that the first is missing.
            sq.fused = None;
            self.end(target, Status::ABORT_REQUESTED);
            return true;
        }
        // The second of a pair has nothing of its own until the first has compared.
        let holder = match self.slots[target].step {
            Step::FusedWait => match self.slots.first_of(target) {
                Some(first) => first,
                None => return false,
            },
            _ => target,
        };
        if let Some(at) = self.parked.iter().position(|parked| *parked == holder) {
            self.parked.remove(at);
        } else if !self.take_back(holder, batch) {
            return false;
        }
        match self.slots[holder].step {
            Step::FusedCompare { second } => {
                let of = |index| {
                    if index == target {
                        Status::ABORT_REQUESTED
                    } else {
                        Status::ABORTED_FAILED_FUSED
                    }
                };
                self.end_pair(holder, of(holder), second, of(second));
            }
            Step::FusedWrite { first } => {
                self.end_pair(first, Status::SUCCESS, target, Status::ABORT_REQUESTED);
            }
            _ => self.end(target, Status::ABORT_REQUESTED),
        }
        true
    }

    /// Takes the block requests of a command back, if none of them has been submitted.
    fn take_back(&mut self, index: u32, batch: &mut Batch) -> bool {
        let pending = self.slots[index].pending;
        if pending == 0 || !batch.take_back(self.slots.id(index), pending as usize) {
            return false;
        }
        self.slots[index].pending = 0;
        true
    }

    /// A command that was not taken: it ends now, and its entry is stepped over later.
    fn abort_waiting(&mut self, queue: u16, cid: u16) -> Option<u32> {
        if !self.core.may_access() {
            return None;
        }
        let memory = Arc::clone(&self.memory);
        let mut window: Window<'_, QueueMemory<S::M>> = Window::new(&*memory, self.control_from);
        let tail = self.tail(queue, &mut window);
        let sq = self.sqs.get_mut(usize::from(queue))?.as_mut()?;
        if sq.is_stopped() {
            return None;
        }
        let (at, command) = sq.ring.find(cid, tail, &sq.aborted, &mut window)?;
        sq.aborted.push(at);
        self.step_over(queue);
        let now = self.now();
        let index = self.begin(queue, command, now);
        self.end(index, Status::ABORT_REQUESTED);
        Some(index)
    }
}
