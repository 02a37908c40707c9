//! Asynchronous events and the error log of a controller.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::{Status, command::Command, command::put};

/// Entries of the error log.
pub(super) const ERROR_ENTRIES: usize = 64;
/// Outstanding Asynchronous Event Requests.
pub(super) const MAX_REQUESTS: usize = 8;
/// Entries of the reservation notification log.
const NOTICES: usize = 64;
/// The most identifiers in the changed namespace list.
pub(super) const MAX_CHANGED: usize = 1024;

/// Kind 0: error; information 0 and 1.
pub(super) const INVALID_DOORBELL: Event = Event::new(0, 0, 0x01);
pub(super) const INVALID_DOORBELL_VALUE: Event = Event::new(0, 1, 0x01);
/// Kind 1: SMART; temperature threshold.
pub(super) const TEMPERATURE: Event = Event::new(1, 1, 0x02);
/// Kind 2: notice; namespace attributes changed.
pub(super) const NAMESPACES: Event = Event::new(2, 0, 0x04);
/// Kind 6: I/O command set; a reservation notice, the end of a sanitize operation.
pub(super) const RESERVATION: Event = Event::new(6, 0, 0x80);
pub(super) const SANITIZED: Event = Event::new(6, 1, 0x81);

/// All of them.
const EVENTS: [Event; 6] = [
    INVALID_DOORBELL,
    INVALID_DOORBELL_VALUE,
    TEMPERATURE,
    NAMESPACES,
    RESERVATION,
    SANITIZED,
];

/// An asynchronous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Event {
    kind: u8,
    information: u8,
    pub(super) log: u8,
}

impl Event {
    const fn new(kind: u8, information: u8, log: u8) -> Self {
        Self {
            kind,
            information,
            log,
        }
    }

    /// Dword 0 of the completion.
    pub(super) fn dword(self) -> u32 {
        u32::from(self.kind) | u32::from(self.information) << 8 | u32::from(self.log) << 16
    }
}

/// An entry of the error log: a command that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    count: u64,
    queue: u16,
    cid: u16,
    status: u16,
    lba: u64,
    nsid: u32,
}

impl Failure {
    fn entry(&self) -> [u8; 64] {
        let mut entry = [0; 64];
        put(&mut entry, 0, &self.count.to_le_bytes());
        put(&mut entry, 8, &self.queue.to_le_bytes());
        put(&mut entry, 10, &self.cid.to_le_bytes());
        put(&mut entry, 12, &(self.status << 1).to_le_bytes());
        // No byte or bit of the command is to blame in particular.
        put(&mut entry, 14, &0xffff_u16.to_le_bytes());
        put(&mut entry, 16, &self.lba.to_le_bytes());
        put(&mut entry, 24, &self.nsid.to_le_bytes());
        entry
    }
}

/// An entry of the reservation notification log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NoticeEntry {
    count: u64,
    kind: u8,
    nsid: u32,
}

/// What happened, and what the host has not been told yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Events {
    pending: VecDeque<Event>,
    /// Events reported whose log has not been read.
    masked: Vec<Event>,
    changed: BTreeSet<u32>,
    notices: VecDeque<NoticeEntry>,
    notice_count: u64,
    /// The newest first.
    errors: VecDeque<Failure>,
    pub(super) error_count: u64,
}

impl Events {
    /// Whether a controller can have come to it: a saved state says so, which is not trusted.
    pub(super) fn is_possible(&self) -> bool {
        // Every event is there at most once.
        self.pending.len() <= EVENTS.len()
            && self.masked.len() <= EVENTS.len()
            && self
                .pending
                .iter()
                .chain(&self.masked)
                .all(|event| EVENTS.contains(event))
            && self.changed.len() <= MAX_CHANGED + 1
            && self.notices.len() <= NOTICES
            && self.errors.len() <= ERROR_ENTRIES
    }

    /// Adds an event; one that waits already is not added again.
    pub(super) fn add(&mut self, event: Event) {
        if !self.pending.contains(&event) {
            self.pending.push_back(event);
        }
    }

    /// The next event that may be reported; it is masked then until its log is read.
    pub(super) fn next(&mut self) -> Option<Event> {
        let may = |event: &Event| !self.masked.iter().any(|masked| masked.kind == event.kind);
        let at = self.pending.iter().position(may)?;
        let event = self.pending.remove(at)?;
        self.masked.push(event);
        Some(event)
    }

    /// The host has read a log without asking to keep its event.
    pub(super) fn log_read(&mut self, log: u8) {
        self.masked.retain(|event| event.log != log);
    }

    pub(super) fn add_changed(&mut self, nsid: u32) {
        // One more than fits says "too many".
        if self.changed.len() <= MAX_CHANGED {
            self.changed.insert(nsid);
        }
    }

    /// Log page 04h; reading it clears the list.
    pub(super) fn changed_log(&mut self, clear: bool) -> Vec<u8> {
        let mut page = vec![0; 4096];
        if self.changed.len() > MAX_CHANGED {
            put(&mut page, 0, &u32::MAX.to_le_bytes());
        } else {
            for (at, nsid) in self.changed.iter().enumerate() {
                put(&mut page, at * 4, &nsid.to_le_bytes());
            }
        }
        if clear {
            self.changed.clear();
        }
        page
    }

    /// Adds a reservation notice: 1 registration preempted, 2 released, 3 reservation preempted.
    pub(super) fn add_notice(&mut self, nsid: u32, kind: u8) {
        if self.notices.len() >= NOTICES {
            self.notices.pop_front();
        }
        self.notice_count = self.notice_count.wrapping_add(1).max(1);
        self.notices.push_back(NoticeEntry {
            count: self.notice_count,
            kind,
            nsid,
        });
    }

    /// Log page 80h: the oldest notice, which is gone then.
    pub(super) fn notice_log(&mut self, take: bool) -> Vec<u8> {
        let left = self.notices.len().saturating_sub(1).min(255) as u8;
        let mut page = vec![0; 64];
        page[9] = left;
        let oldest = if take {
            self.notices.pop_front()
        } else {
            self.notices.front().cloned()
        };
        if let Some(notice) = oldest {
            put(&mut page, 0, &notice.count.to_le_bytes());
            page[8] = notice.kind;
            put(&mut page, 12, &notice.nsid.to_le_bytes());
        }
        page
    }

    /// Whether notices are left.
    pub(super) fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// Adds an entry to the error log.
    pub(super) fn add_error(&mut self, queue: u16, command: &Command, status: Status) {
        self.error_count = self.error_count.wrapping_add(1).max(1);
        self.errors.push_front(Failure {
            count: self.error_count,
            queue,
            cid: command.cid,
            status: status.0,
            lba: if queue == 0 { 0 } else { command.slba() },
            nsid: command.nsid,
        });
        self.errors.truncate(ERROR_ENTRIES);
    }

    /// Log page 01h: the newest entry first.
    pub(super) fn error_log(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.errors.iter().flat_map(Failure::entry).collect();
        page.resize(ERROR_ENTRIES * 64, 0);
        page
    }

    /// What a controller reset forgets.
    pub(super) fn reset(&mut self) {
        self.pending.clear();
        self.masked.clear();
    }
}
