//! Moves requests from the line to a queue, and answers back: what the thread of a disk and the task
//! of a runtime have in common.

use std::{sync::Arc, task::Waker};

use super::line::{Line, Ticket};
use crate::{
    AsyncDiskFile,
    disk::describe,
    io::{AsyncIo, Completion, Key, Request, Slab},
};

/// The id of the watch that wakes the thread of a disk.
pub(super) const BELL: u64 = u64::MAX;

/// A queue and the requests it serves. Dropped, it waits for what is in flight and fails what is
/// not answered.
pub(super) struct Pump {
    /// `None` only while this is dropped.
    io: Option<Box<dyn AsyncIo>>,
    disk: Box<dyn AsyncDiskFile>,
    line: Arc<Line>,
    /// Requests given to the queue, and those in `batch`.
    started: Slab<Arc<Ticket>>,
    batch: Vec<Request>,
    tickets: Vec<Arc<Ticket>>,
    completions: Vec<Completion>,
    bell: bool,
}

impl Pump {
    pub(super) fn new(io: Box<dyn AsyncIo>, disk: Box<dyn AsyncDiskFile>, line: Arc<Line>) -> Self {
        Self {
            io: Some(io),
            disk,
            line,
            started: Slab::default(),
            batch: Vec::new(),
            tickets: Vec::new(),
            completions: Vec::new(),
            bell: false,
        }
    }

    /// The queue.
    pub(super) fn io(&mut self) -> &mut dyn AsyncIo {
        self.io.as_deref_mut().expect("the queue exists until drop")
    }

    fn room(&mut self) -> usize {
        let started = self.started.len();
        self.io().capacity().saturating_sub(started)
    }

    /// Has `waker` called when there is more to start; `false` when there is already. Without room
    /// only a completion can change anything, and the queue's notifier tells of that.
    pub(super) fn sleep(&mut self, waker: &Waker) -> bool {
        self.room() == 0 || self.line.sleep(waker, self.started.len() > 0)
    }

    /// Nobody sleeps any more.
    pub(super) fn awake(&self) {
        self.line.awake();
    }

    /// Whether nothing is in flight or in line, and nothing will be.
    pub(super) fn is_finished(&self) -> bool {
        self.started.len() == 0 && self.line.is_over()
    }

    /// Whether the watch fired since the last call.
    pub(super) fn take_bell(&mut self) -> bool {
        std::mem::take(&mut self.bell)
    }

    /// Starts what waits in line, all of it with one submission, and answers what has ended; returns
    /// whether there was anything.
    pub(super) fn advance(&mut self) -> bool {
        let room = self.room();
        let mut tickets = std::mem::take(&mut self.tickets);
        if room > 0 {
            self.line.take(room, &mut tickets);
        }
        let mut progress = !tickets.is_empty();
        for ticket in tickets.drain(..) {
            if let Some(op) = ticket.take_op() {
                let id = self.started.insert(ticket).to_u64();
                self.batch.push(Request { id, op });
            }
        }
        self.tickets = tickets;
        let mut batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.io().submit(&mut batch);
        }
        self.batch = batch;

        let mut completions = std::mem::take(&mut self.completions);
        progress |= self.io().reap(&mut completions) > 0;
        for completion in completions.drain(..) {
            self.answer(completion);
        }
        self.completions = completions;
        progress
    }

    fn answer(&mut self, completion: Completion) {
        if completion.id == BELL {
            self.bell = true;
            return;
        }
        let Some(ticket) = self.started.remove(Key::from_u64(completion.id)) else {
            debug_assert!(false, "a request ended twice");
            return;
        };
        // The future takes its buffer back as soon as it is woken.
        drop(completion.buffers);
        let result = completion.result.map_err(|kind| {
            describe(kind, ticket.summary, self.disk.size()).path(self.disk.path())
        });
        ticket.end(result);
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.line.close();
        // This waits for what is in flight: no buffer is in use afterwards.
        self.io = None;
        self.batch.clear();
        self.completions.clear();
        let mut left = std::mem::take(&mut self.tickets);
        self.line.take(usize::MAX, &mut left);
        left.extend(self.started.drain());
        for ticket in left {
            drop(ticket.take_op());
            ticket.end(Err(self.line.cancelled(ticket.summary)));
        }
    }
}
