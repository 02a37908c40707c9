//! Work on a chain of images as a whole: committing into a backing file, changing the backing file.
//!
//! Both keep what the disk reads whatever instant they stop at: data is durable in its new place before
//! anything stops naming the old one.

use std::sync::Arc;

use crate::{
    Disk, DiskFile, Error, FileId, GuestRange, Result,
    hooks::Mutation,
    image::{BlockStatus, Image},
    io::{AlignedBuf, Buffers, FallocateMode, Io},
    serve,
};

/// Bytes moved at a time.
const CHUNK: u64 = 2 << 20;

/// Told after each step: bytes of the disk that are done. An error ends the work and is what it
/// returns.
pub type Step<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Copies what the image, and what is between, holds into the image `depth` levels below it, and makes
/// that durable. The disk was opened with [`OpenOptions::writable_backing`] of the same depth. A
/// backing image that is smaller grows.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) when there is no such image; that image's
/// errors of resizing and writing, the chain's of reading. What was copied then is there, and the disk
/// reads as before.
///
/// [`OpenOptions::writable_backing`]: crate::OpenOptions::writable_backing
pub fn commit(disk: &Disk, depth: usize, step: &mut Step<'_>) -> Result<()> {
    let base = below(disk.image(), depth)?;
    let copied = copy_down(disk, depth, base, step);
    // All of it, with the space that writing over old clusters freed; after an error, too, so that
    // the image's bitmaps say what was written.
    let closed = disk.with_drained(async |io| base.close(io).await);
    copied.and(closed)
}

fn copy_down(disk: &Disk, depth: usize, base: &Arc<dyn Image>, step: &mut Step<'_>) -> Result<()> {
    let top = disk.image();
    let size = top.size();
    if base.size() < size {
        disk.with_drained(async |io| base.resize(io, size).await)
            .map_err(|error| error.operation("resize the backing file"))?;
    }
    // No queue announces what is written here.
    let announce = |mutation| {
        if let Some(extras) = base.extras() {
            extras.recorder().begin(mutation);
        }
    };
    let mut at = 0;
    while at < size {
        let status = status(disk, at, size - at)?;
        let len = if status.depth as usize >= depth {
            status.len
        } else if status.present && !status.zero {
            let range = GuestRange::new(at, status.len.min(CHUNK));
            announce(Mutation::Write(range));
            disk.with_pin(async |io| {
                let data = serve::read_owned(&**top, io, range).await?;
                let data = Buffers::owned(data);
                serve::write_image(&**base, io, range, &data, false).await
            })?;
            range.len
        } else {
            // Zeroes here hide what is below, where this level ends early, too.
            let range = GuestRange::new(at, status.len);
            announce(Mutation::WriteZeroes(range));
            disk.with_pin(async |io| serve::write_zeroes(&**base, io, range, true).await)?;
            range.len
        };
        at += len;
        step(at)?;
    }
    Ok(())
}

/// Forgets everything that the top image holds, so that the disk is what its backing file has.
///
/// # Errors
/// The image's; those of a format that has no backing file.
pub fn make_empty(disk: &Disk) -> Result<()> {
    let top = disk.image();
    disk.with_drained(async |io| top.make_empty(io).await)
        .map_err(|error| error.path(disk.path()))
}

/// Makes the header name another backing file, or none, without looking at what the two hold.
///
/// # Errors
/// The image's; [`Unsupported`](crate::ErrorKind::Unsupported) for a format without backing files.
pub fn set_backing(disk: &Disk, name: Option<&str>, format: Option<&str>) -> Result<()> {
    let top = disk.image();
    disk.with_drained(async |io| top.set_backing(io, name, format).await)
        .map_err(|error| error.path(disk.path()))
}

/// Copies into the image what it does not hold itself and what another backing file would show
/// differently, and makes that durable: after it, [`set_backing`] leaves what the disk reads as it is.
/// Whole clusters are compared and copied; `compressed` compresses them.
///
/// # Errors
/// The host's; an image that cannot be written or has no compressed clusters.
pub fn copy_differences(
    disk: &Disk,
    new: Option<&Disk>,
    compressed: bool,
    step: &mut Step<'_>,
) -> Result<()> {
    let size = disk.size();
    let unit = disk.info().cluster_size.unwrap_or(1).max(1);
    let shared = new.map_or(u32::MAX, |new| shared_depth(disk, new));
    // What lies beyond the old backing file is zero without ever having been written.
    let old_end = disk.image().backing().map_or(0, |old| old.size());
    let mut at = 0;
    while at < size {
        let old = status(disk, at, size - at)?;
        // Held by the image itself, or by what both chains have.
        let same = (old.present && old.depth == 0) || old.depth >= shared;
        let same = same || (old.zero && reads_zero(new, at, old.len)?);
        // Up to a cluster boundary: where the status changes within, its cluster is looked at.
        let whole = if at + old.len >= size {
            size - at
        } else {
            old.len / unit * unit
        };
        if same && whole > 0 {
            at += whole;
        } else {
            let wanted = old.len.next_multiple_of(unit).min(CHUNK.max(unit));
            let len = wanted.min(size - at);
            let range = GuestRange::new(at, len);
            copy_chunk(disk, new, compressed, range, (unit, old_end))?;
            at += len;
        }
        step(at)?;
    }
    disk.flush()
}

fn copy_chunk(
    disk: &Disk,
    new: Option<&Disk>,
    compressed: bool,
    range: GuestRange,
    (unit, old_end): (u64, u64),
) -> Result<()> {
    let (start, len) = (range.start.0, range.len as usize);
    let mut data = AlignedBuf::zeroed(len);
    disk.read_at(&mut data, start)?;
    let mut other = AlignedBuf::zeroed(len);
    if let Some(new) = new {
        let inside = new.size().saturating_sub(start).min(range.len);
        new.read_at(&mut other[..inside as usize], start)?;
    }
    let unit = unit as usize;
    let piece = |from: usize| from..(from + unit).min(len);
    let differs = |from: usize| data[piece(from)] != other[piece(from)];
    let mut from = 0;
    while from < len {
        if !differs(from) || held(disk, start + from as u64)? {
            from = piece(from).end;
            continue;
        }
        let zero = |at: usize| start + at as u64 >= old_end;
        let first = zero(from);
        let mut to = piece(from).end;
        // Neighbours with one request; compressed clusters go one by one.
        while !compressed && to < len && differs(to) && zero(to) == first {
            if held(disk, start + to as u64)? {
                break;
            }
            to = piece(to).end;
        }
        let offset = start + from as u64;
        if first {
            disk.write_zeroes(offset, (to - from) as u64, false)?;
        } else if compressed {
            disk.write_compressed(&data[from..to], offset)?;
        } else {
            disk.write_at(&data[from..to], offset)?;
        }
        from = to;
    }
    Ok(())
}

/// How much of the space of a part of the disk is claimed in advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocate {
    /// Places in the file, without space behind them.
    Metadata,
    /// Space, which the host has reserved.
    Falloc,
    /// Space, which zeroes were written to.
    Full,
}

/// Gives every whole cluster of a part of the disk that has none a place in the file, which reads as
/// zeroes: the part must read as zeroes before. For a raw image the space itself is claimed.
///
/// # Errors
/// The image's of writing, the host's. The disk reads as before then.
pub fn preallocate(disk: &Disk, start: u64, end: u64, how: Preallocate) -> Result<()> {
    let image = disk.image();
    let info = disk.info();
    let unit = info.cluster_size.unwrap_or(1).max(1);
    if info.encrypted {
        // Zeroes of the disk are not zeroes in the file.
        return write_zeroes(disk, start, end);
    }
    let mut at = start.next_multiple_of(unit);
    if info.cluster_size.is_none() {
        if how == Preallocate::Metadata {
            return Ok(());
        }
        let file = image.data_file();
        return disk.with_pin(async |io| claim(io, file, start, end - start, how).await);
    }
    let first = at.min(end);
    if start < first && !has_room(disk, start)? {
        // The cluster that the part starts in may have more than zeroes before.
        let range = GuestRange::new(start, first - start);
        let zeroes = Buffers::owned(AlignedBuf::zeroed(range.len as usize));
        disk.with_pin(async |io| serve::write_image(&**image, io, range, &zeroes, false).await)?;
    }
    while at < end {
        let status = status(disk, at, end - at)?;
        let room = status.depth == 0 && status.offset.is_some();
        if room {
            at = (at + status.len).next_multiple_of(unit);
            continue;
        }
        let range = GuestRange::new(at, (end - at).min(CHUNK.max(unit)));
        let done = disk.with_pin(async |io| {
            let Some(prepared) = image.prepare(io, range).await? else {
                // Another write was faster.
                return Ok(unit.min(range.len));
            };
            let offset = prepared
                .offset
                .0
                .checked_sub(prepared.head)
                .ok_or_else(|| Error::corrupt("a prepared write starts before its file"))?;
            let len = prepared.head + prepared.len + prepared.tail;
            // The last cluster of the disk has all of its place, too.
            let len = len.next_multiple_of(unit);
            claim(io, prepared.file, offset, len, how).await?;
            let done = prepared.len;
            prepared.commit.commit(io).await?;
            Ok(done)
        })?;
        at += done.max(1);
    }
    disk.flush()
}

/// Writes zeroes as data.
fn write_zeroes(disk: &Disk, mut at: u64, end: u64) -> Result<()> {
    let zeroes = AlignedBuf::zeroed(CHUNK.min(end.saturating_sub(at)) as usize);
    while at < end {
        let len = (end - at).min(CHUNK);
        disk.write_at(&zeroes[..len as usize], at)?;
        at += len;
    }
    disk.flush()
}

/// Whether the image itself has a place in a file for what is at an offset.
fn has_room(disk: &Disk, at: u64) -> Result<bool> {
    let status = status(disk, at, 1)?;
    Ok(status.depth == 0 && status.offset.is_some())
}

/// Makes a part of a file that nothing names yet zeroes, with space behind them if asked.
async fn claim(io: &Io, file: FileId, offset: u64, len: u64, how: Preallocate) -> Result<()> {
    let end = offset.saturating_add(len);
    let old_end = io.file_len(file)?;
    if old_end < end {
        io.set_len(file, end).await?;
    }
    let old = old_end.saturating_sub(offset).min(len);
    let zeroed = old == 0
        || io
            .fallocate(file, FallocateMode::ZeroRange, offset, old)
            .await
            .is_ok();
    if how == Preallocate::Falloc
        && zeroed
        && io
            .fallocate(file, FallocateMode::Allocate, offset, len)
            .await
            .is_ok()
    {
        return Ok(());
    }
    let to_write = match (how, zeroed) {
        (Preallocate::Metadata, true) => 0,
        (Preallocate::Metadata, false) => old,
        _ => len,
    };
    let mut done = 0;
    while done < to_write {
        let step = (to_write - done).min(CHUNK);
        let zeroes = AlignedBuf::zeroed(step as usize);
        io.write(file, offset + done, zeroes).await?;
        done += step;
    }
    Ok(())
}

/// Whether the image itself holds what is at an offset.
fn held(disk: &Disk, offset: u64) -> Result<bool> {
    let status = status(disk, offset, 1)?;
    Ok(status.present && status.depth == 0)
}

/// Whether a part of what will be below is known to be zero.
fn reads_zero(disk: Option<&Disk>, at: u64, len: u64) -> Result<bool> {
    let Some(disk) = disk else {
        return Ok(true);
    };
    let end = at.saturating_add(len).min(disk.size());
    if at >= end {
        return Ok(true);
    }
    let status = status(disk, at, end - at)?;
    Ok(status.zero && at + status.len >= end)
}

fn status(disk: &Disk, at: u64, len: u64) -> Result<BlockStatus> {
    let mut status = disk.block_status(at, len)?;
    status.len = status.len.clamp(1, len);
    Ok(status)
}

/// From which level of the disk's chain on `new` has the same images; `u32::MAX` for none.
fn shared_depth(disk: &Disk, new: &Disk) -> u32 {
    let identity = |disk: &Disk, image: &dyn Image| disk.identity(image.data_file());
    let Some(wanted) = identity(new, &**new.image()) else {
        return u32::MAX;
    };
    let mut image = disk.image();
    for depth in 0.. {
        if identity(disk, &**image) == Some(wanted) {
            return depth;
        }
        match image.backing() {
            Some(backing) => image = backing,
            None => break,
        }
    }
    u32::MAX
}

fn below(top: &Arc<dyn Image>, depth: usize) -> Result<&Arc<dyn Image>> {
    let mut image = top;
    for _ in 0..depth {
        image = image.backing().ok_or_else(|| {
            Error::invalid_argument(format!(
                "backing chain: no image {depth} levels below the top"
            ))
        })?;
    }
    Ok(image)
}
