//! The state that all engines of a simulation share: clock, files and operations in flight.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    SimConfig, SimFault, SimOp, SimStats,
    content::{Content, Rng},
    file_state::{FileState, Unfinished},
};
use crate::io::{FallocateMode, Segment, Segments, Token, buffers, sys::Notifier};

/// What a host writes at least, of a buffered write that it does not finish.
const WRITE_UNIT: u64 = 512;

/// An operation as it is in flight.
#[derive(Debug)]
pub(super) enum Action {
    Read {
        file: usize,
        offset: u64,
        segments: Segments,
        unit: u64,
    },
    Write {
        file: usize,
        offset: u64,
        segments: Segments,
        unit: u64,
        dsync: bool,
    },
    Sync {
        file: usize,
        point: u64,
    },
    Fallocate {
        file: usize,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    },
    /// Nothing but time; the result.
    Result(i32),
}

impl Action {
    fn target(&self) -> Option<(usize, SimOp)> {
        match self {
            Action::Read { file, .. } => Some((*file, SimOp::Read)),
            Action::Write { file, .. } => Some((*file, SimOp::Write)),
            Action::Sync { file, .. } => Some((*file, SimOp::Sync)),
            Action::Fallocate { file, .. } => Some((*file, SimOp::Fallocate)),
            Action::Result(_) => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Flight {
    pub(super) port: usize,
    pub(super) token: Token,
    pub(super) action: Action,
    pub(super) fault: Option<i32>,
}

/// What the world keeps of an engine.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) done: Vec<(Token, i32)>,
    pub(super) notifier: Arc<Notifier>,
    pub(super) in_flight: usize,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) config: SimConfig,
    pub(super) rng: Rng,
    /// Nanoseconds since the start.
    pub(super) now: u64,
    order: u64,
    pub(super) files: Vec<FileState>,
    pub(super) names: BTreeMap<PathBuf, usize>,
    pub(super) events: BTreeMap<(u64, u64), Flight>,
    pub(super) held: Vec<Flight>,
    pub(super) holds: Vec<(usize, SimOp)>,
    pub(super) faults: Vec<SimFault>,
    pub(super) ports: Vec<Port>,
    pub(super) dead: bool,
    pub(super) stats: SimStats,
    pub(super) trace: u64,
}

impl World {
    pub(super) fn new(config: SimConfig) -> Self {
        Self {
            rng: Rng::new(config.seed),
            config,
            now: 0,
            order: 0,
            files: Vec::new(),
            names: BTreeMap::new(),
            events: BTreeMap::new(),
            held: Vec::new(),
            holds: Vec::new(),
            faults: Vec::new(),
            ports: Vec::new(),
            dead: false,
            stats: SimStats::default(),
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    pub(super) fn path_of(&self, file: usize) -> Option<&Path> {
        let (path, _) = self.names.iter().find(|(_, index)| **index == file)?;
        Some(path)
    }

    fn schedule(&mut self, due: u64, flight: Flight) {
        self.order += 1;
        self.events.insert((due, self.order), flight);
    }

    fn delay(&mut self) -> u64 {
        let nanos = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX / 4);
        let (low, high) = (nanos(self.config.min_delay), nanos(self.config.max_delay));
        self.rng.between(low, high.max(low))
    }

    /// The fault planned for an operation that starts now.
    fn planned_fault(&mut self, action: &Action) -> Option<i32> {
        let (file, op) = action.target()?;
        let path = self.path_of(file).map(Path::to_owned);
        let fault = self.faults.iter_mut().find(|fault| {
            fault.op == op && (fault.path.is_none() || fault.path == path) && fault.count > 0
        })?;
        if fault.skip > 0 {
            fault.skip -= 1;
            return None;
        }
        fault.count -= 1;
        Some(-fault.errno)
    }

    /// An operation starts; `after` is set for a timer.
    pub(super) fn launch(
        &mut self,
        port: usize,
        token: Token,
        mut action: Action,
        after: Option<u64>,
    ) {
        if self.dead {
            action = Action::Result(-libc::EIO);
        }
        // A sync covers what has completed when the host gets it.
        if let Action::Sync { file, point } = &mut action {
            *point = self.files[*file].sync_point();
        }
        let fault = self.planned_fault(&action);
        let held = action
            .target()
            .is_some_and(|target| self.holds.contains(&target));
        let flight = Flight {
            port,
            token,
            action,
            fault,
        };
        if held {
            self.held.push(flight);
            return;
        }
        let delay = match after {
            Some(after) => after,
            None => self.delay(),
        };
        self.schedule(self.now.saturating_add(delay), flight);
    }

    /// Operations that were held for this reason go on.
    pub(super) fn release(&mut self, target: Option<(usize, SimOp)>) {
        match target {
            Some(target) => self.holds.retain(|hold| *hold != target),
            None => self.holds.clear(),
        }
        for flight in std::mem::take(&mut self.held) {
            if flight
                .action
                .target()
                .is_some_and(|target| self.holds.contains(&target))
            {
                self.held.push(flight);
                continue;
            }
            let delay = self.delay();
            self.schedule(self.now.saturating_add(delay), flight);
        }
    }

    /// Ends the next operation, if it ends by `limit`.
    pub(super) fn step(&mut self, limit: u64) -> bool {
        let Some(entry) = self.events.first_entry() else {
            return false;
        };
        let due = entry.key().0;
        if due > limit {
            return false;
        }
        let flight = entry.remove();
        self.now = self.now.max(due);
        self.land(&flight);
        true
    }

    /// An operation ends: takes effect and is reported.
    pub(super) fn land(&mut self, flight: &Flight) {
        let result = self.effect(&flight.action, flight.fault);
        self.note(&[self.now, flight.port as u64, flight.token.0, result as u64]);
        let port = &mut self.ports[flight.port];
        port.in_flight -= 1;
        if port.done.is_empty() {
            port.notifier.signal();
        }
        port.done.push((flight.token, result));
    }

    /// An operation that is done when it starts.
    pub(super) fn run_inline(&mut self, mut action: Action) -> i32 {
        if let Action::Sync { file, point } = &mut action {
            *point = self.files[*file].sync_point();
        }
        let fault = self.planned_fault(&action);
        let result = self.effect(&action, fault);
        self.note(&[self.now, result as u64]);
        result
    }

    fn note(&mut self, values: &[u64]) {
        for value in values {
            for byte in value.to_le_bytes() {
                self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
    }

    /// Performs an operation at this instant; returns its result.
    pub(super) fn effect(&mut self, action: &Action, fault: Option<i32>) -> i32 {
        if self.dead {
            return -libc::EIO;
        }
        let fault = match action {
            Action::Result(result) => return *result,
            _ if fault.is_some() => fault,
            _ => self.random_fault(action),
        };
        match action {
            Action::Result(result) => *result,
            Action::Read {
                file,
                offset,
                segments,
                unit,
            } => {
                self.stats.reads += 1;
                if let Some(errno) = fault {
                    return errno;
                }
                let len = self.transfer_len(total(segments), *unit);
                let mut bytes = vec![0; len as usize];
                let got = self.files[*file].current.read(*offset, &mut bytes);
                self.stats.bytes_read += got as u64;
                buffers::scatter(&buffers::part_of(segments, 0, got as u64), &bytes[..got]);
                got as i32
            }
            Action::Write {
                file,
                offset,
                segments,
                unit,
                dsync,
            } => {
                self.stats.writes += 1;
                let mut bytes = captured(segments);
                if let Some(errno) = fault {
                    if errno == -libc::EIO {
                        self.files[*file].write_failed(*offset, &bytes, &mut self.rng);
                    }
                    return errno;
                }
                bytes.truncate(self.written_len(*offset, bytes.len() as u64, *unit) as usize);
                self.stats.bytes_written += bytes.len() as u64;
                self.files[*file].write(*offset, &bytes, *dsync);
                bytes.len() as i32
            }
            Action::Sync { file, point } => {
                self.stats.syncs += 1;
                let file = &mut self.files[*file];
                match fault {
                    Some(errno) => {
                        if errno == -libc::EIO {
                            file.sync_failed(*point, &mut self.rng);
                        }
                        errno
                    }
                    None => {
                        file.synced(*point);
                        0
                    }
                }
            }
            Action::Fallocate {
                file,
                mode,
                offset,
                len,
            } => {
                self.stats.fallocates += 1;
                if let Some(errno) = fault {
                    return errno;
                }
                let file = &mut self.files[*file];
                let size = file.current.len();
                match mode {
                    FallocateMode::Allocate => {
                        if offset + len > size {
                            file.set_len(offset + len);
                        }
                    }
                    FallocateMode::PunchHole | FallocateMode::ZeroRange => {
                        let end = (offset + len).min(size);
                        if *offset < end {
                            file.zero(*offset, end - offset);
                        }
                    }
                }
                0
            }
        }
    }

    fn random_fault(&mut self, action: &Action) -> Option<i32> {
        let config = self.config;
        if self.rng.chance(config.p_eintr) {
            return Some(if self.rng.chance(0.5) {
                -libc::EINTR
            } else {
                -libc::EAGAIN
            });
        }
        if self.rng.chance(config.p_error) {
            return Some(-libc::EIO);
        }
        let needs_space = match action {
            Action::Write {
                file,
                offset,
                segments,
                ..
            } => !self.files[*file]
                .current
                .is_allocated(*offset, total(segments)),
            Action::Fallocate { mode, .. } => *mode == FallocateMode::Allocate,
            _ => false,
        };
        (needs_space && self.rng.chance(config.p_enospc)).then_some(-libc::ENOSPC)
    }

    /// How much of a transfer happens: all, or now and then less.
    fn transfer_len(&mut self, len: u64, unit: u64) -> u64 {
        let units = len / unit;
        if units > 1 && self.rng.chance(self.config.p_short) {
            return self.rng.between(1, units - 1) * unit;
        }
        len
    }

    /// How much of a write happens. A host that stops half-way has written whole sectors: less than
    /// that is never torn, not even by the death of the process.
    fn written_len(&mut self, offset: u64, len: u64, unit: u64) -> u64 {
        let unit = unit.max(WRITE_UNIT);
        let first = offset / unit;
        let stops = (offset + len.max(1) - 1) / unit - first;
        if stops > 0 && self.rng.chance(self.config.p_short) {
            return (first + self.rng.between(1, stops)) * unit - offset;
        }
        len
    }

    /// What the operations in flight on a file would change, in the order in which they would end
    /// by chance.
    fn unfinished(&mut self, file: usize) -> Vec<Unfinished> {
        let mut list: Vec<Unfinished> = self
            .events
            .values()
            .chain(&self.held)
            .filter_map(|flight| match &flight.action {
                Action::Write {
                    file: target,
                    offset,
                    segments,
                    ..
                } if *target == file => Some(Unfinished::Write {
                    offset: *offset,
                    bytes: captured(segments),
                }),
                Action::Fallocate {
                    file: target,
                    mode,
                    offset,
                    len,
                } if *target == file => Some(match mode {
                    FallocateMode::Allocate => Unfinished::Extend(offset + len),
                    _ => Unfinished::Zero {
                        offset: *offset,
                        len: *len,
                    },
                }),
                _ => None,
            })
            .collect();
        for index in (1..list.len()).rev() {
            let other = self.rng.between(0, index as u64) as usize;
            list.swap(index, other);
        }
        list
    }

    /// The world after this one ends, by a power cut or by the death of the process.
    pub(super) fn end(&mut self, power_cut: bool) -> World {
        let mut config = self.config;
        config.seed = self.rng.next();
        let mut next = World::new(config);
        next.names = self.names.clone();
        for file in 0..self.files.len() {
            let unfinished = self.unfinished(file);
            let state = &self.files[file];
            next.files.push(if power_cut {
                state.after_power_cut(&unfinished, &mut self.rng)
            } else {
                state.after_kill(&unfinished, &mut self.rng)
            });
        }
        self.dead = true;
        self.release(None);
        next
    }

    /// Adds an empty file.
    pub(super) fn add_file(&mut self, path: &Path, content: Content) -> usize {
        let state = FileState::new(content, u64::from(self.config.sector));
        if let Some(index) = self.names.get(path) {
            self.files[*index] = state;
            return *index;
        }
        self.files.push(state);
        self.names.insert(path.to_owned(), self.files.len() - 1);
        self.files.len() - 1
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len() as u64).sum()
}

/// The bytes of a write at this instant.
fn captured(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = vec![0; total(segments) as usize];
    buffers::gather(segments, &mut bytes);
    bytes
}
