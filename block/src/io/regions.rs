//! Memory of a guest as a whole, for a host that can pin it once.

use std::{any::Any, sync::Arc};

use vm_memory::{GuestMemory, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// All regions of a guest's memory, and what keeps them mapped.
pub struct MemoryRegions {
    list: Vec<(*mut u8, usize)>,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for MemoryRegions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryRegions({} regions)", self.list.len())
    }
}

impl MemoryRegions {
    /// The regions of a guest's memory, which stays mapped as long as they are registered; `None`
    /// behind an IOMMU, where memory comes and goes.
    pub fn of<M>(memory: &Arc<M>) -> Option<Self>
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        let regions = memory.physical_memory()?.iter();
        let list = regions
            .map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some((host, usize::try_from(region.len()).ok()?))
            })
            .collect::<Option<_>>()?;
        Some(Self {
            list,
            _keep: Arc::clone(memory) as _,
        })
    }

    /// The number of regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is no region.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Addresses and lengths in bytes.
    pub(super) fn as_slice(&self) -> &[(*mut u8, usize)] {
        &self.list
    }
}
