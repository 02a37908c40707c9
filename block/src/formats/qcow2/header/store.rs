//! Writing the header so that a power cut at any time leaves an old one or a new one.
//!
//! Only the first sector, which has the fields, is written as one. Extensions and the backing file name may
//! reach beyond it, and any of those sectors may arrive without the others. So what the first sector
//! names is durable before the first sector is, and is left alone while it is named.

use super::{
    Extension, ExtensionType, Header, MAGIC, Origin, area::referenced_end, be32, needed_bytes,
};
use crate::{
    FileId, Result,
    io::{AlignedBuf, Io},
};

/// Bytes that a disk writes as one.
const SECTOR: usize = 512;

/// The steps from one header area to another; after each the file is synced.
struct Steps<'a> {
    io: &'a Io,
    file: FileId,
}

impl Steps<'_> {
    async fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        if !bytes.is_empty() {
            let bytes = AlignedBuf::from_slice(bytes);
            self.io.write(self.file, offset as u64, bytes).await?;
        }
        self.io.sync(self.file).await
    }

    /// The sectors behind the first one.
    async fn write_rest(&self, bytes: &[u8]) -> Result<()> {
        self.write(SECTOR, &bytes[SECTOR..]).await
    }

    async fn write_first(&self, bytes: &[u8]) -> Result<()> {
        self.write(0, &bytes[..SECTOR]).await
    }

    /// Writes the area while a copy of it is the one that counts.
    async fn write_around(&self, bytes: &[u8], beside: &Beside) -> Result<()> {
        self.write(beside.at, &beside.copy).await?;
        self.write_first(&beside.first).await?;
        self.write_rest(&bytes[..bytes.len().min(beside.at)])
            .await?;
        self.write_first(bytes).await?;
        // Nobody names it any more, whether this arrives or not.
        let zeroes = AlignedBuf::zeroed(beside.copy.len());
        self.io.write(self.file, beside.at as u64, zeroes).await?;
        Ok(())
    }
}

/// Extensions and name in another place of the first cluster.
struct Beside {
    /// The first sector that names them.
    first: Vec<u8>,
    copy: Vec<u8>,
    /// Where the copy goes.
    at: usize,
}

impl Header {
    /// Writes the header area and makes it durable. Whenever the power is cut, the image has the header
    /// it had or this one, but perhaps without the names of feature bits; unless the area has more than
    /// a sector of extensions and name, and the first cluster no room for it a second time, as may be
    /// with clusters of 1 and 2 KiB.
    ///
    /// # Errors
    /// As [`to_bytes`](Self::to_bytes), and the host's.
    pub async fn write(&self, io: &Io, file: FileId) -> Result<()> {
        let steps = Steps { io, file };
        let mut new = self.to_bytes()?;
        let old = read_area(io, file, new.len()).await?;
        new.resize(new.len().max(SECTOR).min(1 << self.cluster_bits), 0);
        // What was there behind the new area is nobody's.
        let rest_differs = old.get(SECTOR..new.len().max(SECTOR)) != new.get(SECTOR..);
        if be32(&old, 0) != MAGIC || !rest_differs {
            return steps.write(0, &new).await;
        }
        let new_end = referenced_end(&new).unwrap_or(new.len());
        if new_end <= SECTOR {
            steps.write_first(&new).await?;
            return steps.write_rest(&new).await;
        }
        let old_end = referenced_end(&old).unwrap_or(1 << self.cluster_bits);
        if old_end > SECTOR {
            if let Some(short) = self.in_one_sector() {
                steps.write_first(&short).await?;
            } else if let Some(beside) = self.beside(&new[..new_end], old_end) {
                return steps.write_around(&new, &beside).await;
            }
        }
        steps.write_rest(&new).await?;
        steps.write_first(&new).await
    }

    /// The header area without the names of feature bits, if that fits into the first sector.
    fn in_one_sector(&self) -> Option<Vec<u8>> {
        let mut short = Self {
            origin: Origin::default(),
            ..self.clone()
        };
        short.set_extension(ExtensionType::FEATURE_NAMES, None);
        let mut bytes = short.to_bytes().ok().filter(|all| all.len() <= SECTOR)?;
        bytes.resize(SECTOR, 0);
        Some(bytes)
    }

    /// A place behind the extensions and the name that are and those that are to be. An extension that
    /// nobody looks into lies over what is before it.
    fn beside(&self, new: &[u8], old_end: usize) -> Option<Beside> {
        let start = self.header_length as usize;
        let copy = new.get(start..)?.to_vec();
        let at = old_end.max(new.len()).next_multiple_of(SECTOR);
        let room = 1usize << self.cluster_bits;
        if start + Extension::HEADER_LEN > SECTOR || at.checked_add(copy.len())? > room {
            return None;
        }
        let mut first = new.get(..SECTOR)?.to_vec();
        let len = (at - start - Extension::HEADER_LEN) as u32;
        first[start..start + 4].copy_from_slice(&ExtensionType::MOVED.0.to_be_bytes());
        first[start + 4..start + 8].copy_from_slice(&len.to_be_bytes());
        let name_at = super::be64(new, 8);
        if let Some(within) = name_at.checked_sub(start as u64).filter(|_| name_at != 0) {
            first[8..16].copy_from_slice(&(at as u64 + within).to_be_bytes());
        }
        Some(Beside { first, copy, at })
    }
}

/// The header area as it is in the file, and at least `len` bytes.
async fn read_area(io: &Io, file: FileId, len: usize) -> Result<Vec<u8>> {
    let len = len.max(super::FIRST_READ);
    let bytes = io.read_padded(file, 0, len).await?;
    let needed = needed_bytes(&bytes);
    if needed <= bytes.len() {
        return Ok(bytes.to_vec());
    }
    Ok(io.read_padded(file, 0, needed).await?.to_vec())
}
