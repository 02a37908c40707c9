//! New LUKS volumes.

use super::volume::Volume;
use crate::{
    Error, FileId, Result,
    crypto::{SECTOR_SIZE, Secret, luks::LuksOptions},
    io::{FallocateMode, Io},
};

/// What a new volume should be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The disk size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// How it is encrypted.
    pub luks: LuksOptions,
    /// The password of the first key slot.
    pub secret: Secret,
    /// Take host space for the whole disk at once.
    pub allocate: bool,
}

/// Bytes that the file of a volume of `size` bytes takes.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for a size that no file can hold.
pub fn file_size(size: u64, luks: &LuksOptions) -> Result<u64> {
    size.checked_next_multiple_of(SECTOR_SIZE)
        .and_then(|size| size.checked_add(luks.header_len()))
        .filter(|len| i64::try_from(*len).is_ok())
        .ok_or_else(|| {
            Error::invalid_argument(format!("size: {size}, expected less than 2^63 bytes"))
        })
}

/// Writes a new volume to `file`, which is empty or a block device.
///
/// # Errors
/// As [`LuksOptions::check`], and the host's.
pub async fn create(io: &Io, file: FileId, options: &CreateOptions) -> Result<()> {
    let luks = options.luks.check()?;
    let end = file_size(options.size, &luks)?;
    if io.file_len(file)? < end {
        // Says "no space" where a block device is too small.
        io.set_len(file, end).await?;
    }
    if options.allocate {
        io.fallocate(file, FallocateMode::Allocate, 0, end).await?;
    }
    Volume::create(io, file, 0, luks, &options.secret).await?;
    Ok(())
}
