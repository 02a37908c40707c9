//! Reading and writing doorbells in guest memory.

use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory, bitmap::Bitmap};

use crate::memory::Window;

/// The doorbell at `address`; `None` outside guest memory.
pub(super) fn load<M: GuestMemory>(window: &mut Window<'_, M>, address: u64) -> Option<u32> {
    let at = GuestAddress(address);
    let direct = window.get(at, 4, Permissions::Read).and_then(|slice| {
        Some(
            slice
                .get_atomic_ref::<AtomicU32>(0)
                .ok()?
                .load(Ordering::SeqCst),
        )
    });
    match direct {
        Some(value) => Some(u32::from_le(value)),
        None => window.memory().read_obj::<u32>(at).ok().map(u32::from_le),
    }
}

/// Writes a doorbell or event index; outside guest memory nothing happens.
pub(super) fn store<M: GuestMemory>(window: &mut Window<'_, M>, address: u64, value: u32) {
    let at = GuestAddress(address);
    let direct = window.get(at, 4, Permissions::Write).and_then(|slice| {
        slice
            .get_atomic_ref::<AtomicU32>(0)
            .ok()?
            .store(value.to_le(), Ordering::SeqCst);
        slice.bitmap().mark_dirty(0, 4);
        Some(())
    });
    if direct.is_none() {
        let _ = window.memory().write_obj(value.to_le(), at);
    }
}
