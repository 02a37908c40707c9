//! Guest memory as the front end describes it: regions mapped from its descriptors.
//!
//! A table never changes. Every change makes a new one, which shares the mappings it keeps; the
//! queues get it after a drain, and requests in flight hold the old one alive.
//!
//! What is checked when a region is mapped: sizes and offsets do not overflow, the range lies
//! inside the file, regions overlap neither in guest nor in user addresses. What cannot be checked
//! then is that the file keeps its size. A memfd sealed against shrinking (`F_SEAL_SHRINK`; QEMU's
//! `memory-backend-memfd` is) cannot be shrunk; a region without the seal is watched, and a front end
//! that shrinks it loses its connection at the next access: see `sigbus`.

use std::{
    fmt,
    fs::File,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
    bitmap::{Bitmap, BitmapSlice, WithBitmapSlice},
};

use crate::sys::{self, Mapping};

/// The most regions of a table.
pub const MAX_REGIONS: usize = 509;

/// The page of the dirty log: `VHOST_LOG_PAGE`.
const LOG_PAGE: u64 = 0x1000;

/// The memory of the guest of a vhost-user front end.
pub type VhostUserMemory = GuestRegionCollection<VhostUserRegion>;

/// One region of guest memory, mapped from a descriptor of the front end.
#[derive(Debug)]
pub struct VhostUserRegion {
    mapping: Arc<Mapping>,
    guest: u64,
    user: u64,
    dirty: DirtyPages,
}

impl GuestMemoryRegion for VhostUserRegion {
    type B = DirtyPages;

    fn len(&self) -> GuestUsize {
        self.mapping.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.guest)
    }

    fn bitmap(&self) -> DirtyPages {
        self.dirty.clone()
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let offset = self
            .check_address(addr)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.as_ptr().wrapping_add(offset.0 as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, DirtyPages>, GuestMemoryError> {
        let start =
            usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        let end = start.checked_add(count);
        if end.is_none_or(|end| end > self.mapping.len()) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let base = self.mapping.as_ptr().wrapping_add(start);
        // SAFETY: `start + count` lies inside the mapping, which lives as long as `self`, and its
        // bytes are only accessed as volatile memory.
        Ok(unsafe { VolatileSlice::with_bitmap(base, count, self.dirty.slice_at(start), None) })
    }
}

impl GuestMemoryRegionBytes for VhostUserRegion {}

/// The shared log in which a migrating front end wants the pages that change.
pub(super) struct DirtyLog(Mapping);

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl DirtyLog {
    /// Maps the log.
    pub(super) fn new(file: &File, offset: u64, len: u64) -> Result<Self, String> {
        require_fixed_size(file, "dirty log")?;
        let mapping =
            Mapping::new(file, offset, len).map_err(|error| format!("dirty log: {error}"))?;
        Ok(Self(mapping))
    }

    /// Whether the log has a bit for every page of `len` bytes from `guest`.
    fn covers(&self, guest: u64, len: u64) -> bool {
        let last = guest.saturating_add(len - 1) / LOG_PAGE;
        last / 8 < self.0.len() as u64
    }

    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        let at = usize::try_from(page / 8).ok()?;
        if at >= self.0.len() {
            return None;
        }
        // SAFETY: the byte lies inside the mapping, which lives as long as `self`; every access of
        // ours to it is atomic, as those of the front end must be.
        Some(unsafe { AtomicU8::from_ptr(self.0.as_ptr().wrapping_add(at)) })
    }
}

/// Marks the pages of a region in the dirty log, if there is one.
#[derive(Clone, Debug, Default)]
pub struct DirtyPages {
    log: Option<Arc<DirtyLog>>,
    /// The guest address of the first byte.
    base: u64,
}

impl WithBitmapSlice<'_> for DirtyPages {
    type S = Self;
}

impl BitmapSlice for DirtyPages {}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(log) = &self.log else { return };
        if len == 0 {
            return;
        }
        let first = self.base.saturating_add(offset as u64);
        let last = first.saturating_add(len as u64 - 1);
        for page in first / LOG_PAGE..=last / LOG_PAGE {
            match log.byte(page) {
                Some(byte) => byte.fetch_or(1 << (page % 8), Ordering::SeqCst),
                None => return,
            };
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.base.saturating_add(offset as u64) / LOG_PAGE;
        self.log
            .as_ref()
            .and_then(|log| log.byte(page))
            .is_some_and(|byte| byte.load(Ordering::SeqCst) & (1 << (page % 8)) != 0)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log.clone(),
            base: self.base.saturating_add(offset as u64),
        }
    }
}

/// The regions of a front end.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    /// In ascending order of guest addresses.
    regions: Vec<Arc<VhostUserRegion>>,
    log: Option<Arc<DirtyLog>>,
}

impl MemoryTable {
    /// A table of these regions; the dirty log stays.
    pub(super) fn replace(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: &[File],
        connection: BorrowedFd<'_>,
    ) -> Result<(), String> {
        let mut new = Self {
            regions: Vec::new(),
            log: self.log.clone(),
        };
        for (region, file) in regions.iter().zip(files) {
            new.add(region, file, connection)?;
        }
        *self = new;
        Ok(())
    }

    /// Maps one more region. Should its file become shorter, `connection` is shut down.
    pub(super) fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: &File,
        connection: BorrowedFd<'_>,
    ) -> Result<(), String> {
        let (guest, user) = (region.guest_phys_addr, region.user_addr);
        let (size, offset) = (region.memory_size, region.mmap_offset);
        let text = |problem: &dyn fmt::Display| {
            format!(
                "memory region at guest {guest:#x}, size {size:#x}, offset {offset:#x}: {problem}"
            )
        };
        if self.regions.len() >= MAX_REGIONS {
            return Err(text(&format_args!("more than {MAX_REGIONS} regions")));
        }
        if size == 0 {
            return Err(text(&"size is zero"));
        }
        let (Some(guest_end), Some(user_end)) = (guest.checked_add(size), user.checked_add(size))
        else {
            return Err(text(&"address overflows"));
        };
        for other in &self.regions {
            let len = other.mapping.len() as u64;
            if guest < other.guest + len && other.guest < guest_end {
                return Err(text(&format_args!(
                    "overlaps the one at {:#x}",
                    other.guest
                )));
            }
            if user < other.user + len && other.user < user_end {
                return Err(text(&format_args!(
                    "user address {user:#x} overlaps the region at {:#x}",
                    other.guest
                )));
            }
        }
        if self
            .log
            .as_ref()
            .is_some_and(|log| !log.covers(guest, size))
        {
            return Err(text(&"the dirty log does not cover it"));
        }
        let mapping = Mapping::of_peer(file, offset, size, connection);
        let mapping = mapping.map_err(|error| text(&error))?;
        self.regions.push(Arc::new(VhostUserRegion {
            mapping: Arc::new(mapping),
            guest,
            user,
            dirty: DirtyPages {
                log: self.log.clone(),
                base: guest,
            },
        }));
        self.regions.sort_by_key(|region| region.guest);
        Ok(())
    }

    /// Forgets a region. Its mapping goes when the last request that uses it has ended.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), String> {
        let (guest, user, size) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let before = self.regions.len();
        self.regions.retain(|other| {
            (other.guest, other.user, other.mapping.len() as u64) != (guest, user, size)
        });
        if self.regions.len() == before {
            return Err(format!(
                "no memory region at guest {guest:#x}, size {size:#x}"
            ));
        }
        Ok(())
    }

    /// Logs changed pages from now on, or no longer.
    pub(super) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) -> Result<(), String> {
        if let Some(log) = &log {
            for region in &self.regions {
                if !log.covers(region.guest, region.mapping.len() as u64) {
                    return Err(format!(
                        "dirty log of {} bytes does not cover the memory at {:#x}",
                        log.0.len(),
                        region.guest
                    ));
                }
            }
        }
        for region in &mut self.regions {
            *region = Arc::new(VhostUserRegion {
                mapping: Arc::clone(&region.mapping),
                guest: region.guest,
                user: region.user,
                dirty: DirtyPages {
                    log: log.clone(),
                    base: region.guest,
                },
            });
        }
        self.log = log;
        Ok(())
    }

    /// The memory as the queues use it.
    pub(super) fn guest_memory(&self) -> Arc<VhostUserMemory> {
        let memory = if self.regions.is_empty() {
            VhostUserMemory::new()
        } else {
            // Sorted and without overlaps, which is all that it checks.
            VhostUserMemory::from_arc_regions(self.regions.clone()).unwrap_or_default()
        };
        Arc::new(memory)
    }

    /// The guest address of an address of the front end, if `len` bytes from it lie in one region.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            let end = offset.checked_add(len)?;
            (end <= region.mapping.len() as u64).then(|| GuestAddress(region.guest + offset))
        })
    }
}

/// Refuses a file that its owner could shrink under our mapping.
pub(super) fn require_fixed_size(file: &File, what: &str) -> Result<(), String> {
    if sys::seals(file) & sys::FIXED_SIZE == 0 {
        return Err(format!("{what}: the memfd is not sealed against shrinking"));
    }
    Ok(())
}
