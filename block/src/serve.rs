//! The life of a request behind the map's fast path: what one task does for it.
//!
//! The same code serves the queues of every engine and the synchronous calls of [`DiskFile`](crate::DiskFile).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    Error, ErrorKind, GuestRange, HostOffset, Result,
    detect::{self, RawGuard},
    encryption::{Encryption, Place},
    faults::Event,
    hooks::{Hooks, Mutation},
    image::{ExtentKind, Extents, Image, Intent, Prepared},
    io::{AlignedBuf, Buffers, Io, RequestOp, Segment, Segments},
    options::{DetectZeroes, DiscardPolicy},
    sync::{LocalFuture, join_all},
};

/// The most zero bytes written with one operation where a map cannot express zeroes.
const ZERO_CHUNK: u64 = 1 << 20;

/// The most bytes read without need, so that what lies before and after them is one read.
const MAX_GAP: u64 = 16 << 10;

/// How a disk treats requests, fixed when it is opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Policy {
    pub(crate) read_only: bool,
    pub(crate) discard: DiscardPolicy,
    pub(crate) detect_zeroes: DetectZeroes,
    /// Every change is durable before it completes.
    pub(crate) write_through: bool,
    /// Tables are written, in crash order, before the change that needs them completes.
    pub(crate) restartable: bool,
}

impl Policy {
    /// Whether a write may go from the map straight to the engine.
    pub(crate) fn allows_direct_write(&self) -> bool {
        !self.read_only
            && !self.write_through
            && !self.restartable
            && self.detect_zeroes == DetectZeroes::Off
    }
}

/// What requests are served from.
pub(crate) struct Served {
    pub(crate) image: Arc<dyn Image>,
    pub(crate) policy: Policy,
    pub(crate) guard: Option<RawGuard>,
    pub(crate) hooks: Hooks,
    /// The disk was closed: nothing is accepted any more.
    pub(crate) closed: AtomicBool,
}

/// The change a request makes.
pub(crate) fn mutation(op: &RequestOp) -> Option<Mutation> {
    match op {
        RequestOp::Read { .. } | RequestOp::Flush => None,
        RequestOp::Write {
            offset, buffers, ..
        } => Some(Mutation::Write(GuestRange::new(*offset, buffers.len()))),
        RequestOp::Discard { offset, len } => {
            Some(Mutation::Discard(GuestRange::new(*offset, *len)))
        }
        RequestOp::WriteZeroes { offset, len, .. } => {
            Some(Mutation::WriteZeroes(GuestRange::new(*offset, *len)))
        }
    }
}

/// Checks a request against the disk before anything is started.
pub(crate) fn check(served: &Served, op: &RequestOp) -> Result<(), ErrorKind> {
    if served.closed.load(Ordering::Acquire) {
        return Err(ErrorKind::Io(libc::EBADF));
    }
    let (offset, len) = match op {
        RequestOp::Flush => return Ok(()),
        RequestOp::Read { offset, buffers }
        | RequestOp::Write {
            offset, buffers, ..
        } => (*offset, buffers.len()),
        RequestOp::Discard { offset, len } | RequestOp::WriteZeroes { offset, len, .. } => {
            (*offset, *len)
        }
    };
    if served.policy.read_only && !matches!(op, RequestOp::Read { .. }) {
        return Err(ErrorKind::ReadOnly);
    }
    match offset.checked_add(len) {
        Some(end) if end <= served.image.size() => Ok(()),
        _ => Err(ErrorKind::OutOfRange),
    }
}

/// Serves a request that [`check`] found good, from start to end.
pub(crate) async fn serve(served: &Served, io: &Io, op: &RequestOp) -> Result<()> {
    io.inject_request(op)?;
    match op {
        RequestOp::Read { offset, buffers } => {
            let range = GuestRange::new(*offset, buffers.len());
            read(&*served.image, io, range, buffers, 0).await
        }
        RequestOp::Write {
            offset,
            buffers,
            fua,
        } => {
            let durable = (*fua || served.policy.write_through) && !io.never_syncs();
            write(served, io, *offset, buffers, durable).await
        }
        RequestOp::Flush => flush(served, io).await,
        RequestOp::Discard { offset, len } => {
            if served.policy.discard == DiscardPolicy::Unmap {
                let range = GuestRange::new(*offset, *len);
                served.image.discard(io, range).await?;
            }
            settle(served, io, served.policy.write_through).await
        }
        RequestOp::WriteZeroes {
            offset,
            len,
            may_unmap,
        } => {
            let unmap = *may_unmap && served.policy.discard == DiscardPolicy::Unmap;
            write_zeroes(&*served.image, io, GuestRange::new(*offset, *len), unmap).await?;
            settle(served, io, served.policy.write_through).await
        }
    }
}

/// Makes everything that completed before durable.
pub(crate) async fn flush(served: &Served, io: &Io) -> Result<()> {
    served.image.flush(io).await
}

/// What follows a change of the map before its request completes.
pub(crate) async fn settle(served: &Served, io: &Io, durable: bool) -> Result<()> {
    if durable {
        flush(served, io).await
    } else if served.policy.restartable {
        served.image.write_back(io).await
    } else {
        Ok(())
    }
}

/// Reads a range of an image, through its backing chain, into `buffers` from `at`.
pub(crate) async fn read(
    image: &dyn Image,
    io: &Io,
    mut range: GuestRange,
    buffers: &Buffers,
    mut at: u64,
) -> Result<()> {
    let mut extents = Extents::default();
    while range.len > 0 {
        extents.clear();
        image.map(io, range, &mut extents).await?;
        if extents.is_empty() {
            return Err(Error::corrupt("the image mapped nothing").offset(range.start.0));
        }
        let mut pieces: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
        for extent in extents.as_slice() {
            let part = range.take(extent.len);
            let place = at;
            match extent.kind {
                ExtentKind::Zero => buffers.fill_zero(place, extent.len),
                ExtentKind::Data { file, offset } => {
                    let segments = buffers.part(place, extent.len);
                    pieces.push(Box::pin(async move {
                        io.event(file, Event::ReadAio).await;
                        io.read_segments(file, offset.0, segments).await
                    }));
                }
                ExtentKind::Encrypted {
                    depth,
                    file,
                    offset,
                } => {
                    let encryption = encryption_of(image_at(image, u32::from(depth))?)?;
                    let data = Place {
                        file,
                        host: offset,
                        guest: part.start.0,
                    };
                    let segments = buffers.part(place, extent.len);
                    pieces.push(Box::pin(encryption.read(io, data, segments)));
                }
                ExtentKind::Opaque { depth } => {
                    let holder = image_at(image, depth)?;
                    pieces.push(holder.read_opaque(io, part, buffers, place));
                }
            }
            range = range.skip(extent.len);
            at += extent.len;
        }
        join_all(pieces).await.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

/// The image `depth` levels down the backing chain.
pub(crate) fn image_at(mut image: &dyn Image, depth: u32) -> Result<&dyn Image> {
    for _ in 0..depth {
        image = match image.backing() {
            Some(backing) => &**backing,
            None => {
                return Err(Error::corrupt(
                    "an extent names an image below the last one",
                ));
            }
        };
    }
    Ok(image)
}

/// How the data of an image is encrypted whose extents say that it is.
pub(crate) fn encryption_of(image: &dyn Image) -> Result<&Encryption> {
    match image.encryption() {
        Some(encryption) => Ok(encryption),
        None => Err(Error::corrupt(
            "an extent is encrypted, but its image is not",
        )),
    }
}

/// Reads a range of an image into memory of its own; what lies beyond the end of the image is
/// zero.
pub(crate) async fn read_owned(
    image: &dyn Image,
    io: &Io,
    range: GuestRange,
) -> Result<AlignedBuf> {
    let inside = range.take(image.size().saturating_sub(range.start.0));
    let bytes = if inside.len == range.len {
        io.spare.take(range.len as usize)
    } else {
        AlignedBuf::zeroed(range.len as usize)
    };
    let buffers = Buffers::owned(bytes);
    read(image, io, inside, &buffers, 0).await?;
    buffers
        .into_owned()
        .ok_or_else(|| Error::new(ErrorKind::Cancelled))
}

async fn write(
    served: &Served,
    io: &Io,
    offset: u64,
    buffers: &Buffers,
    durable: bool,
) -> Result<()> {
    let range = GuestRange::new(offset, buffers.len());
    let mut copied = None;
    let _guarded = match &served.guard {
        Some(guard) if guard.concerns(range, served.image.size()) => {
            let lease = guard.enter().await;
            let copy = copy_of(buffers);
            check_guarded(served, io, range, &copy).await?;
            copied = Some(copy);
            Some(lease)
        }
        _ => None,
    };
    if served.policy.detect_zeroes != DetectZeroes::Off {
        // What was looked at is what is written: the guest may change its memory meanwhile.
        let copy = copied.take().unwrap_or_else(|| copy_of(buffers));
        if copy.iter().all(|byte| *byte == 0) {
            let unmap = served.policy.detect_zeroes == DetectZeroes::Unmap;
            write_zeroes(&*served.image, io, range, unmap).await?;
            return settle(served, io, durable).await;
        }
        copied = Some(copy);
    }
    let owned = copied.map(Buffers::owned);
    let buffers = owned.as_ref().unwrap_or(buffers);
    if write_image(&*served.image, io, range, buffers, durable).await? {
        settle(served, io, durable).await?;
    }
    Ok(())
}

fn copy_of(buffers: &Buffers) -> AlignedBuf {
    let mut copy = AlignedBuf::zeroed(buffers.len() as usize);
    buffers.copy_out(0, &mut copy);
    copy
}

/// Refuses a write to a guessed raw disk that would make it an image of another format.
async fn check_guarded(served: &Served, io: &Io, range: GuestRange, data: &[u8]) -> Result<()> {
    let image = &*served.image;
    let mut probe = detect::Probe::default();
    for part in detect::probed_ranges(image.size()) {
        let mut bytes = read_owned(image, io, part).await?;
        let start = part.start.0.max(range.start.0);
        let end = part.end().min(range.end());
        if start < end {
            let from = &data[(start - range.start.0) as usize..(end - range.start.0) as usize];
            bytes[(start - part.start.0) as usize..(end - part.start.0) as usize]
                .copy_from_slice(from);
        }
        probe.add(part, &bytes);
    }
    match probe.recognise() {
        None => Ok(()),
        Some(found) => Err(Error::with_message(
            ErrorKind::Denied,
            format!(
                "write refused: it would turn this disk, whose raw format was guessed, into a {found} image; open it with the format named to allow that"
            ),
        )
        .offset(range.start.0)),
    }
}

/// Writes a range. Returns whether the caller must still make it durable, or settle the map.
pub(crate) async fn write_image(
    image: &dyn Image,
    io: &Io,
    mut range: GuestRange,
    buffers: &Buffers,
    durable: bool,
) -> Result<bool> {
    let mut at = 0;
    let mut unsettled = false;
    let mut extents = Extents::default();
    while range.len > 0 {
        extents.clear();
        image.try_map(
            range,
            Intent::WriteInPlace,
            &mut io.cache.borrow_mut(),
            &mut extents,
        )?;
        if extents.is_empty() {
            if let Some(prepared) = image.prepare(io, range).await? {
                let done = prepared.len;
                write_prepared(image, io, range.take(done), prepared, buffers, at).await?;
                unsettled = true;
                range = range.skip(done);
                at += done;
            }
            continue;
        }
        let in_place = range.take(extents.len());
        // Another write may have made the mapping just now: then this one relies on it too.
        let settled = image.mapping_is_durable(in_place);
        let dsync = durable && settled;
        unsettled |= !settled;
        let mut pieces = Vec::new();
        let mut guest = range.start.0;
        for extent in extents.as_slice() {
            let segments = buffers.part(at, extent.len);
            pieces.push(write_extent(image, io, extent.kind, guest, segments, dsync));
            at += extent.len;
            guest += extent.len;
        }
        join_all(pieces).await.into_iter().collect::<Result<()>>()?;
        range = range.skip(in_place.len);
    }
    Ok(unsettled)
}

/// Writes data in place, where the map says that it is.
async fn write_extent(
    image: &dyn Image,
    io: &Io,
    kind: ExtentKind,
    guest: u64,
    segments: Segments,
    dsync: bool,
) -> Result<()> {
    match kind {
        ExtentKind::Data { file, offset } => {
            io.event(file, Event::WriteAio).await;
            io.write_segments(file, offset.0, segments, dsync).await
        }
        ExtentKind::Encrypted {
            depth: 0,
            file,
            offset: host,
        } => {
            let place = Place { file, host, guest };
            let encryption = encryption_of(image)?;
            Box::pin(encryption.write(io, place, segments, dsync)).await
        }
        _ => Err(Error::corrupt("a write in place was mapped to no data")),
    }
}

/// What a prepared write writes around its data.
struct Surroundings {
    bytes: AlignedBuf,
    /// Where in `bytes` the part after the data starts.
    tail: usize,
}

/// Reads what surrounds the data: with one operation where that is not much more than is needed.
async fn surroundings(
    image: &dyn Image,
    io: &Io,
    range: GuestRange,
    prepared: &Prepared<'_>,
) -> Result<Surroundings> {
    let (head, tail) = (prepared.head, prepared.tail);
    if prepared.fill_zero || head + tail == 0 {
        return Ok(Surroundings {
            bytes: AlignedBuf::zeroed((head + tail) as usize),
            tail: head as usize,
        });
    }
    let start = range.start.0 - head;
    if head > 0 && tail > 0 && range.len <= MAX_GAP {
        let all = GuestRange::new(start, head + range.len + tail);
        return Ok(Surroundings {
            bytes: read_owned(image, io, all).await?,
            tail: (head + range.len) as usize,
        });
    }
    let buffers = Buffers::owned(AlignedBuf::zeroed((head + tail) as usize));
    let parts = [(start, head, 0), (range.end(), tail, head)];
    let reads = parts.iter().map(|&(start, len, at)| {
        let inside = len.min(image.size().saturating_sub(start));
        read(image, io, GuestRange::new(start, inside), &buffers, at)
    });
    join_all(reads).await.into_iter().collect::<Result<()>>()?;
    Ok(Surroundings {
        bytes: buffers
            .into_owned()
            .ok_or_else(|| Error::new(ErrorKind::Cancelled))?,
        tail: head as usize,
    })
}

/// Copies what surrounds the data, writes everything with one operation and commits.
async fn write_prepared(
    image: &dyn Image,
    io: &Io,
    range: GuestRange,
    prepared: Prepared<'_>,
    buffers: &Buffers,
    at: u64,
) -> Result<()> {
    let mut around = surroundings(image, io, range, &prepared).await?;
    let (head, rest) = around.bytes.split_at_mut(around.tail);
    let head = &mut head[..prepared.head as usize];
    let mut segments = buffers.part(at, range.len);
    if !head.is_empty() {
        segments.insert(0, Segment::new(head.as_mut_ptr(), head.len()));
    }
    if !rest.is_empty() {
        segments.push(Segment::new(rest.as_mut_ptr(), rest.len()));
    }
    let start = prepared
        .offset
        .0
        .checked_sub(prepared.head)
        .ok_or_else(|| Error::corrupt("a prepared write starts before its file"))?;
    io.event(prepared.file, Event::WriteAio).await;
    match image.encryption() {
        None => {
            io.write_segments(prepared.file, start, segments, false)
                .await?;
        }
        Some(encryption) => {
            let place = Place {
                file: prepared.file,
                host: HostOffset(start),
                guest: range.start.0 - prepared.head,
            };
            Box::pin(encryption.write(io, place, segments, false)).await?;
        }
    }
    io.spare.keep(around.bytes);
    prepared.commit.commit(io).await
}

/// Makes a range of an image read as zeroes.
pub(crate) async fn write_zeroes(
    image: &dyn Image,
    io: &Io,
    mut range: GuestRange,
    may_unmap: bool,
) -> Result<()> {
    while range.len > 0 {
        let done = image.write_zeroes(io, range, may_unmap).await?;
        if done > 0 {
            range = range.skip(done);
            continue;
        }
        let plain = image.unaligned_zeroes(range).clamp(1, ZERO_CHUNK);
        let part = range.take(plain);
        let zeroes = Buffers::owned(AlignedBuf::zeroed(part.len as usize));
        write_image(image, io, part, &zeroes, false).await?;
        range = range.skip(part.len);
    }
    Ok(())
}
