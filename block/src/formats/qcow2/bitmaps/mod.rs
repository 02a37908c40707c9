//! Persistent dirty bitmaps (specification: "Bitmaps").
//!
//! An image that is opened for writing marks its bitmaps as in use before anything else is written: if
//! the program dies, nobody takes them for up to date. Their bits stay where they are: writes are
//! recorded in memory, and only closing the image, or whoever asks for the bits, reads what is
//! stored. Closing writes those that changed to new clusters, makes the header name them, and gives
//! the old clusters back.
//!
//! * [`directory`]: the list of bitmaps in the image. `table`: their bits in the image.
//! * `ops`: opening, changing and storing them.

pub(crate) mod directory;
mod ops;
mod table;

use std::sync::{
    Arc, Mutex, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering},
};

use self::{
    directory::{BITMAP_AUTO, BITMAP_IN_USE, BitmapEntry},
    table::Stored,
};
use crate::{
    DirtyBits, Error, ErrorKind, Result,
    extras::BitmapInfo,
    hooks::{Hook, Mutation},
    sync::lock,
};

/// What there is of a bitmap in memory.
struct State {
    /// It records writes.
    enabled: bool,
    /// Where its bits are in the image; nowhere for one that was just made.
    stored: Option<Stored>,
    /// Whether what is stored belongs to it and is not in `bits` yet.
    unread: bool,
    /// Whether what is stored is not what it is.
    changed: bool,
    /// Bits set since it was opened, and all of them once it was read.
    bits: DirtyBits,
}

/// A bitmap of an opened image.
struct Bitmap {
    /// As the directory has it, but for what changes.
    entry: BitmapEntry,
    /// It was not stored correctly: it can be removed, nothing else.
    inconsistent: bool,
    /// Its extra data says that it must be left alone.
    foreign: bool,
    state: Mutex<State>,
}

impl Bitmap {
    /// One that the image lists.
    fn listed(entry: BitmapEntry, disk_size: u64) -> Self {
        let inconsistent = entry.flags & BITMAP_IN_USE != 0;
        Self {
            inconsistent,
            foreign: entry.is_foreign(),
            state: Mutex::new(State {
                enabled: !inconsistent && entry.flags & BITMAP_AUTO != 0,
                stored: Some(Stored {
                    offset: entry.table_offset,
                    entries: entry.table_size,
                }),
                unread: !inconsistent,
                changed: false,
                bits: DirtyBits::new(disk_size, u32::from(entry.granularity_bits)),
            }),
            entry,
        }
    }

    /// A new one.
    fn new(name: &str, granularity_bits: u8, enabled: bool, disk_size: u64) -> Self {
        Self {
            inconsistent: false,
            foreign: false,
            state: Mutex::new(State {
                enabled,
                stored: None,
                unread: false,
                changed: true,
                bits: DirtyBits::new(disk_size, u32::from(granularity_bits)),
            }),
            entry: BitmapEntry {
                table_offset: 0,
                table_size: 0,
                flags: 0,
                granularity_bits,
                extra: Vec::new(),
                name: name.as_bytes().to_vec(),
            },
        }
    }

    /// Refuses one whose bits nobody can use.
    fn check_usable(&self) -> Result<()> {
        let name = self.entry.name_text();
        if self.inconsistent {
            return Err(Error::corrupt(format!(
                "Bitmap '{name}' is inconsistent and cannot be used"
            )));
        }
        if self.foreign {
            return Err(Error::unsupported(format!(
                "Bitmap '{name}' cannot be used (field extra_data_size: value {}, expected 0, or \
                 flag 2 to say that unknown extra data may be ignored)",
                self.entry.extra.len()
            )));
        }
        Ok(())
    }

    /// The entry of the directory while the image is in use, or once it is closed; `None` for one
    /// that was never stored.
    fn listed_as(&self, in_use: bool) -> Option<BitmapEntry> {
        let state = lock(&self.state);
        let stored = state.stored?;
        let mut entry = self.entry.clone();
        entry.table_offset = stored.offset;
        entry.table_size = stored.entries;
        if self.inconsistent {
            return Some(entry);
        }
        let stale = match self.foreign {
            // Only one that should have recorded writes is out of date.
            true => state.enabled && (in_use || state.changed),
            // One that could not be stored stays marked.
            false => in_use || state.changed,
        };
        entry.flags &= !(BITMAP_IN_USE | BITMAP_AUTO);
        if stale {
            entry.flags |= BITMAP_IN_USE;
        }
        if state.enabled {
            entry.flags |= BITMAP_AUTO;
        }
        Some(entry)
    }

    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.entry.name_text(),
            granularity: 1 << self.entry.granularity_bits,
            enabled: lock(&self.state).enabled,
            inconsistent: self.inconsistent || self.foreign,
        }
    }
}

/// Sees every change of the disk and marks it in the bitmaps that record.
#[derive(Default)]
pub(super) struct Recorder {
    list: RwLock<Vec<Arc<Bitmap>>>,
}

impl Recorder {
    fn all(&self) -> Vec<Arc<Bitmap>> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        list.clone()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Bitmap>>)) {
        change(&mut self.list.write().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Hook for Recorder {
    // Before the change: a section on the drained disk never sees the one without the other.
    fn begin(&self, mutation: Mutation) {
        let (Mutation::Write(range) | Mutation::Discard(range) | Mutation::WriteZeroes(range)) =
            mutation;
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        for bitmap in &*list {
            let mut state = lock(&bitmap.state);
            if state.enabled && range.len > 0 {
                state.changed = true;
                if !bitmap.foreign {
                    state.bits.mark(range);
                }
            }
        }
    }

    fn end(&self, _: Mutation, _: Result<(), ErrorKind>) {}
}

/// The bitmaps of an opened image.
pub(super) struct Bitmaps {
    recorder: Arc<Recorder>,
    /// Why the image's bitmaps cannot be used. Such an image can only be read.
    damage: Option<String>,
    /// The directory in the image does not list what there is.
    list_changed: AtomicBool,
}

impl Bitmaps {
    fn new(list: Vec<BitmapEntry>, disk_size: u64) -> Self {
        let list = list
            .into_iter()
            .map(|entry| Arc::new(Bitmap::listed(entry, disk_size)));
        Self {
            recorder: Arc::new(Recorder {
                list: RwLock::new(list.collect()),
            }),
            damage: None,
            list_changed: AtomicBool::new(false),
        }
    }

    fn damaged(why: String) -> Self {
        Self {
            damage: Some(why),
            ..Self::new(Vec::new(), 0)
        }
    }

    /// What records writes.
    pub(super) fn recorder(&self) -> Arc<Recorder> {
        Arc::clone(&self.recorder)
    }

    /// What there is, for users.
    pub(super) fn infos(&self) -> Vec<BitmapInfo> {
        self.recorder.all().iter().map(|one| one.info()).collect()
    }

    /// The entries as the image lists them once it is closed, for `info`.
    pub(super) fn entries(&self) -> Vec<BitmapEntry> {
        let list = self.recorder.all();
        list.iter()
            .map(|bitmap| {
                bitmap.listed_as(false).unwrap_or_else(|| BitmapEntry {
                    flags: if lock(&bitmap.state).enabled {
                        BITMAP_AUTO
                    } else {
                        0
                    },
                    ..bitmap.entry.clone()
                })
            })
            .collect()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        let list = &self.recorder.list;
        list.read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    fn check_damage(&self) -> Result<()> {
        match &self.damage {
            Some(why) => Err(Error::corrupt(why.clone())),
            None => Ok(()),
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Bitmap>> {
        self.check_damage()?;
        let list = self.recorder.all();
        let found = list
            .into_iter()
            .find(|bitmap| bitmap.entry.name == name.as_bytes());
        found.ok_or_else(|| {
            Error::with_message(
                ErrorKind::NotFound,
                format!("Dirty bitmap '{name}' not found"),
            )
        })
    }

    fn list_changed(&self) {
        self.list_changed.store(true, Ordering::Release);
    }
}
