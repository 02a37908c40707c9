//! New LUKS volumes.

use super::volume::Volume;
use crate::{
    Error, FileId, Result,
    crypto::{SECTOR_SIZE, Secret, luks::LuksOptions},
    io::{AlignedBuf, FallocateMode, Io},
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
    /// What host space to take at once.
    pub preallocation: Preallocation,
}

/// What space a new volume takes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// That of its header.
    #[default]
    Off,
    /// That of the whole disk.
    Falloc,
    /// The same, and zeroes are written to it: what they decrypt to is noise.
    Full,
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
    match options.preallocation {
        Preallocation::Off => {}
        Preallocation::Falloc => io.fallocate(file, FallocateMode::Allocate, 0, end).await?,
        Preallocation::Full => write_zeroes(io, file, end).await?,
    }
    Volume::create(io, file, 0, luks, &options.secret).await?;
    Ok(())
}

/// Writes zeroes to the file up to `end`.
async fn write_zeroes(io: &Io, file: FileId, end: u64) -> Result<()> {
    const PIECE: u64 = 2 << 20;
    let mut at = 0;
    let mut buf = AlignedBuf::zeroed(PIECE.min(end) as usize);
    while at < end {
        let step = PIECE.min(end - at);
        if buf.len() as u64 != step {
            buf = AlignedBuf::zeroed(step as usize);
        }
        buf = io.write(file, at, buf).await?;
        at += step;
    }
    io.sync(file).await
}
