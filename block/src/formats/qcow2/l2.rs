//! L2 entries of 64 bits and the arithmetic of an image's tables (specification: "Cluster mapping").

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

/// Sizes of an image's clusters and tables, as shifts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    /// Entries of an L2 table.
    pub(super) l2_bits: u32,
    /// Entries of a slice.
    pub(super) slice_bits: u32,
    /// Whether clusters can be marked as zero (version 3).
    pub(super) zero_flag: bool,
}

impl Geometry {
    pub(super) fn new(cluster_bits: u32, version: u32) -> Self {
        let slice = MAX_SLICE_BYTES.min(1 << cluster_bits);
        Self {
            cluster_bits,
            l2_bits: cluster_bits - 3,
            slice_bits: slice.trailing_zeros() - 3,
            zero_flag: version >= 3,
        }
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
        8 << self.slice_bits
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

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: ask the backing image.
    Unallocated,
    /// Zeroes, with a host cluster kept for it where `host` is given.
    Zero { host: Option<u64>, copied: bool },
    /// Data at a host offset.
    Data { host: u64, copied: bool },
    /// Compressed data: where it starts and how many bytes to read, at most.
    Compressed(Compressed),
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

/// The L2 entry of a plain cluster with one reference.
pub(super) fn data_entry(host: u64) -> u64 {
    host | COPIED
}

/// Reads an L2 entry; `cluster` is the guest cluster it is for.
pub(super) fn decode(raw: u64, cluster: u64, geometry: &Geometry) -> Result<Entry> {
    if raw & COMPRESSED != 0 {
        let shift = 62 - (geometry.cluster_bits - 8);
        let offset = raw & ((1 << shift) - 1);
        let more = (raw & !(COMPRESSED | COPIED)) >> shift;
        return Ok(Entry::Compressed(Compressed {
            offset,
            len: (more + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR,
        }));
    }
    let host = raw & OFFSET_MASK;
    let copied = raw & COPIED != 0;
    if geometry.in_cluster(host) != 0 {
        return Err(bad_entry(
            raw,
            cluster,
            "a host offset on a cluster boundary",
        ));
    }
    if raw & ZERO != 0 {
        if !geometry.zero_flag {
            return Err(bad_entry(raw, cluster, "no zero flag in a version 2 image"));
        }
        return Ok(Entry::Zero {
            host: (host != 0).then_some(host),
            copied,
        });
    }
    if host == 0 {
        // The flag without an offset would put guest data over the header.
        return if copied {
            Err(bad_entry(
                raw,
                cluster,
                "a host offset with the flag COPIED",
            ))
        } else {
            Ok(Entry::Unallocated)
        };
    }
    Ok(Entry::Data { host, copied })
}

fn bad_entry(raw: u64, cluster: u64, expected: &str) -> Error {
    Error::corrupt(format!(
        "L2 entry of guest cluster {cluster}: {raw:#018x}, expected {expected}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V3: u32 = 3;

    #[test]
    fn compressed_entries_round_trip_at_every_cluster_size() {
        for bits in 9..=21 {
            let geometry = Geometry::new(bits, V3);
            for (offset, bytes) in [(0x5000, 1), (0x5001, 511), (0x51ff, 2), (0x5100, 300)] {
                let raw = Compressed::entry(offset, bytes, &geometry).unwrap();
                let Entry::Compressed(found) = decode(raw, 0, &geometry).unwrap() else {
                    panic!("a compressed entry");
                };
                assert_eq!(found.offset, offset);
                assert!(found.len >= bytes, "{bits}: {} of {bytes}", found.len);
                assert_eq!((found.offset + found.len) % 512, 0);
            }
        }
    }

    #[test]
    fn entries_are_told_apart() {
        let v3 = Geometry::new(16, 3);
        let v2 = Geometry::new(16, 2);
        let read = |raw| decode(raw, 0, &v3).unwrap();
        assert_eq!(read(0), Entry::Unallocated);
        assert_eq!(
            read(COPIED | 0x50000),
            Entry::Data {
                host: 0x50000,
                copied: true
            }
        );
        assert_eq!(
            read(ZERO),
            Entry::Zero {
                host: None,
                copied: false
            }
        );
        assert_eq!(
            read(0x50000 | ZERO),
            Entry::Zero {
                host: Some(0x50000),
                copied: false
            }
        );
        assert!(decode(0x50200, 0, &v3).is_err());
        assert!(decode(0x50000 | ZERO, 0, &v2).is_err());
        assert!(decode(COPIED, 0, &v3).is_err());
    }
}
