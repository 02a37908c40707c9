//! Encrypted data: what lies between the extents of an encrypted image and its host file.
//!
//! The guest's memory never holds ciphertext: a read decrypts in a buffer of its own, and a write
//! encrypts a copy. A write that fills no whole sector reads the rest of it first, with every other
//! write to that sector excluded.

use std::sync::Arc;

use crate::{
    Error, ErrorKind, FileId, HostOffset, Result,
    crypto::{SECTOR_SIZE, SectorCipher},
    io::{AlignedBuf, Io, RangeTable, Segment, Segments, gather, part_of, scatter},
    sync::join_all,
};

/// Bytes read or written with one operation, and given to one thread of the pool.
const PIECE: u64 = 128 << 10;
/// Pieces of one request on their way at a time: what bounds its memory.
const PIECES_AT_A_TIME: usize = 16;

/// The most bytes that the calling thread encrypts by itself; more goes to the pool. Measured with
/// `benches/crypto.rs`.
const INLINE: usize = 32 << 10;
/// The same for ciphers that the processor has no instructions for.
const INLINE_SLOW: usize = 512;

/// What the sectors of an image are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CountedFrom {
    /// Where they lie in the host file.
    HostOffset,
    /// Where the guest sees them.
    GuestOffset,
}

/// How the data of an image is encrypted.
#[derive(Debug)]
pub struct Encryption {
    /// None where the image was opened without its key.
    cipher: Option<Arc<SectorCipher>>,
    counted_from: CountedFrom,
    /// Writes in flight, by host offset.
    ranges: RangeTable,
}

/// Where a run of encrypted bytes starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) file: FileId,
    pub(crate) host: HostOffset,
    /// The guest's offset.
    pub(crate) guest: u64,
}

#[derive(Clone, Copy, Debug)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl Direction {
    fn apply(self, cipher: &SectorCipher, first: u64, data: &mut [u8]) {
        match self {
            Direction::Encrypt => cipher.encrypt(first, data),
            Direction::Decrypt => cipher.decrypt(first, data),
        }
    }
}

/// A run in whole sectors: what a request touches.
struct Span {
    file: FileId,
    /// Where the first sector is in the file.
    host: u64,
    /// Its number.
    sector: u64,
    /// Bytes of it before the request.
    lead: u64,
    /// Bytes of the request.
    len: u64,
    /// Bytes of all sectors.
    total: u64,
}

/// A part of a span.
#[derive(Clone, Copy)]
struct Piece {
    /// Bytes from the start of the span.
    at: u64,
    len: u64,
}

impl Span {
    /// The pieces of the span, by lists of those on their way together.
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        let total = self.total;
        (0..total).step_by(PIECE as usize).map(move |at| Piece {
            at,
            len: PIECE.min(total - at),
        })
    }

    /// The part of the request in a piece: bytes from its start, and how many.
    fn in_request(&self, piece: Piece) -> (u64, u64) {
        let start = piece.at.max(self.lead);
        let end = (piece.at + piece.len).min(self.lead + self.len);
        (start - self.lead, end - start)
    }

    fn sector_of(&self, at: u64) -> u64 {
        self.sector + at / SECTOR_SIZE
    }
}

impl Encryption {
    /// Data under a cipher, or, without one, data that cannot be read or written.
    pub(crate) fn new(cipher: Option<SectorCipher>, counted_from: CountedFrom) -> Arc<Self> {
        Arc::new(Self {
            cipher: cipher.map(Arc::new),
            counted_from,
            ranges: RangeTable::default(),
        })
    }

    fn span(&self, place: Place, segments: &[Segment]) -> Result<Span> {
        let len: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let lead = place.host.0 % SECTOR_SIZE;
        let counted = match self.counted_from {
            CountedFrom::HostOffset => place.host.0,
            CountedFrom::GuestOffset => place.guest,
        };
        if counted % SECTOR_SIZE != lead {
            return Err(
                Error::corrupt("encrypted sectors that the file cuts in two").offset(place.host.0),
            );
        }
        let total = lead
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(SECTOR_SIZE))
            .filter(|total| place.host.0.checked_add(*total).is_some())
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange).offset(place.host.0))?;
        Ok(Span {
            file: place.file,
            host: place.host.0 - lead,
            sector: counted / SECTOR_SIZE,
            lead,
            len,
            total,
        })
    }

    /// Reads into segments that the caller keeps valid until this future ends.
    pub(crate) async fn read(&self, io: &Io, place: Place, segments: Segments) -> Result<()> {
        let span = self.span(place, &segments)?;
        let mut pieces = span.pieces().peekable();
        while pieces.peek().is_some() {
            let some = pieces.by_ref().take(PIECES_AT_A_TIME);
            let reads = some.map(|piece| self.read_piece(io, &span, piece, &segments));
            join_all(reads).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    async fn read_piece(
        &self,
        io: &Io,
        span: &Span,
        piece: Piece,
        segments: &[Segment],
    ) -> Result<()> {
        let plain = self.read_sectors(io, span, piece).await?;
        let (start, len) = span.in_request(piece);
        let from = (start + span.lead - piece.at) as usize;
        scatter(
            &part_of(segments, start, len),
            &plain[from..from + len as usize],
        );
        Ok(())
    }

    /// Reads whole sectors and decrypts them.
    async fn read_sectors(&self, io: &Io, span: &Span, piece: Piece) -> Result<AlignedBuf> {
        let data = io
            .read_padded(span.file, span.host + piece.at, piece.len as usize)
            .await?;
        self.transform(io, data, span.sector_of(piece.at), Direction::Decrypt)
            .await
    }

    /// Writes segments that the caller keeps valid until this future ends.
    pub(crate) async fn write(
        &self,
        io: &Io,
        place: Place,
        segments: Segments,
        dsync: bool,
    ) -> Result<()> {
        let span = self.span(place, &segments)?;
        let whole = span.lead == 0 && span.len == span.total;
        let _range = self
            .ranges
            .hold(span.host, span.host + span.total, !whole)
            .await;
        let mut pieces = span.pieces().peekable();
        while pieces.peek().is_some() {
            let some = pieces.by_ref().take(PIECES_AT_A_TIME);
            let writes = some.map(|piece| self.write_piece(io, &span, piece, &segments, dsync));
            join_all(writes).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    async fn write_piece(
        &self,
        io: &Io,
        span: &Span,
        piece: Piece,
        segments: &[Segment],
        dsync: bool,
    ) -> Result<()> {
        let (start, len) = span.in_request(piece);
        let from = start + span.lead - piece.at;
        let mut data = AlignedBuf::zeroed(piece.len as usize);
        // The sectors that the request does not fill: the first, and the last unless it is that.
        let last = piece.len - SECTOR_SIZE;
        let partial = [
            (from > 0).then_some(0),
            (from + len < piece.len && (last > 0 || from == 0)).then_some(last),
        ];
        for at in partial.into_iter().flatten() {
            let sector = Piece {
                at: piece.at + at,
                len: SECTOR_SIZE,
            };
            let plain = self.read_sectors(io, span, sector).await?;
            data[at as usize..(at + SECTOR_SIZE) as usize].copy_from_slice(&plain);
        }
        let from = from as usize;
        gather(
            &part_of(segments, start, len),
            &mut data[from..from + len as usize],
        );
        let mut data = self
            .transform(io, data, span.sector_of(piece.at), Direction::Encrypt)
            .await?;
        let mut whole = Segments::new();
        whole.push(Segment::new(data.as_mut_ptr(), data.len()));
        io.write_segments(span.file, span.host + piece.at, whole, dsync)
            .await
    }

    /// Encrypts or decrypts whole sectors, here or on the pool.
    async fn transform(
        &self,
        io: &Io,
        mut data: AlignedBuf,
        first: u64,
        direction: Direction,
    ) -> Result<AlignedBuf> {
        let Some(cipher) = &self.cipher else {
            return Err(Error::with_message(
                ErrorKind::Denied,
                "the image is encrypted and was opened without its key",
            ));
        };
        let inline = if cipher.is_slow() {
            INLINE_SLOW
        } else {
            INLINE
        };
        if data.len() <= inline {
            direction.apply(cipher, first, &mut data);
            return Ok(data);
        }
        let cipher = Arc::clone(cipher);
        io.run(move || {
            direction.apply(&cipher, first, &mut data);
            data
        })
        .await
    }
}
