//! The bare codec: what decompressing the clusters of an image costs with nothing around it, or with
//! nothing but a `pread` of each.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use platter_benches::{
    Result, Work,
    side::{Load, Stop},
    stride::Pattern,
};
use zstd::{bulk::Decompressor, zstd_safe::find_frame_compressed_size};

/// The compressed clusters of an image, and a decompressor.
pub(super) struct BareCodec {
    codec: Decompressor<'static>,
    clusters: Clusters,
    cluster_size: u64,
    plain: Vec<u8>,
    work: Work,
    pattern: Pattern,
    offset: u64,
}

/// Where compressed clusters come from.
enum Clusters {
    /// Memory.
    Frames(Vec<Vec<u8>>),
    /// The image, in which each has a place; and a buffer.
    File(File, Vec<Place>, Vec<u8>),
}

/// Offset and length of a frame, in bytes.
struct Place {
    offset: u64,
    len: usize,
}

impl BareCodec {
    /// All compressed clusters of a qcow2 image whose data is compressed by zstd; read now, or each when
    /// it is wanted.
    pub(super) fn new(path: &Path, work: Work, pattern: Pattern, read_each: bool) -> Result<Self> {
        let file = File::open(path)?;
        let (cluster_size, places) = compressed_clusters(&file)?;
        let clusters = if read_each {
            let longest = places.iter().map(|place| place.len).max();
            Clusters::File(file, places, vec![0; longest.unwrap_or(0)])
        } else {
            let frames = places
                .iter()
                .map(|place| read(&file, place.offset, place.len));
            Clusters::Frames(frames.collect::<Result<_>>()?)
        };
        Ok(Self {
            codec: Decompressor::new()?,
            clusters,
            cluster_size,
            plain: vec![0; usize::try_from(cluster_size)?],
            work,
            pattern,
            offset: 0,
        })
    }

    fn decompress(&mut self, number: usize) -> Result<()> {
        let frame = match &mut self.clusters {
            Clusters::Frames(frames) => &frames[number],
            Clusters::File(file, places, buffer) => {
                let place = &places[number];
                file.read_exact_at(&mut buffer[..place.len], place.offset)?;
                &buffer[..place.len]
            }
        };
        self.codec.decompress_to_buffer(frame, &mut self.plain)?;
        Ok(())
    }
}

impl Load for BareCodec {
    fn run(&mut self, stop: Stop, _seed: u64) -> Result<u64> {
        let mut ios = 0;
        while !stop.reached(ios) {
            let first = self.offset / self.cluster_size;
            let last = (self.offset + self.work.block - 1) / self.cluster_size;
            for number in first..=last {
                self.decompress(usize::try_from(number)?)?;
            }
            self.offset = (self.offset + self.pattern.step) % self.work.size;
            ios += 1;
        }
        Ok(ios)
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + 8).ok_or("the image is too short")?;
    Ok(u64::from_be_bytes(bytes.try_into()?))
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Bits of an L1 entry that are the offset of a table.
const TABLE: u64 = 0x00ff_ffff_ffff_fe00;
/// Set in an L2 entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// The size of a cluster, and where the frames of all clusters are in the order of the disk; every one has to
/// be compressed (`docs/interop/qcow2`, "Compressed Clusters Descriptor").
fn compressed_clusters(file: &File) -> Result<(u64, Vec<Place>)> {
    let header = read(file, 0, 104)?;
    let cluster_bits = (word(&header, 16)? & 0xffff_ffff) as u32;
    let (size, l1_offset) = (word(&header, 24)?, word(&header, 40)?);
    let cluster_size = 1_u64 << cluster_bits;
    let entries = cluster_size / 8;
    // The offset takes the lower bits, the number of further sectors those below bit 62.
    let offset_bits = 62 - (cluster_bits - 8);
    let mut places = Vec::new();
    let count = size.div_ceil(cluster_size);
    for table in 0..count.div_ceil(entries) {
        let l1_entry = word(&read(file, l1_offset + table * 8, 8)?, 0)?;
        let l2 = read(file, l1_entry & TABLE, cluster_size as usize)?;
        for index in 0..entries.min(count - table * entries) {
            let entry = word(&l2, index as usize * 8)?;
            if entry & COMPRESSED == 0 {
                return Err(format!("cluster {} is not compressed", places.len()).into());
            }
            let offset = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
            let len = sectors * 512 - offset % 512;
            let end = file.metadata()?.len().min(offset + len);
            let frame = read(file, offset, (end - offset) as usize)?;
            // What follows the frame is the next cluster's, or nothing.
            let len = find_frame_compressed_size(&frame)
                .map_err(|_| format!("cluster {} holds no zstd frame", places.len()))?;
            places.push(Place { offset, len });
        }
    }
    Ok((cluster_size, places))
}
