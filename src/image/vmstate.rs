//! The state of a virtual machine that an image keeps behind the disk.

use block::{DiskFile, Result};

/// Fills `buf` from `offset` of the VM state.
pub(crate) fn read(disk: &dyn DiskFile, buf: &mut [u8], offset: u64) -> Result<()> {
    disk.extras().read_vm_state(buf, offset)
}

/// Writes `buf` at `offset` of the VM state.
pub(crate) fn write(disk: &dyn DiskFile, buf: &[u8], offset: u64) -> Result<()> {
    disk.extras().write_vm_state(buf, offset)
}
