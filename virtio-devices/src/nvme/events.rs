//! Asynchronous events and the error log of a controller.

use std::collections::{BTreeSet, VecDeque};

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

/// An asynchronous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

/// What happened, and what the host has not been told yet.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) pending: VecDeque<Event>,
    /// Events reported whose log has not been read.
    pub(super) masked: Vec<Event>,
    pub(super) changed: BTreeSet<u32>,
    notices: VecDeque<[u8; 64]>,
    notice_count: u64,
    errors: VecDeque<[u8; 64]>,
    pub(super) error_count: u64,
}

impl Events {
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
        let mut page = [0; 64];
        put(&mut page, 0, &self.notice_count.to_le_bytes());
        page[8] = kind;
        put(&mut page, 12, &nsid.to_le_bytes());
        self.notices.push_back(page);
    }

    /// Log page 80h: the oldest notice, which is gone then.
    pub(super) fn notice_log(&mut self, take: bool) -> Vec<u8> {
        let left = self.notices.len().saturating_sub(1).min(255) as u8;
        let page = if take {
            self.notices.pop_front()
        } else {
            self.notices.front().copied()
        };
        let mut page = page.unwrap_or([0; 64]);
        page[9] = left;
        page.to_vec()
    }

    /// Whether notices are left.
    pub(super) fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// Adds an entry to the error log.
    pub(super) fn add_error(&mut self, queue: u16, command: &Command, status: Status) {
        self.error_count += 1;
        let mut entry = [0; 64];
        put(&mut entry, 0, &self.error_count.to_le_bytes());
        put(&mut entry, 8, &queue.to_le_bytes());
        put(&mut entry, 10, &command.cid.to_le_bytes());
        put(&mut entry, 12, &(status.0 << 1).to_le_bytes());
        // No byte or bit of the command is to blame in particular.
        put(&mut entry, 14, &0xffff_u16.to_le_bytes());
        if queue != 0 {
            put(&mut entry, 16, &command.slba().to_le_bytes());
        }
        put(&mut entry, 24, &command.nsid.to_le_bytes());
        self.errors.push_front(entry);
        self.errors.truncate(ERROR_ENTRIES);
    }

    /// Log page 01h: the newest entry first.
    pub(super) fn error_log(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.errors.iter().flatten().copied().collect();
        page.resize(ERROR_ENTRIES * 64, 0);
        page
    }

    /// What a controller reset forgets.
    pub(super) fn reset(&mut self) {
        self.pending.clear();
        self.masked.clear();
    }
}
