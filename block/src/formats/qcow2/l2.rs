//! L2 entries, standard and extended, and the arithmetic of an image's tables (specification:
//! "Cluster mapping", "Extended L2 Entries").
//!
//! A cluster is made of *units*: what can be allocated, or be zero, by itself. With extended entries
//! these are its 32 subclusters, otherwise the cluster itself is the only one.

use super::header::{Header, Incompatible, be64};
use crate::{Error, GuestOffset, GuestRange, Result};

/// Bit 63 of L1 and L2 entries: the reference count is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry of version 3: reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: host offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The unit in which compressed sizes are stored.
const COMPRESSED_SECTOR: u64 = 512;

/// Bytes of a table slice at most: the unit of the metadata cache.
const MAX_SLICE_BYTES: u64 = 4096;

/// Subclusters of a cluster with an extended entry, as a power of two.
const SUBCLUSTER_BITS: u32 = 5;

/// Sizes of an image's clusters and tables, as shifts, and what its entries can say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    /// Entries of an L2 table.
    pub(super) l2_bits: u32,
    /// Entries of a slice.
    pub(super) slice_bits: u32,
    /// Whether clusters can be marked as zero (version 3).
    pub(super) zero_flag: bool,
    /// L2 entries have 128 bits and describe subclusters.
    pub(super) extended: bool,
    /// Guest data is in a file of its own: it has no reference counts, and offset 0 is a place like
    /// others.
    pub(super) data_file: bool,
}

impl Geometry {
    /// Standard entries, guest data in the image itself.
    #[cfg(test)]
    pub(super) fn new(cluster_bits: u32, version: u32) -> Self {
        Self::with(cluster_bits, version, false, false)
    }

    /// That of an image.
    pub(super) fn of(header: &Header) -> Self {
        Self::with(
            header.cluster_bits,
            header.version,
            header.has(Incompatible::EXTENDED_L2),
            header.has(Incompatible::DATA_FILE),
        )
    }

    fn with(cluster_bits: u32, version: u32, extended: bool, data_file: bool) -> Self {
        let slice = MAX_SLICE_BYTES.min(1 << cluster_bits);
        let entry_bits = 3 + u32::from(extended);
        Self {
            cluster_bits,
            l2_bits: cluster_bits - entry_bits,
            slice_bits: slice.trailing_zeros() - entry_bits,
            zero_flag: version >= 3,
            extended,
            data_file,
        }
    }

    /// Bytes of an L2 entry.
    pub(super) fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// The size of a unit, as a power of two.
    pub(super) fn unit_bits(&self) -> u32 {
        if self.extended {
            self.cluster_bits - SUBCLUSTER_BITS
        } else {
            self.cluster_bits
        }
    }

    /// Bytes of a unit.
    pub(super) fn unit(&self) -> u64 {
        1 << self.unit_bits()
    }

    /// All units of a cluster.
    pub(super) fn all_units(&self) -> Units {
        if self.extended {
            Units(u32::MAX)
        } else {
            Units(1)
        }
    }

    /// The units from `start` to `end`, bytes inside one cluster, that lie there at least in part.
    pub(super) fn units(&self, start: u64, end: u64) -> Units {
        Units::range(
            (start >> self.unit_bits()) as u32,
            end.div_ceil(self.unit()) as u32,
        )
    }

    /// The entries of a whole table, or of a part of it.
    pub(super) fn entries(&self, table: &[u8]) -> impl Iterator<Item = L2Entry> {
        table
            .chunks_exact(self.entry_bytes() as usize)
            .map(|bytes| L2Entry {
                word: be64(bytes, 0),
                bitmap: if bytes.len() > 8 { be64(bytes, 8) } else { 0 },
            })
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The bytes of `offset` inside its cluster.
    pub(super) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The guest cluster of an offset.
    pub(super) fn cluster(&self, offset: GuestOffset) -> u64 {
        offset.0 >> self.cluster_bits
    }

    /// The first byte of a guest cluster.
    pub(super) fn start(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    /// Entries of a slice.
    pub(super) fn slice_len(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> u64 {
        self.entry_bytes() << self.slice_bits
    }

    /// The L1 index of a guest cluster.
    pub(super) fn l1_index(&self, cluster: u64) -> u64 {
        cluster >> self.l2_bits
    }

    /// The number, in guest order, of the slice that holds a cluster's entry.
    pub(super) fn slice(&self, cluster: u64) -> u64 {
        cluster >> self.slice_bits
    }

    /// The place of a cluster's entry in its slice.
    pub(super) fn in_slice(&self, cluster: u64) -> usize {
        (cluster & (self.slice_len() - 1)) as usize
    }

    /// Where the slice of a cluster's entry starts inside its L2 table, in bytes.
    pub(super) fn slice_offset(&self, cluster: u64) -> u64 {
        let index = cluster & ((1 << self.l2_bits) - 1);
        (index >> self.slice_bits) * self.slice_bytes()
    }

    /// The first cluster after those of the slice that holds `cluster`.
    pub(super) fn slice_end(&self, cluster: u64) -> u64 {
        (self.slice(cluster) + 1) << self.slice_bits
    }

    /// The first cluster after those of the L2 table that holds `cluster`.
    pub(super) fn table_end(&self, cluster: u64) -> u64 {
        (self.l1_index(cluster) + 1) << self.l2_bits
    }

    /// The clusters that a range touches: first, and first after.
    pub(super) fn touched(&self, range: GuestRange) -> (u64, u64) {
        let first = self.cluster(range.start);
        let end = range.end().div_ceil(self.cluster_size());
        (first, end.max(first))
    }
}

/// Units of one cluster, a bit for each; the first is bit 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Units(pub(super) u32);

impl Units {
    pub(super) const NONE: Self = Self(0);

    /// The units from `start` to before `end`, at most 32.
    pub(super) fn range(start: u32, end: u32) -> Self {
        let below = |n: u32| u32::MAX.checked_shr(32 - n.min(32)).unwrap_or(0);
        Self(below(end) & !below(start))
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` are among them.
    pub(super) fn contain(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The first unit.
    pub(super) fn first(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The first unit after the last one.
    pub(super) fn end(self) -> u32 {
        32 - self.0.leading_zeros()
    }
}

/// An L2 entry as the table has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L2Entry {
    /// The entry itself.
    pub(super) word: u64,
    /// The second word of an extended entry: allocated subclusters in bits 0 to 31, zero ones in bits
    /// 32 to 63. 0 in a standard entry.
    pub(super) bitmap: u64,
}

impl L2Entry {
    /// A cluster that reads as zeroes, with a host cluster kept for it where `host` is given.
    pub(super) fn zero(host: Option<u64>, geometry: &Geometry) -> Self {
        if geometry.extended {
            Self {
                word: host.map_or(0, |host| host | COPIED),
                bitmap: u64::from(u32::MAX) << 32,
            }
        } else {
            Self {
                word: host.map_or(0, |host| host | COPIED) | ZERO,
                bitmap: 0,
            }
        }
    }

    /// A cluster with one reference at `host`, of which these units are data and those are zero.
    pub(super) fn of_units(host: u64, alloc: Units, zero: Units, geometry: &Geometry) -> Self {
        Self {
            word: host | COPIED,
            bitmap: if geometry.extended {
                u64::from(alloc.0) | u64::from(zero.0) << 32
            } else {
                0
            },
        }
    }

    /// The entry with other subclusters; only for extended entries.
    pub(super) fn with_units(self, alloc: Units, zero: Units) -> Self {
        Self {
            word: self.word,
            bitmap: u64::from(alloc.0) | u64::from(zero.0) << 32,
        }
    }
}

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: ask the backing image.
    Unallocated,
    /// Zeroes, with a host cluster kept for it where `host` is given.
    Zero { host: Option<u64>, copied: bool },
    /// Data at a host offset.
    Data { host: u64, copied: bool },
    /// Some subclusters are data, some zero, and the rest is the backing image's. Also a host cluster
    /// without any data yet.
    Mixed {
        host: Option<u64>,
        copied: bool,
        alloc: Units,
        zero: Units,
    },
    /// Compressed data: where it starts and how many bytes to read, at most.
    Compressed(Compressed),
}

impl Entry {
    /// The host cluster, where there is one as a whole.
    pub(super) fn host(&self) -> Option<u64> {
        match *self {
            Entry::Data { host, .. } => Some(host),
            Entry::Zero { host, .. } | Entry::Mixed { host, .. } => host,
            Entry::Unallocated | Entry::Compressed(_) => None,
        }
    }

    /// The host cluster, if it is this disk's alone and may be written where it is.
    pub(super) fn own_host(&self) -> Option<u64> {
        let (Entry::Data { copied: true, .. }
        | Entry::Zero { copied: true, .. }
        | Entry::Mixed { copied: true, .. }) = self
        else {
            return None;
        };
        self.host()
    }

    /// The units that are data, compressed or not, and those that are zero.
    pub(super) fn units(&self, geometry: &Geometry) -> (Units, Units) {
        let all = geometry.all_units();
        match *self {
            Entry::Unallocated => (Units::NONE, Units::NONE),
            Entry::Zero { .. } => (Units::NONE, all),
            Entry::Data { .. } | Entry::Compressed(_) => (all, Units::NONE),
            Entry::Mixed { alloc, zero, .. } => (alloc, zero),
        }
    }

    /// How the start of a run of guest bytes inside the cluster lives, and how far.
    pub(super) fn piece(&self, part: GuestRange, geometry: &Geometry) -> (Piece, u64) {
        let within = geometry.in_cluster(part.start.0);
        let data = |host: u64| Piece::Data(host + within);
        match *self {
            Entry::Unallocated => (Piece::Unallocated(None), part.len),
            Entry::Zero { host, .. } => (Piece::Zero(host.map(|host| host + within)), part.len),
            Entry::Data { host, .. } => (data(host), part.len),
            Entry::Compressed(_) => (Piece::Compressed, part.len),
            Entry::Mixed {
                host, alloc, zero, ..
            } => {
                let unit = (within >> geometry.unit_bits()) as u32;
                let bits = |units: Units| (units.0 >> unit).trailing_ones();
                let at = host.map(|host| host + within);
                let (piece, run) = match (bits(alloc), bits(zero)) {
                    (0, 0) => {
                        let neither = Units(!(alloc.0 | zero.0));
                        (Piece::Unallocated(at), bits(neither))
                    }
                    (0, run) => (Piece::Zero(at), run),
                    // Data has a host cluster: checked when the entry was read.
                    (run, _) => (data(host.unwrap_or(0)), run),
                };
                let end = u64::from(unit + run) << geometry.unit_bits();
                (piece, part.len.min(end - within))
            }
        }
    }
}

/// How a run inside a cluster lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// As the backing image has it; the place kept for it, where there is one.
    Unallocated(Option<u64>),
    /// Zeroes; the place kept for them, where there is one.
    Zero(Option<u64>),
    /// Data at a host offset.
    Data(u64),
    /// A part of compressed data.
    Compressed,
}

/// Where compressed data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Compressed {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Compressed {
    /// The host clusters that it touches: first and last.
    pub(super) fn clusters(&self, geometry: &Geometry) -> (u64, u64) {
        let last = self.offset.saturating_add(self.len.max(1)) - 1;
        (
            self.offset >> geometry.cluster_bits,
            last >> geometry.cluster_bits,
        )
    }

    /// The first byte after it.
    pub(super) fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// The L2 entry for `bytes` of data at `offset`; `None` when it cannot be expressed.
    pub(super) fn entry(offset: u64, bytes: u64, geometry: &Geometry) -> Option<u64> {
        let shift = 62 - (geometry.cluster_bits - 8);
        let first = offset / COMPRESSED_SECTOR;
        let last = (offset + bytes - 1) / COMPRESSED_SECTOR;
        let more = last - first;
        if offset >> shift != 0 || more >> (geometry.cluster_bits - 8) != 0 {
            return None;
        }
        Some(COMPRESSED | more << shift | offset)
    }
}

/// Reads an L2 entry; `cluster` is the guest cluster it is for.
pub(super) fn decode(raw: L2Entry, cluster: u64, geometry: &Geometry) -> Result<Entry> {
    let word = raw.word;
    if word & COMPRESSED != 0 {
        if geometry.data_file {
            return Err(bad_entry(
                raw,
                cluster,
                "no compressed cluster with a data file",
            ));
        }
        let shift = 62 - (geometry.cluster_bits - 8);
        let offset = word & ((1 << shift) - 1);
        let more = (word & !(COMPRESSED | COPIED)) >> shift;
        return Ok(Entry::Compressed(Compressed {
            offset,
            len: (more + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR,
        }));
    }
    let offset = word & OFFSET_MASK;
    let copied = word & COPIED != 0;
    if geometry.in_cluster(offset) != 0 {
        return Err(bad_entry(
            raw,
            cluster,
            "a host offset on a cluster boundary",
        ));
    }
    let is_zero = word & ZERO != 0 && !geometry.extended;
    // In a data file the flag COPIED tells offset 0 from nothing.
    let host = (offset != 0 || (geometry.data_file && copied && !is_zero)).then_some(offset);
    if is_zero {
        if !geometry.zero_flag {
            return Err(bad_entry(raw, cluster, "no zero flag in a version 2 image"));
        }
        return Ok(Entry::Zero { host, copied });
    }
    if host.is_none() && copied {
        // The flag without an offset would put guest data over the header.
        return Err(bad_entry(
            raw,
            cluster,
            "a host offset with the flag COPIED",
        ));
    }
    if geometry.extended {
        return decode_units(raw, cluster, host, copied);
    }
    Ok(match host {
        Some(host) => Entry::Data { host, copied },
        None => Entry::Unallocated,
    })
}

/// Reads the second word of an extended entry.
fn decode_units(raw: L2Entry, cluster: u64, host: Option<u64>, copied: bool) -> Result<Entry> {
    let (alloc, zero) = (Units(raw.bitmap as u32), Units((raw.bitmap >> 32) as u32));
    if alloc.0 & zero.0 != 0 {
        return Err(bad_entry(
            raw,
            cluster,
            "no subcluster that is allocated and zero",
        ));
    }
    if host.is_none() && !alloc.is_empty() {
        return Err(bad_entry(
            raw,
            cluster,
            "a host offset for allocated subclusters",
        ));
    }
    Ok(match (host, alloc.0, zero.0) {
        (Some(host), u32::MAX, _) => Entry::Data { host, copied },
        (host, _, u32::MAX) => Entry::Zero { host, copied },
        (None, 0, 0) => Entry::Unallocated,
        _ => Entry::Mixed {
            host,
            copied,
            alloc,
            zero,
        },
    })
}

/// A number as QEMU prints it in its messages.
pub(super) fn hex(number: u64) -> String {
    if number == 0 {
        "0".into()
    } else {
        format!("{number:#x}")
    }
}

fn bad_entry(raw: L2Entry, cluster: u64, expected: &str) -> Error {
    let L2Entry { word, bitmap } = raw;
    let more = if bitmap == 0 {
        String::new()
    } else {
        format!(" {bitmap:#018x}")
    };
    Error::corrupt(format!(
        "L2 entry of guest cluster {cluster}: {word:#018x}{more}, expected {expected}"
    ))
}

#[cfg(test)]
mod tests;
