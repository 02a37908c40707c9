//! Snapshots and bitmaps of a run: made, changed and given up while the disk is quiet, with faults, and
//! with a power cut in the middle of it.
//!
//! A snapshot holds what the disk held when it was made, whatever happens later. A bitmap says at
//! least what changed since it was made or cleared, or it is marked as not to be trusted.

use std::sync::Arc;

use block::{
    BitmapChange, Disk, DiskExtras, DiskFile, ErrorKind, Format, NewSnapshot,
    io::sim::{SimFault, SimOp},
};

use crate::{
    model::{Held, Model},
    run::Run,
    setup::{IMAGE, Mode, Setup},
};

/// Most snapshots, and most bitmaps, at a time.
const MOST: usize = 3;

struct Snapshot {
    name: String,
    bytes: Vec<u8>,
    held: Held,
    /// An error or a cut met its making or its end: it may be there or not.
    doubtful: bool,
}

struct Bitmap {
    name: String,
    enabled: bool,
    /// For every segment of the model, whether it changed while the bitmap recorded.
    dirty: Vec<bool>,
    /// It may be there or not.
    doubtful: bool,
    /// It is known not to be trusted.
    inconsistent: bool,
}

/// What is kept beside the disk.
#[derive(Default)]
pub(crate) struct Extras {
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
    made: u32,
}

impl Extras {
    /// A change of a range begins.
    pub(crate) fn changes(&mut self, model: &Model, start: u64, end: u64) {
        let (first, last) = model.segments_of(start, end);
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.dirty[first..last].fill(true);
        }
    }

    /// The disk has another size: bits of what is cut off or new are clear.
    pub(crate) fn resized(&mut self, model: &Model, old: u64, new: u64) {
        let (first, _) = model.segments_of(old.min(new), old.min(new));
        for bitmap in &mut self.bitmaps {
            bitmap.dirty[first..].fill(false);
        }
    }

    /// A resize is refused, or its outcome is open.
    pub(crate) fn forbids_resize(&self) -> bool {
        self.bitmaps.iter().any(|bitmap| bitmap.inconsistent)
    }

    fn bitmap(&mut self, name: &str) -> &mut Bitmap {
        let found = self.bitmaps.iter_mut().find(|one| one.name == name);
        found.unwrap()
    }
}

fn can_snapshot(setup: &Setup) -> bool {
    setup.format == Format::Qcow2 && setup.data_file.is_none() && setup.refcount_bits >= 8
}

fn can_map(setup: &Setup) -> bool {
    setup.format == Format::Qcow2 && setup.version == 3
}

impl Run {
    /// One operation on snapshots or bitmaps; the disk is quiet.
    pub(crate) fn change_extras(&mut self) {
        let snapshots = can_snapshot(&self.setup) && (!can_map(&self.setup) || self.rng.one_in(2));
        if snapshots {
            self.change_snapshots(false);
        } else if can_map(&self.setup) {
            self.change_bitmaps(false);
        }
    }

    /// From some host operation on nothing works any more, and then the power is cut.
    pub(crate) fn cut_in_extras(&mut self) {
        let snapshots = can_snapshot(&self.setup) && (!can_map(&self.setup) || self.rng.one_in(2));
        if !snapshots && !can_map(&self.setup) {
            return;
        }
        let op = self.rng.pick(&[SimOp::Write, SimOp::Write, SimOp::Sync]);
        let skip = self.rng.below(12);
        self.tell(|| format!("from {op:?} {skip} on nothing works"));
        self.host.inject(SimFault {
            path: None,
            op,
            skip,
            count: u64::MAX,
            errno: libc::EIO,
        });
        if snapshots {
            self.change_snapshots(true);
        } else {
            self.change_bitmaps(true);
        }
        self.cut(true);
        self.open();
    }

    fn extras_failed(&mut self, error: &block::Error, what: &str, armed: bool) {
        if !armed {
            self.tolerate(error, what);
        }
    }

    fn change_snapshots(&mut self, armed: bool) {
        let count = self.extras.snapshots.len();
        match self.rng.below(4) {
            0 | 1 if count < MOST => self.make_snapshot(armed),
            2 if count > 0 => self.apply_snapshot(armed),
            _ if count > 0 => self.delete_snapshot(armed),
            _ => {}
        }
    }

    fn make_snapshot(&mut self, armed: bool) {
        let mut bytes = vec![0xa5; self.model.size() as usize];
        if self.disk().read_at(&mut bytes, 0).is_err() {
            self.may_leak = true;
            return;
        }
        self.extras.made += 1;
        let name = format!("s{}", self.extras.made);
        let new = NewSnapshot {
            name: name.clone(),
            ..NewSnapshot::default()
        };
        // What a failed flush inside it should have made durable counts as not flushed.
        let flush = self.model.flush();
        let made = self.disk().create_snapshot(&new);
        self.tell(|| format!("snapshot {name}: {made:?}"));
        if made.is_ok() {
            self.model.flushed(flush);
        }
        self.extras.snapshots.push(Snapshot {
            name,
            bytes,
            held: self.model.held(),
            doubtful: made.is_err(),
        });
        if let Err(error) = made {
            self.extras_failed(&error, "create snapshot", armed);
        }
    }

    fn a_snapshot(&mut self) -> Option<usize> {
        let at = self.rng.below(self.extras.snapshots.len() as u64) as usize;
        (!self.extras.snapshots[at].doubtful).then_some(at)
    }

    fn apply_snapshot(&mut self, armed: bool) {
        let Some(at) = self.a_snapshot() else { return };
        let snapshot = &self.extras.snapshots[at];
        let (name, held) = (snapshot.name.clone(), snapshot.held.clone());
        let another_size = held.size() != self.model.size();
        if another_size && (armed || self.setup.mode == Mode::Faults) {
            // Which of the sizes it has would be open.
            return;
        }
        let applied = self.disk().apply_snapshot(&name);
        self.tell(|| format!("back to snapshot {name}: {applied:?}"));
        match applied {
            Ok(()) => self.model.become_held(&held),
            Err(error)
                if error.kind() == ErrorKind::InvalidArgument
                    && !self.extras.bitmaps.is_empty() => {}
            Err(error) => {
                self.model.may_become_held(&held);
                self.extras_failed(&error, "apply snapshot", armed);
            }
        }
    }

    fn delete_snapshot(&mut self, armed: bool) {
        let Some(at) = self.a_snapshot() else { return };
        let name = self.extras.snapshots[at].name.clone();
        let deleted = self.disk().delete_snapshot(&name);
        self.tell(|| format!("delete snapshot {name}: {deleted:?}"));
        match deleted {
            Ok(()) => drop(self.extras.snapshots.remove(at)),
            Err(error) => {
                self.extras.snapshots[at].doubtful = true;
                self.extras_failed(&error, "delete snapshot", armed);
            }
        }
    }

    fn change_bitmaps(&mut self, armed: bool) {
        let count = self.extras.bitmaps.len();
        if count == 0 || (count < MOST && self.rng.one_in(3)) {
            return self.add_bitmap(armed);
        }
        let at = self.rng.below(count as u64) as usize;
        let bitmap = &self.extras.bitmaps[at];
        if bitmap.doubtful {
            return;
        }
        let name = bitmap.name.clone();
        if bitmap.inconsistent || self.rng.one_in(5) {
            let removed = self.disk().change_bitmap(&name, BitmapChange::Remove);
            self.tell(|| format!("remove bitmap {name}: {removed:?}"));
            match removed {
                Ok(()) => drop(self.extras.bitmaps.remove(at)),
                Err(error) => {
                    self.extras.bitmaps[at].doubtful = true;
                    self.extras_failed(&error, "remove bitmap", armed);
                }
            }
            return;
        }
        match self.rng.below(4) {
            0 => self.change_bitmap(&name, BitmapChange::Clear, armed),
            1 => self.change_bitmap(&name, BitmapChange::Enable, armed),
            2 => self.change_bitmap(&name, BitmapChange::Disable, armed),
            _ => self.merge_bitmaps(&name, armed),
        }
    }

    fn add_bitmap(&mut self, armed: bool) {
        self.extras.made += 1;
        let name = format!("b{}", self.extras.made);
        let enabled = !self.rng.one_in(4);
        let change = BitmapChange::Add {
            granularity: Some(512 << self.rng.below(6)),
            enabled,
        };
        let added = self.disk().change_bitmap(&name, change);
        self.tell(|| format!("add bitmap {name}, enabled {enabled}: {added:?}"));
        if let Err(error) = added {
            return self.extras_failed(&error, "add bitmap", armed);
        }
        self.extras.bitmaps.push(Bitmap {
            name,
            enabled,
            dirty: vec![false; self.model.points().len() - 1],
            doubtful: false,
            inconsistent: false,
        });
    }

    fn change_bitmap(&mut self, name: &str, change: BitmapChange<'_>, armed: bool) {
        let changed = self.disk().change_bitmap(name, change);
        self.tell(|| format!("bitmap {name}: {change:?}: {changed:?}"));
        if let Err(error) = changed {
            return self.extras_failed(&error, "change bitmap", armed);
        }
        let bitmap = self.extras.bitmap(name);
        match change {
            BitmapChange::Clear => bitmap.dirty.fill(false),
            BitmapChange::Enable => bitmap.enabled = true,
            _ => bitmap.enabled = false,
        }
    }

    fn merge_bitmaps(&mut self, into: &str, armed: bool) {
        let at = self.rng.below(self.extras.bitmaps.len() as u64) as usize;
        let from = &self.extras.bitmaps[at];
        if from.doubtful || from.inconsistent {
            return;
        }
        let (from, dirty) = (from.name.clone(), from.dirty.clone());
        let merged = self
            .disk()
            .bitmap_bits(&from)
            .and_then(|bits| self.disk().change_bitmap(into, BitmapChange::Merge(&bits)));
        self.tell(|| format!("bitmap {from} into {into}: {merged:?}"));
        if let Err(error) = merged {
            return self.extras_failed(&error, "merge bitmaps", armed);
        }
        for (to, from) in self.extras.bitmap(into).dirty.iter_mut().zip(dirty) {
            *to |= from;
        }
    }

    /// Checks what is there, in an image that no trouble is made for; `closed`, when it was closed well
    /// before.
    pub(crate) fn check_extras(&mut self, disk: &Disk, closed: bool) {
        self.check_snapshots(disk);
        self.check_bitmaps(disk, closed);
    }

    fn check_snapshots(&mut self, disk: &Disk) {
        let listed = disk.snapshots();
        for one in &listed {
            if !self
                .extras
                .snapshots
                .iter()
                .any(|kept| kept.name == one.name)
            {
                self.fail(&format!("there is a snapshot '{}'", one.name));
            }
        }
        let there = |name: &str| listed.iter().any(|one| one.name == name);
        let mut kept = std::mem::take(&mut self.extras.snapshots);
        kept.retain(|one| {
            if !there(&one.name) && !one.doubtful {
                self.fail(&format!("snapshot '{}' is gone", one.name));
            }
            there(&one.name)
        });
        for one in &mut kept {
            one.doubtful = false;
            let options = self.setup.options().read_only(true).snapshot(&one.name);
            let opened = options.open_on(IMAGE, Arc::new(self.host.clone()));
            let mut bytes = vec![0xa5; one.bytes.len()];
            let read = opened.and_then(|disk| {
                assert_eq!(disk.size(), bytes.len() as u64);
                disk.read_at(&mut bytes, 0)
            });
            if let Err(error) = read {
                self.fail(&format!("snapshot '{}': {error}", one.name));
            }
            if let Some(at) = bytes.iter().zip(&one.bytes).position(|(a, b)| a != b) {
                self.fail(&format!(
                    "snapshot '{}': byte {at} is {:#x}, expected {:#x}",
                    one.name, bytes[at], one.bytes[at]
                ));
            }
        }
        self.extras.snapshots = kept;
    }

    fn check_bitmaps(&mut self, disk: &Disk, closed: bool) {
        let listed = disk.bitmaps();
        let mut kept = std::mem::take(&mut self.extras.bitmaps);
        for one in &listed {
            if !kept.iter().any(|bitmap| bitmap.name == one.name) {
                self.fail(&format!("there is a bitmap '{}'", one.name));
            }
        }
        kept.retain_mut(|bitmap| {
            let Some(info) = listed.iter().find(|info| info.name == bitmap.name) else {
                if closed && !bitmap.doubtful {
                    self.fail(&format!("bitmap '{}' is gone", bitmap.name));
                }
                // It was never stored.
                return false;
            };
            bitmap.doubtful = false;
            if info.inconsistent {
                if closed && !bitmap.inconsistent {
                    self.fail(&format!("bitmap '{}' was not stored", bitmap.name));
                }
                bitmap.inconsistent = true;
                return true;
            }
            if bitmap.inconsistent {
                self.fail(&format!("bitmap '{}' is trusted again", bitmap.name));
            }
            if closed && info.enabled != bitmap.enabled {
                self.fail(&format!(
                    "bitmap '{}' enabled: {}",
                    bitmap.name, info.enabled
                ));
            }
            bitmap.enabled = info.enabled;
            self.check_bits(disk, bitmap);
            true
        });
        self.extras.bitmaps = kept;
    }

    fn check_bits(&self, disk: &Disk, bitmap: &Bitmap) {
        let bits = match disk.bitmap_bits(&bitmap.name) {
            Ok(bits) => bits,
            Err(error) => self.fail(&format!("bitmap '{}': {error}", bitmap.name)),
        };
        let ranges: Vec<_> = bits
            .ranges()
            .map(|range| (range.start.0, range.end()))
            .collect();
        for (at, _) in bitmap.dirty.iter().enumerate().filter(|(_, dirty)| **dirty) {
            let (start, end) = (self.model.points()[at], self.model.points()[at + 1]);
            let end = end.min(disk.size());
            let told = |(first, last): &(u64, u64)| *first <= start && end <= *last;
            if start < end && !ranges.iter().any(told) {
                self.fail(&format!(
                    "bitmap '{}' does not have {start}..{end}, which changed: {ranges:?}",
                    bitmap.name
                ));
            }
        }
    }
}
