//! How to open a disk.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{
    Format,
    crypto::{Secret, Unlock},
    faults::{FaultPlaces, Faults},
    gate::FileGate,
    io::EngineKind,
};

/// How the host's page cache and flushes are used, as QEMU's cache modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Page cache; durable after a flush.
    #[default]
    WriteBack,
    /// Page cache; every change is durable before it completes.
    WriteThrough,
    /// Direct I/O; durable after a flush.
    None,
    /// Direct I/O; every change is durable before it completes.
    DirectSync,
    /// Page cache; nothing is ever synced. The death of the host may lose or corrupt everything.
    Unsafe,
}

impl CacheMode {
    /// The mode of that QEMU name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "writeback" => CacheMode::WriteBack,
            "writethrough" => CacheMode::WriteThrough,
            "none" | "off" => CacheMode::None,
            "directsync" => CacheMode::DirectSync,
            "unsafe" => CacheMode::Unsafe,
            _ => return None,
        })
    }
}

/// Whether the image is locked against other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Lock; where the file system has no locks, warn and go on.
    #[default]
    Auto,
    /// Lock, or fail.
    On,
    /// Do not lock.
    Off,
}

/// What happens to discards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardPolicy {
    /// They give space back to the host.
    #[default]
    Unmap,
    /// They complete without effect.
    Ignore,
}

/// Whether writes are searched for zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are not.
    #[default]
    Off,
    /// A write of zeroes becomes a write-zeroes request.
    On,
    /// The same, and space may be given back.
    Unmap,
}

/// Which kinds of metadata of a qcow2 image are guarded against being overwritten. The names are QEMU's;
/// by default all are but the L2 tables of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each kind is checked or not, and any mix is possible"
)]
pub struct OverlapChecks {
    /// The header.
    pub main_header: bool,
    /// The L1 table of the disk.
    pub active_l1: bool,
    /// The L2 tables of the disk.
    pub active_l2: bool,
    /// The reference count table.
    pub refcount_table: bool,
    /// The reference count blocks.
    pub refcount_block: bool,
    /// The table of snapshots.
    pub snapshot_table: bool,
    /// The L1 tables of snapshots.
    pub inactive_l1: bool,
    /// The L2 tables of snapshots: they are read when the image is changed for the first time.
    pub inactive_l2: bool,
    /// The directory of bitmaps.
    pub bitmap_directory: bool,
}

impl Default for OverlapChecks {
    fn default() -> Self {
        let mut checks = Self::all(true);
        checks.inactive_l2 = false;
        checks
    }
}

impl OverlapChecks {
    const fn all(on: bool) -> Self {
        Self {
            main_header: on,
            active_l1: on,
            active_l2: on,
            refcount_table: on,
            refcount_block: on,
            snapshot_table: on,
            inactive_l1: on,
            inactive_l2: on,
            bitmap_directory: on,
        }
    }

    /// The checks that QEMU calls `none`, `constant` (of what has one place), `cached` (of what needs no
    /// reading) and `all`.
    #[must_use]
    pub fn from_template(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::all(false),
            "constant" => Self {
                active_l2: false,
                refcount_block: false,
                inactive_l1: false,
                inactive_l2: false,
                ..Self::all(true)
            },
            "cached" => Self::default(),
            "all" => Self::all(true),
            _ => return None,
        })
    }

    /// The check of that name, to be switched.
    pub fn by_name(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "main-header" => &mut self.main_header,
            "active-l1" => &mut self.active_l1,
            "active-l2" => &mut self.active_l2,
            "refcount-table" => &mut self.refcount_table,
            "refcount-block" => &mut self.refcount_block,
            "snapshot-table" => &mut self.snapshot_table,
            "inactive-l1" => &mut self.inactive_l1,
            "inactive-l2" => &mut self.inactive_l2,
            "bitmap-directory" => &mut self.bitmap_directory,
            _ => return None,
        })
    }
}

/// Which freed clusters of a qcow2 image give their space back to the host at once; others keep it until
/// they are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassDiscards {
    /// Those that the guest discards, unless [`DiscardPolicy::Ignore`] drops its requests anyway.
    pub request: bool,
    /// Those that a snapshot held alone, when it is deleted, and the disk, when it goes back to one.
    pub snapshot: bool,
    /// Those that lose their last reference for other reasons: tables and data that were replaced.
    pub other: bool,
}

impl Default for PassDiscards {
    fn default() -> Self {
        Self {
            request: true,
            snapshot: true,
            other: false,
        }
    }
}

/// Which backing file to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Backing {
    /// The one the header names.
    #[default]
    Header,
    /// None, whatever the header names: clusters that are not allocated read as zeroes.
    None,
    /// This one.
    Override(PathBuf, Option<Format>),
}

/// Which internal snapshot to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SnapshotName {
    /// By id, or else by name.
    Either(String),
    /// By what is given of both.
    Exactly {
        id: Option<String>,
        name: Option<String>,
    },
}

/// How to open a disk. Start with [`OpenOptions::new`], end with
/// [`open`](OpenOptions::open).
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(crate) format: Option<Format>,
    pub(crate) read_only: bool,
    pub(crate) direct: bool,
    pub(crate) engine: EngineKind,
    pub(crate) cache_mode: CacheMode,
    pub(crate) metadata_cache_size: u64,
    pub(crate) gate: FileGate,
    pub(crate) locking: Locking,
    pub(crate) force_share: bool,
    pub(crate) discard: DiscardPolicy,
    pub(crate) discard_no_unref: bool,
    pub(crate) pass_discards: PassDiscards,
    pub(crate) overlap_checks: OverlapChecks,
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) backing: Backing,
    pub(crate) data_file: Option<PathBuf>,
    pub(crate) snapshot: Option<SnapshotName>,
    pub(crate) backing_format: Option<Format>,
    pub(crate) restartable: bool,
    pub(crate) allow_probed_backing: bool,
    pub(crate) allow_corrupt: bool,
    pub(crate) writable_depth: Option<usize>,
    pub(crate) faults: FaultPlaces,
    pub(crate) lock_wait: Duration,
    /// Of the image, then of each image below.
    pub(crate) keys: Vec<Option<Secret>>,
    pub(crate) locked: bool,
}

/// The default of [`OpenOptions::metadata_cache_size`]: 32 MiB, which maps 256 GiB of a qcow2 image
/// with 64 KiB clusters.
pub const DEFAULT_METADATA_CACHE_SIZE: u64 = 32 << 20;

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            direct: false,
            engine: EngineKind::IoUring,
            cache_mode: CacheMode::WriteBack,
            metadata_cache_size: DEFAULT_METADATA_CACHE_SIZE,
            gate: FileGate::default(),
            locking: Locking::Auto,
            force_share: false,
            discard: DiscardPolicy::Unmap,
            discard_no_unref: false,
            pass_discards: PassDiscards::default(),
            overlap_checks: OverlapChecks::default(),
            lazy_refcounts: None,
            detect_zeroes: DetectZeroes::Off,
            backing: Backing::Header,
            data_file: None,
            backing_format: None,
            snapshot: None,
            restartable: false,
            allow_probed_backing: false,
            allow_corrupt: false,
            writable_depth: None,
            faults: FaultPlaces::default(),
            lock_wait: Duration::ZERO,
            keys: Vec::new(),
            locked: false,
        }
    }
}

impl OpenOptions {
    /// The defaults: detected format, writable, page cache, io_uring, 32 MiB of metadata cache,
    /// named files only inside the image's folder, locked, discards passed on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The format, instead of detecting it.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Open for reading only.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Bypass the host's page cache. [`CacheMode::None`] and [`CacheMode::DirectSync`] say so too.
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// The engine that drives device queues.
    #[must_use]
    pub fn engine(mut self, engine: EngineKind) -> Self {
        self.engine = engine;
        self
    }

    /// How the page cache and flushes are used.
    #[must_use]
    pub fn cache_mode(mut self, mode: CacheMode) -> Self {
        self.cache_mode = mode;
        self
    }

    /// The most bytes of mapping tables kept in memory by each image of the chain; the default is
    /// [`DEFAULT_METADATA_CACHE_SIZE`].
    #[must_use]
    pub fn metadata_cache_size(mut self, bytes: u64) -> Self {
        self.metadata_cache_size = bytes;
        self
    }

    /// Which files the image may name.
    #[must_use]
    pub fn gate(mut self, gate: FileGate) -> Self {
        self.gate = gate;
        self
    }

    /// Whether the image is locked against other processes.
    #[must_use]
    pub fn locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// Open although another process writes to it: takes no lock, and needs
    /// [`read_only`](Self::read_only).
    #[must_use]
    pub fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }

    /// What happens to discards.
    #[must_use]
    pub fn discard(mut self, policy: DiscardPolicy) -> Self {
        self.discard = policy;
        self
    }

    /// A discard gives host space back, but its clusters stay with the guest's and are not used for
    /// anything else: an image that was laid out well stays so. QEMU's `discard-no-unref`; an image of
    /// version 2 does not open with it.
    #[must_use]
    pub fn discard_no_unref(mut self, keep: bool) -> Self {
        self.discard_no_unref = keep;
        self
    }

    /// Whether reference counts are written late, under the dirty bit, whatever the image says. Only a
    /// version 3 image can. QEMU's `lazy-refcounts`.
    #[must_use]
    pub fn lazy_refcounts(mut self, lazy: bool) -> Self {
        self.lazy_refcounts = Some(lazy);
        self
    }

    /// Whether writes are searched for zeroes.
    #[must_use]
    pub fn detect_zeroes(mut self, detect: DetectZeroes) -> Self {
        self.detect_zeroes = detect;
        self
    }

    /// Do not open the backing file: clusters that are not allocated read as zeroes.
    #[must_use]
    pub fn no_backing(mut self, no_backing: bool) -> Self {
        self.backing = if no_backing {
            Backing::None
        } else {
            Backing::Header
        };
        self
    }

    /// Use this backing file instead of the one the header names. The gate does not apply to it.
    #[must_use]
    pub fn backing(mut self, path: &Path, format: Option<Format>) -> Self {
        self.backing = Backing::Override(path.to_owned(), format);
        self
    }

    /// Use this data file instead of the one the header names. The gate does not apply to it. Only for
    /// an image whose data is in a file of its own; QEMU's `data-file`.
    #[must_use]
    pub fn data_file(mut self, path: &Path) -> Self {
        self.data_file = Some(path.to_owned());
        self
    }

    /// Take the backing file that the header names for an image of this format, whatever format the
    /// header records.
    #[must_use]
    pub fn backing_format(mut self, format: Format) -> Self {
        self.backing_format = Some(format);
        self
    }

    /// Show the disk as it was at an internal snapshot, by id or name. Needs
    /// [`read_only`](Self::read_only).
    #[must_use]
    pub fn snapshot(mut self, id_or_name: &str) -> Self {
        self.snapshot = Some(SnapshotName::Either(id_or_name.to_owned()));
        self
    }

    /// Show the disk as it was at the internal snapshot with this id and this name, whichever are
    /// given. Needs [`read_only`](Self::read_only).
    #[must_use]
    pub fn snapshot_by(mut self, id: Option<&str>, name: Option<&str>) -> Self {
        self.snapshot = Some(SnapshotName::Exactly {
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
        });
        self
    }

    /// Complete a change only when the tables that it needs are written to the file in crash
    /// order, so that killing this process loses nothing that completed.
    #[must_use]
    pub fn restartable(mut self, restartable: bool) -> Self {
        self.restartable = restartable;
        self
    }

    /// Detect the format of a backing file whose format is not recorded. Without this it is raw.
    #[must_use]
    pub fn allow_probed_backing(mut self, allow: bool) -> Self {
        self.allow_probed_backing = allow;
        self
    }

    /// Open an image for writing although it is marked corrupt: for repair.
    #[must_use]
    pub fn allow_corrupt(mut self, allow: bool) -> Self {
        self.allow_corrupt = allow;
        self
    }

    /// Open the image that many levels down the backing chain for writing, too, and lock it so: for
    /// [`maintenance::commit`](crate::maintenance::commit). 0 stands for none.
    #[must_use]
    pub fn writable_backing(mut self, depth: usize) -> Self {
        self.writable_depth = (depth > 0).then_some(depth);
        self
    }

    /// Make operations on the image's own file fail, for tests.
    #[must_use]
    pub fn faults(mut self, faults: Arc<Faults>) -> Self {
        self.faults.file = Some(faults);
        self
    }

    /// Which freed clusters of the image give their space back at once.
    #[must_use]
    pub fn pass_discards(mut self, which: PassDiscards) -> Self {
        self.pass_discards = which;
        self
    }

    /// Which metadata of the image is guarded against being overwritten.
    #[must_use]
    pub fn overlap_checks(mut self, checks: OverlapChecks) -> Self {
        self.overlap_checks = checks;
        self
    }

    /// Make operations on the image's data file fail, as the rules say.
    #[must_use]
    pub fn data_file_faults(mut self, faults: Arc<Faults>) -> Self {
        self.faults.data_file = Some(faults);
        self
    }

    /// Make requests to the disk fail, as the rules say: offsets are those of the disk. Of the events only
    /// [`Event::None`](crate::faults::Event::None) comes.
    #[must_use]
    pub fn request_faults(mut self, faults: Arc<Faults>) -> Self {
        self.faults.requests = Some(faults);
        self
    }

    /// How long to wait for the lock of an image that another process holds; by default a moment, for
    /// one that was just killed.
    #[must_use]
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.lock_wait = wait;
        self
    }

    /// The secret of an encrypted image.
    #[must_use]
    pub fn key(self, secret: Secret) -> Self {
        self.backing_key(0, secret)
    }

    /// The secret of the encrypted image `depth` levels down the backing chain.
    #[must_use]
    pub fn backing_key(mut self, depth: usize, secret: Secret) -> Self {
        // Longer than any chain.
        if depth <= 256 {
            let needed = self.keys.len().max(depth + 1);
            self.keys.resize(needed, None);
            self.keys[depth] = Some(secret);
        }
        self
    }

    /// Open encrypted images without their keys: what their headers say can be seen, data can be
    /// neither read nor written.
    #[must_use]
    pub fn locked(mut self, locked: bool) -> Self {
        self.locked = locked;
        self
    }

    /// How the image `depth` levels down is unlocked.
    pub(crate) fn unlock(&self, depth: usize) -> Unlock {
        match self.keys.get(depth) {
            Some(Some(secret)) => Unlock::With(secret.clone()),
            _ if self.locked => Unlock::Locked,
            _ => Unlock::Nothing,
        }
    }

    pub(crate) fn is_direct(&self) -> bool {
        self.direct || matches!(self.cache_mode, CacheMode::None | CacheMode::DirectSync)
    }

    pub(crate) fn is_write_through(&self) -> bool {
        matches!(
            self.cache_mode,
            CacheMode::WriteThrough | CacheMode::DirectSync
        )
    }
}
