//! LUKS version 1: a header with key slots, then the disk, encrypted sector by sector.
//!
//! The header itself is `crate::crypto::luks`.

pub mod create;
pub(crate) mod volume;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use self::volume::{OpenVolume, Volume};
use crate::{
    Capabilities, DiskTopology, Error, FileId, Format, GuestRange, Result,
    crypto::{KeyChange, SECTOR_SIZE, Unlock},
    encryption::{CountedFrom, Encryption},
    image::{BlockStatus, Extents, Image, ImageInfo, Intent, Prepared},
    io::Io,
    sync::{LocalFuture, lock},
    table::MapCache,
    types::HostOffset,
};

/// An opened LUKS volume.
#[derive(Debug)]
pub(crate) struct Luks {
    file: FileId,
    writable: bool,
    payload_offset: u64,
    size: AtomicU64,
    encryption: Arc<Encryption>,
    volume: Mutex<OpenVolume>,
}

impl Luks {
    /// Opens the volume in `file`.
    pub(crate) async fn open(
        io: &Io,
        file: FileId,
        writable: bool,
        unlock: &Unlock,
    ) -> Result<Self> {
        let len = io.file_len(file)?;
        let volume = Volume::read(io, file, 0, len).await?;
        let (volume, cipher) = OpenVolume::new(io, volume, unlock, "key-secret").await?;
        let payload_offset = volume.volume.header.payload_offset;
        Ok(Self {
            file,
            writable,
            payload_offset,
            // At most a file's length, rounded up to whole sectors.
            size: AtomicU64::new((len - payload_offset).next_multiple_of(SECTOR_SIZE)),
            // Sectors are counted from the payload's start: what the guest sees.
            encryption: Encryption::new(cipher, CountedFrom::GuestOffset),
            volume: Mutex::new(volume),
        })
    }

    fn push(&self, range: GuestRange, out: &mut Extents) {
        // Inside the disk, which lies inside the file.
        let offset = HostOffset(self.payload_offset + range.start.0);
        out.push_encrypted(range.len, self.file, offset);
    }
}

impl Image for Luks {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn topology(&self) -> DiskTopology {
        DiskTopology::default()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: self.writable,
            // What a hole decrypts to is noise.
            discard: false,
            write_zeroes: self.writable,
            resize: self.writable,
            discard_granularity: SECTOR_SIZE as u32,
            secure_erase: false,
            overwrite: self.writable,
        }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            encrypted: true,
            format_specific: lock(&self.volume).volume.info(),
            ..ImageInfo::default()
        }
    }

    fn encryption(&self) -> Option<&Arc<Encryption>> {
        Some(&self.encryption)
    }

    fn data_file(&self) -> FileId {
        self.file
    }

    fn try_map(
        &self,
        range: GuestRange,
        _intent: Intent,
        _cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        self.push(range, out);
        Ok(())
    }

    fn map<'a>(
        &'a self,
        _io: &'a Io,
        range: GuestRange,
        out: &'a mut Extents,
    ) -> LocalFuture<'a, Result<()>> {
        self.push(range, out);
        Box::pin(async { Ok(()) })
    }

    fn prepare<'a>(
        &'a self,
        _io: &'a Io,
        _range: GuestRange,
    ) -> LocalFuture<'a, Result<Option<Prepared<'a>>>> {
        Box::pin(async { Err(Error::corrupt("everything is written in place")) })
    }

    fn discard<'a>(&'a self, _io: &'a Io, _range: GuestRange) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes<'a>(
        &'a self,
        _io: &'a Io,
        _range: GuestRange,
        _may_unmap: bool,
    ) -> LocalFuture<'a, Result<u64>> {
        // Zeroes are data like any other: encrypted.
        Box::pin(async { Ok(0) })
    }

    fn flush<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        Box::pin(io.sync(self.file))
    }

    fn block_status<'a>(
        &'a self,
        _io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<BlockStatus>> {
        let status = BlockStatus {
            len: range.len,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: None,
            file: None,
        };
        Box::pin(async move { Ok(status) })
    }

    fn resize<'a>(&'a self, io: &'a Io, size: u64) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let end = size
                .checked_add(self.payload_offset)
                .filter(|end| size.is_multiple_of(SECTOR_SIZE) && i64::try_from(*end).is_ok())
                .ok_or_else(|| {
                    Error::invalid_argument(format!(
                        "size: {size}, expected a multiple of {SECTOR_SIZE} that a file can hold \
                         behind a header of {} bytes",
                        self.payload_offset
                    ))
                })?;
            io.set_len(self.file, end).await?;
            self.size.store(size, Ordering::Release);
            io.sync(self.file).await
        })
    }

    fn change_keys<'a>(&'a self, io: &'a Io, change: &'a KeyChange) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move { volume::change_in(&self.volume, io, change).await })
    }
}
