//! A namespace: a disk, and what NVMe adds to it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use block::AsyncDiskFile;

use super::{
    gate::Gate,
    identity::Identity,
    reservation::{Reservations, SavedReservations},
    sanitize::SavedSanitize,
    sidecar::Content,
    uncorrectable::Uncorrectable,
};
use crate::{Error, Result, host::Sidecar, sync::lock};

/// How a namespace is made.
#[derive(Clone, Debug, Default)]
pub struct NamespaceConfig {
    /// Its identifier; the lowest free one if not given.
    pub nsid: Option<u32>,
    /// Bytes of a logical block: 512 or 4096; 0 is what the disk prefers.
    pub lba_size: u32,
    /// NGUID; made from the subsystem's name and the path if all identifiers are left out.
    pub nguid: Option<[u8; 16]>,
    /// EUI-64.
    pub eui64: Option<[u8; 8]>,
    /// UUID, in the order of its text.
    pub uuid: Option<[u8; 16]>,
    /// Refuse everything that writes, also on a writable disk.
    pub read_only: bool,
    /// The file that remembers the LBA format, uncorrectable blocks, reservations and sanitize.
    /// Without it none of these survives a restart, and what must survive is not offered.
    pub sidecar: Option<PathBuf>,
}

/// Why a command cannot just go on; all clear on the fast path.
pub(super) mod flag {
    pub(in crate::nvme) const READ_ONLY: u32 = 1;
    pub(in crate::nvme) const FORMATTING: u32 = 1 << 1;
    pub(in crate::nvme) const RESERVED: u32 = 1 << 2;
    pub(in crate::nvme) const UNCORRECTABLE: u32 = 1 << 3;
    pub(in crate::nvme) const SANITIZING: u32 = 1 << 4;
    pub(in crate::nvme) const GONE: u32 = 1 << 5;
}

/// A namespace of a subsystem.
pub struct Namespace {
    nsid: u32,
    disk: Box<dyn AsyncDiskFile>,
    identity: Identity,
    flags: AtomicU32,
    shift: AtomicU32,
    bytes: AtomicU64,
    pub(super) gate: Gate,
    uncorrectable: Mutex<Uncorrectable>,
    reservations: Mutex<Reservations>,
    sidecar: Option<Sidecar<Content>>,
    sanitize: Mutex<Option<SavedSanitize>>,
    attached: Mutex<BTreeSet<u16>>,
    /// The image in the pool, if it was made by namespace management.
    pooled: Option<PathBuf>,
    /// The controllers that a host has attached it to, whether they are there or not. Only for one of
    /// the pool.
    chosen: Mutex<BTreeSet<u16>>,
}

impl Namespace {
    pub(super) fn new(
        nsid: u32,
        disk: Box<dyn AsyncDiskFile>,
        config: &NamespaceConfig,
        seed: &str,
        pooled: Option<PathBuf>,
    ) -> Result<Self> {
        let (sidecar, content) = match &config.sidecar {
            Some(path) => {
                let (sidecar, content) = Sidecar::open(path)?;
                (Some(sidecar), content)
            }
            None => (None, Content::default()),
        };
        let lba = match (content.lba_size, config.lba_size) {
            (0, 0) if disk.topology().logical_block_size == 4096 => 4096,
            (0, 0) => 512,
            (0, lba) | (lba, _) => lba,
        };
        if !matches!(lba, 512 | 4096) {
            return Err(Error::Config(format!(
                "lba_size is {lba}, expected 512 or 4096"
            )));
        }
        if disk.size() < u64::from(lba) {
            return Err(Error::Config(format!(
                "{}: {} bytes are less than a logical block of {lba}",
                disk.path().display(),
                disk.size()
            )));
        }
        let writable = disk.capabilities().writable && !config.read_only;
        let uncorrectable = Uncorrectable::from_list(&content.uncorrectable);
        let reservations = content
            .reservations
            .as_ref()
            .map(Reservations::restored)
            .unwrap_or_default();
        let identity = Identity::configured(config.nguid, config.eui64, config.uuid)
            .or(content.identity.filter(|_| pooled.is_some()))
            .unwrap_or_else(|| match pooled {
                Some(_) => Identity::fresh(seed),
                None => Identity::of(seed),
            });
        let namespace = Self {
            nsid,
            identity,
            flags: AtomicU32::new(if writable { 0 } else { flag::READ_ONLY }),
            shift: AtomicU32::new(lba.trailing_zeros()),
            bytes: AtomicU64::new(disk.size()),
            disk,
            gate: Gate::default(),
            uncorrectable: Mutex::new(uncorrectable),
            reservations: Mutex::new(reservations),
            sidecar,
            sanitize: Mutex::new(content.sanitize),
            attached: Mutex::default(),
            pooled,
            chosen: Mutex::new(content.attached),
        };
        namespace.refresh_flags();
        Ok(namespace)
    }

    /// Its identifier.
    #[must_use]
    pub fn nsid(&self) -> u32 {
        self.nsid
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &dyn AsyncDiskFile {
        &*self.disk
    }

    /// Bytes of a logical block.
    #[must_use]
    pub fn lba_size(&self) -> u32 {
        1 << self.shift()
    }

    /// The number of logical blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.bytes.load(Ordering::Acquire) >> self.shift()
    }

    pub(super) fn shift(&self) -> u32 {
        self.shift.load(Ordering::Relaxed)
    }

    pub(super) fn flags(&self) -> u32 {
        self.flags.load(Ordering::Acquire)
    }

    pub(super) fn set_flag(&self, flag: u32, on: bool) {
        if on {
            self.flags.fetch_or(flag, Ordering::SeqCst);
        } else {
            self.flags.fetch_and(!flag, Ordering::SeqCst);
        }
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its image in the pool, if namespace management has made it.
    #[must_use]
    pub fn pooled(&self) -> Option<&Path> {
        self.pooled.as_deref()
    }

    pub(super) fn has_sidecar(&self) -> bool {
        self.sidecar.is_some()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.flags() & flag::READ_ONLY != 0
    }

    pub(super) fn resized(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Release);
    }

    /// The first byte and the number of bytes of a range of blocks, if it is inside.
    pub(super) fn range(&self, slba: u64, blocks: u64) -> Option<(u64, u64)> {
        let end = slba.checked_add(blocks)?;
        if end > self.blocks() {
            return None;
        }
        let shift = self.shift();
        Some((slba << shift, blocks << shift))
    }

    fn refresh_flags(&self) {
        let reserved = lock(&self.reservations).is_held();
        let marked = !lock(&self.uncorrectable).is_empty();
        self.set_flag(flag::RESERVED, reserved);
        self.set_flag(flag::UNCORRECTABLE, marked);
    }

    /// The reservations, to look at.
    pub(super) fn reservations(&self) -> MutexGuard<'_, Reservations> {
        lock(&self.reservations)
    }

    /// Changes the reservations; returns whether the sidecar has to be written.
    pub(super) fn change_reservations<R>(
        &self,
        change: impl FnOnce(&mut Reservations) -> R,
    ) -> (R, bool) {
        let (result, before, after) = {
            let mut reservations = lock(&self.reservations);
            let before = reservations.saved();
            let result = change(&mut reservations);
            (result, before, reservations.saved())
        };
        self.refresh_flags();
        (result, before != after)
    }

    pub(super) fn set_reservations(&self, saved: &SavedReservations, persistent: bool) {
        let mut restored = Reservations::restored(saved);
        restored.persistent = persistent;
        *lock(&self.reservations) = restored;
        self.refresh_flags();
    }

    pub(super) fn uncorrectable(&self) -> MutexGuard<'_, Uncorrectable> {
        lock(&self.uncorrectable)
    }

    /// Changes the marks and the flag that tells about them.
    pub(super) fn mark<R>(&self, change: impl FnOnce(&mut Uncorrectable) -> R) -> R {
        let result = change(&mut lock(&self.uncorrectable));
        self.refresh_flags();
        result
    }

    pub(super) fn sanitized(&self) -> Option<SavedSanitize> {
        *lock(&self.sanitize)
    }

    pub(super) fn set_sanitized(&self, state: Option<SavedSanitize>) {
        *lock(&self.sanitize) = state;
    }

    /// Changes the size of a logical block.
    pub(super) fn set_lba_size(&self, lba_size: u32) {
        self.shift
            .store(lba_size.trailing_zeros(), Ordering::Release);
    }

    /// Writes the sidecar, on a thread that may block. Without one there is nothing to do.
    pub(super) fn persist(&self) -> Result<()> {
        let Some(sidecar) = &self.sidecar else {
            return Ok(());
        };
        sidecar.write(|| Content {
            version: 1,
            lba_size: self.lba_size(),
            uncorrectable: self.uncorrectable().list(),
            reservations: self.reservations().saved(),
            sanitize: self.sanitized(),
            identity: self.pooled.as_ref().map(|_| self.identity),
            attached: lock(&self.chosen).clone(),
        })
    }

    /// Removes image and sidecar of a namespace of the pool: the sidecar first, because an image alone is
    /// no namespace.
    pub(super) fn erase_from_pool(&self, image: &Path) -> Result<()> {
        if let Some(sidecar) = &self.sidecar {
            sidecar.remove()?;
        }
        std::fs::remove_file(image).map_err(|error| {
            let path = image.display();
            Error::Config(format!("pool: {path}: it was not removed: {error}"))
        })
    }

    /// Whether a format or sanitize really removes the data from the host.
    pub(super) fn can_erase(&self) -> bool {
        !self.is_read_only() && self.disk.capabilities().overwrite
    }

    /// Whether a controller that is made now has it: one of the pool is attached by hosts.
    pub(super) fn is_for(&self, controller: u16) -> bool {
        self.pooled.is_none() || lock(&self.chosen).contains(&controller)
    }

    /// A host has attached or detached it; returns whether the sidecar has to be written.
    pub(super) fn choose(&self, controllers: &[u16], attached: bool) -> bool {
        if self.pooled.is_none() {
            return false;
        }
        let mut chosen = lock(&self.chosen);
        if attached {
            chosen.extend(controllers);
        } else {
            chosen.retain(|id| !controllers.contains(id));
        }
        true
    }

    pub(super) fn attached(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        lock(&self.attached)
    }
}
