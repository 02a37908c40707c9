//! What a simulated file holds, and what of it survives a power cut.
//!
//! A file has its visible content, its durable content, and a log of the changes between the two, in
//! the order in which they took effect. Data changes hold whole sectors as they were right after
//! the change, as a disk is given them. A sync makes a prefix of the log durable.
//!
//! After a power cut a file is its durable content plus, of the logged changes in their order, any
//! sectors and a prefix of the changes of length: data reaches a disk in any order, the length goes
//! through the file system's journal. A sector that is part of the new length but did not arrive
//! reads as zeroes, or as what it was.

use super::content::{Content, Rng};

/// A change that is perhaps not durable.
#[derive(Clone, Debug)]
enum Change {
    /// Whole sectors (the last may end with the file), and the new length if the file grew.
    Data {
        offset: u64,
        bytes: Vec<u8>,
        grown: Option<u64>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Length(u64),
}

impl Change {
    fn length(&self) -> Option<u64> {
        match self {
            Change::Data { grown, .. } => *grown,
            Change::Zero { .. } => None,
            Change::Length(len) => Some(*len),
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    number: u64,
    durable: bool,
    change: Change,
}

/// A change of data by an operation in flight.
#[derive(Clone, Debug)]
pub(super) enum Unfinished {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
    Extend(u64),
}

/// The state of a simulated file.
#[derive(Clone, Debug)]
pub(super) struct FileState {
    pub(super) current: Content,
    pub(super) durable: Content,
    log: Vec<Entry>,
    next: u64,
    sector: u64,
}

impl FileState {
    /// A file whose content is durable.
    pub(super) fn new(content: Content, sector: u64) -> Self {
        Self {
            durable: content.clone(),
            current: content,
            log: Vec::new(),
            next: 0,
            sector: sector.max(1),
        }
    }

    fn push(&mut self, change: Change, durable: bool) {
        self.log.push(Entry {
            number: self.next,
            durable,
            change,
        });
        self.next += 1;
        self.fold();
    }

    /// Takes what is durable from the start of the log.
    fn fold(&mut self) {
        let count = self.log.iter().take_while(|entry| entry.durable).count();
        for entry in self.log.drain(..count) {
            match entry.change {
                Change::Data { offset, bytes, .. } => self.durable.write(offset, &bytes),
                Change::Zero { offset, len } => self.durable.zero(offset, len),
                Change::Length(len) => self.durable.set_len(len),
            }
        }
    }

    /// A write took effect.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        if bytes.is_empty() {
            return;
        }
        let old = self.current.len();
        self.current.write(offset, bytes);
        let len = self.current.len();
        let start = offset - offset % self.sector;
        let end = (offset + bytes.len() as u64)
            .next_multiple_of(self.sector)
            .min(len);
        let mut sectors = vec![0; (end - start) as usize];
        self.current.read(start, &mut sectors);
        let change = Change::Data {
            offset: start,
            bytes: sectors,
            grown: (len > old).then_some(len),
        };
        self.push(change, durable);
    }

    /// A range was zeroed, inside the file.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        self.current.zero(offset, len);
        self.push(Change::Zero { offset, len }, false);
    }

    /// The length was changed.
    pub(super) fn set_len(&mut self, len: u64) {
        self.current.set_len(len);
        self.push(Change::Length(len), false);
    }

    /// Changes content behind everybody's back, durably.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        self.write(offset, bytes, true);
    }

    /// Where the log ends now: a sync that starts here covers everything before.
    pub(super) fn sync_point(&self) -> u64 {
        self.next
    }

    /// Changes that a power cut may take away.
    pub(super) fn unsynced(&self) -> usize {
        self.log.iter().filter(|entry| !entry.durable).count()
    }

    /// A sync that started at `point` succeeded.
    pub(super) fn synced(&mut self, point: u64) {
        for entry in &mut self.log {
            entry.durable |= entry.number < point;
        }
        self.fold();
    }

    /// A sync that started at `point` failed. As on Linux, what it should have written is clean
    /// afterwards: some of it arrived, the rest is lost, and no later sync writes it.
    pub(super) fn sync_failed(&mut self, point: u64, rng: &mut Rng) {
        for entry in &mut self.log {
            if entry.durable || entry.number >= point {
                continue;
            }
            match entry.change {
                // The length stays in the journal's hands.
                Change::Length(_) => {}
                _ if rng.chance(0.5) => entry.durable = true,
                _ => {
                    entry.change = match entry.change.length() {
                        Some(len) => Change::Length(len),
                        None => Change::Zero { offset: 0, len: 0 },
                    };
                }
            }
        }
        self.fold();
    }

    fn apply(&mut self, unfinished: &Unfinished) {
        match unfinished {
            Unfinished::Write { offset, bytes } => self.write(*offset, bytes, false),
            Unfinished::Zero { offset, len } => self.zero(*offset, *len),
            Unfinished::Extend(len) => self.set_len(self.current.len().max(*len)),
        }
    }

    /// The file after a power cut with these operations in flight, in any order.
    pub(super) fn after_power_cut(&self, in_flight: &[Unfinished], rng: &mut Rng) -> Self {
        let mut late = self.clone();
        for unfinished in in_flight {
            late.apply(unfinished);
        }
        let lengths = || {
            late.log
                .iter()
                .filter(|e| e.change.length().is_some())
                .count() as u64
        };
        let forced = late
            .log
            .iter()
            .rposition(|entry| entry.durable)
            .map_or(0, |last| {
                let before = &late.log[..=last];
                before
                    .iter()
                    .filter(|e| e.change.length().is_some())
                    .count() as u64
            });
        let mut lengths_left = rng.between(forced, lengths());
        let mut content = late.durable.clone();
        let mut len = content.len();
        for entry in &late.log {
            if let Some(new) = entry.change.length()
                && lengths_left > 0
            {
                lengths_left -= 1;
                len = new;
                if matches!(entry.change, Change::Length(_)) {
                    content.set_len(len);
                }
            }
            match &entry.change {
                Change::Data { offset, bytes, .. } => {
                    let mut luck = Luck::new(entry.durable, rng);
                    for (index, sector) in bytes.chunks(self.sector as usize).enumerate() {
                        if luck.arrives(rng) {
                            content.write(offset + index as u64 * self.sector, sector);
                        }
                    }
                }
                Change::Zero { offset, len } => {
                    let mut luck = Luck::new(entry.durable, rng);
                    // Large ranges are torn in larger pieces.
                    let piece = (len / 1024).next_multiple_of(self.sector).max(self.sector);
                    let end = offset + len;
                    let mut at = *offset;
                    while at < end {
                        let next = (at + piece - at % piece).min(end);
                        if luck.arrives(rng) {
                            content.zero(at, next - at);
                        }
                        at = next;
                    }
                }
                Change::Length(_) => {}
            }
        }
        content.set_len(len);
        Self::new(content, self.sector)
    }

    /// The file after the process was killed with these operations in flight: each happened
    /// wholly, in part, or not at all. What is not durable still is not.
    pub(super) fn after_kill(&self, in_flight: &[Unfinished], rng: &mut Rng) -> Self {
        let mut after = self.clone();
        for unfinished in in_flight {
            match rng.between(0, 2) {
                0 => {}
                1 => after.apply(unfinished),
                _ => {
                    if let Unfinished::Write { offset, bytes } = unfinished {
                        let keep = rng.between(0, bytes.len() as u64 / self.sector) * self.sector;
                        after.write(*offset, &bytes[..keep as usize], false);
                    }
                }
            }
        }
        after
    }

    /// A write failed: any of its sectors may have been written.
    pub(super) fn write_failed(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let take = (self.sector - at % self.sector).min((bytes.len() - done) as u64) as usize;
            if rng.chance(0.5) {
                self.write(at, &bytes[done..done + take], false);
            }
            done += take;
        }
    }
}

/// Whether the sectors of one change arrive: all, none, or each by itself.
enum Luck {
    All,
    Nothing,
    Torn,
}

impl Luck {
    fn new(durable: bool, rng: &mut Rng) -> Self {
        if durable {
            return Luck::All;
        }
        match rng.between(0, 3) {
            0 => Luck::All,
            1 => Luck::Nothing,
            _ => Luck::Torn,
        }
    }

    fn arrives(&mut self, rng: &mut Rng) -> bool {
        match self {
            Luck::All => true,
            Luck::Nothing => false,
            Luck::Torn => rng.chance(0.5),
        }
    }
}
