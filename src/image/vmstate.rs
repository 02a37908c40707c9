//! The state of a virtual machine that an image keeps behind the disk.

use block::{DiskFile, Error, Result};

/// Fills `buf` from `offset` of the VM state.
pub(crate) fn read(_disk: &dyn DiskFile, _buf: &mut [u8], _offset: u64) -> Result<()> {
    Err(Error::unsupported("VM state is not supported"))
}

/// Writes `buf` at `offset` of the VM state.
pub(crate) fn write(_disk: &dyn DiskFile, _buf: &[u8], _offset: u64) -> Result<()> {
    Err(Error::unsupported("VM state is not supported"))
}
