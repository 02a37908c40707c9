//! qcow2, versions 2 and 3: copy-on-write images with backing files, compression and snapshots.
//!
//! The specification is `docs/interop/qcow2.rst` of QEMU; names are its. The parts:
//!
//! * [`header`]: the header, its extensions and feature bits.
//! * `l2`: entries and the arithmetic of tables. `slices`: the cache of table slices. `entries`: the
//!   ones in the others.
//! * `marks`: the dirty and the corrupt bit. `overlap`: nothing is written over metadata.
//! * `map`: looking up. `write`: preparing and committing writes. `change`: discard and zeroes.
//!   `resize`: other sizes.
//! * `refcount`: reference counts and allocation. `ahead`: space for them before they need it. `flush`: the order in which everything reaches
//!   the disk.
//! * `crypt`: encryption.
//! * `compressed`: compressed clusters and the cache of decompressed ones.
//! * [`snapshot`]: internal snapshots. `vm_state`: what lies behind the disk. `bitmaps`: persistent
//!   dirty bitmaps. `extras`: all three on an opened image.

mod ahead;
pub mod amend;
mod bitmaps;
mod change;
pub mod check;
mod claims;
mod compressed;
mod counts;
pub mod create;
mod crypt;
mod entries;
mod extras;
mod flush;
pub mod header;
pub mod info;
mod l2;
mod map;
mod marks;
mod overlap;
mod refcount;
pub mod repair;
mod resize;
mod slices;
pub mod snapshot;
mod tables;
mod vm_state;
mod write;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use self::{
    ahead::Ahead,
    bitmaps::Bitmaps,
    claims::Claims,
    compressed::Decompressed,
    crypt::Crypt,
    flush::Pending,
    header::{Autoclear, Header, Incompatible},
    info::image_info,
    l2::Geometry,
    marks::Marks,
    overlap::Overlap,
    refcount::Refcounts,
    slices::SliceCache,
    snapshot::SnapshotTable,
    tables::L1,
};
use crate::{
    Capabilities, DiskTopology, Error, FileId, Format, GuestRange, Result,
    crypto::{KeyChange, Unlock},
    encryption::Encryption,
    extras::ImageExtras,
    image::{BlockStatus, Extents, Image, ImageInfo, Intent, Prepared},
    io::{Buffers, Io},
    options::{OverlapChecks, PassDiscards},
    sync::{Coalescer, LocalFuture, lock},
    table::{MapCache, MapKey},
};

/// Bytes of decompressed clusters kept in memory by each image.
const DECOMPRESSED_CACHE_BYTES: u64 = 4 << 20;

/// How to open a qcow2 image.
#[derive(Clone, Debug)]
pub(crate) struct Qcow2Options {
    /// Open for writing.
    pub(crate) writable: bool,
    /// The most bytes of tables kept in memory.
    pub(crate) metadata_cache_size: u64,
    /// The file with the guest's data, where that is not the image itself.
    pub(crate) data_file: Option<FileId>,
    /// A discard gives host space back but keeps the clusters.
    pub(crate) discard_no_unref: bool,
    /// Whether reference counts are written late, whatever the image says.
    pub(crate) lazy_refcounts: Option<bool>,
    /// Which freed clusters give their space back at once.
    pub(crate) pass_discards: PassDiscards,
    /// What is guarded against being overwritten.
    pub(crate) overlap_checks: OverlapChecks,
    /// What opens an encrypted image.
    pub(crate) unlock: Unlock,
}

/// An opened qcow2 image.
pub(crate) struct Qcow2 {
    /// Unique in the process: part of the keys of the queues' caches.
    id: u32,
    file: FileId,
    /// The file with the guest's data: the image itself, or its data file.
    data_file: FileId,
    /// The data file is a raw disk by itself.
    raw_data: bool,
    discard_no_unref: bool,
    pass_discards: PassDiscards,
    marks: Marks,
    ahead: Ahead,
    overlap: Overlap,
    /// Held by who finds out what is metadata.
    overlap_claim: Claims,
    writable: bool,
    geometry: Geometry,
    header: Mutex<Header>,
    snapshots: Mutex<SnapshotTable>,
    bitmaps: Bitmaps,
    size: AtomicU64,
    l1: L1,
    slices: SliceCache,
    refcounts: Refcounts,
    /// Guest clusters whose mapping a task is changing.
    claims: Claims,
    /// L1 entries that a task is changing.
    l1_claims: Claims,
    backing: Option<Arc<dyn Image>>,
    pending: Pending,
    flushing: Coalescer,
    decompressed: Decompressed,
    crypt: Crypt,
}

impl Qcow2 {
    /// Opens an image whose header was read, checked and found supported, over its backing image.
    pub(crate) async fn open(
        io: &Io,
        file: FileId,
        mut header: Header,
        backing: Option<Arc<dyn Image>>,
        options: Qcow2Options,
    ) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        if options.discard_no_unref && header.version < 3 {
            // A version 2 entry cannot say zero and name a cluster.
            return Err(Error::invalid_argument(
                "discard-no-unref is only supported since qcow2 version 3",
            ));
        }
        // Before anything is changed: the key may be wrong.
        let crypt = Crypt::open(io, file, &header, &options.unlock).await?;
        if options.writable {
            repair::repair_dirty(io, file, &mut header).await?;
        }
        if options.writable && header.clear_for_writing() {
            header.write_features(io, file).await?;
            io.sync(file).await?;
        }
        let snapshots = SnapshotTable::read(io, file, &header).await?;
        let bitmaps = Bitmaps::read(io, file, &header, options.writable).await?;
        let geometry = Geometry::of(&header);
        let table = read_refcount_table(io, file, &header).await?;
        let file_len = io.file_len(file)?;
        let refcounts = Refcounts::new(
            geometry,
            header.refcount_order,
            file,
            header.refcount_table_offset,
            table,
            (
                header.l1_table_offset >> header.cluster_bits,
                (u64::from(header.l1_size) * 8).div_ceil(geometry.cluster_size()),
            ),
            file_len,
        );
        if options.writable {
            bitmaps.mark_in_use(io, file, &header).await?;
        }
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            file,
            data_file: options.data_file.unwrap_or(file),
            raw_data: header.has(Incompatible::DATA_FILE)
                && header.autoclear_features.contains(Autoclear::DATA_FILE_RAW),
            discard_no_unref: options.discard_no_unref,
            pass_discards: options.pass_discards,
            marks: Marks::new(&header, options.lazy_refcounts),
            ahead: Ahead::new(
                options.writable && io.can_grow(file),
                io.is_direct(file),
                file_len,
            ),
            overlap: Overlap::new(options.overlap_checks),
            overlap_claim: Claims::default(),
            writable: options.writable,
            geometry,
            size: AtomicU64::new(header.size),
            l1: L1::new(header.l1_table_offset, header.l1_size),
            slices: SliceCache::new(options.metadata_cache_size, geometry.slice_bytes()),
            refcounts: refcounts.count_ahead(),
            claims: Claims::default(),
            l1_claims: Claims::default(),
            backing,
            pending: Pending::default(),
            flushing: Coalescer::default(),
            decompressed: Decompressed::new(
                DECOMPRESSED_CACHE_BYTES,
                geometry,
                header.compression_type(),
            ),
            crypt,
            snapshots: Mutex::new(snapshots),
            bitmaps,
            header: Mutex::new(header),
        })
    }

    /// What queues' caches know the slice with a cluster's entry by.
    fn map_key(&self, cluster: u64) -> MapKey {
        MapKey {
            image: self.id,
            slice: self.geometry.slice(cluster),
        }
    }

    /// Guest bytes of a range that the backing image has; what follows reads as zeroes.
    fn in_backing(&self, range: GuestRange) -> GuestRange {
        let size = self.backing.as_ref().map_or(0, |backing| backing.size());
        range.take(size.saturating_sub(range.start.0))
    }
}

async fn read_refcount_table(io: &Io, file: FileId, header: &Header) -> Result<Vec<u64>> {
    let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let table = io
        .read_padded(file, header.refcount_table_offset, bytes as usize)
        .await?;
    Ok(table
        .chunks_exact(8)
        .map(|entry| header::be64(entry, 0))
        .collect())
}

impl Image for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn topology(&self) -> DiskTopology {
        let cluster = u32::try_from(self.geometry.cluster_size()).unwrap_or(u32::MAX);
        DiskTopology {
            physical_block_size: cluster.min(4096),
            optimal_io_size: cluster,
            ..DiskTopology::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: self.writable,
            discard: self.writable,
            write_zeroes: self.writable,
            resize: self.writable,
            discard_granularity: self.geometry.cluster_size() as u32,
            secure_erase: false,
            // Compressed and freed clusters keep what they held.
            overwrite: false,
        }
    }

    fn info(&self) -> ImageInfo {
        let mut info = image_info(
            &lock(&self.header),
            &lock(&self.snapshots),
            &self.bitmaps.entries(),
        );
        self.crypt.describe(&mut info);
        info
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn encryption(&self) -> Option<&Arc<Encryption>> {
        self.crypt.encryption.as_ref()
    }

    fn data_file(&self) -> FileId {
        self.data_file
    }

    fn try_map(
        &self,
        range: GuestRange,
        intent: Intent,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        self.map_cached(range, intent, cache, out)
    }

    fn map<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        out: &'a mut Extents,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.map_loading(io, range, out))
    }

    fn read_opaque<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        buffers: &'a Buffers,
        at: u64,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.read_compressed(io, range, buffers, at))
    }

    fn prepare<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<Option<Prepared<'a>>>> {
        Box::pin(async move {
            let prepared = self.prepare_write(io, range).await;
            self.note_corruption(io, prepared).await
        })
    }

    fn discard<'a>(&'a self, io: &'a Io, range: GuestRange) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let done = self.discard_units(io, range).await;
            self.note_corruption(io, done).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        may_unmap: bool,
    ) -> LocalFuture<'a, Result<u64>> {
        Box::pin(async move {
            let done = self.zero_units(io, range, may_unmap).await;
            self.note_corruption(io, done).await
        })
    }

    fn unaligned_zeroes(&self, range: GuestRange) -> u64 {
        if !self.geometry.zero_flag {
            return range.len;
        }
        let unit = self.geometry.unit();
        range.len.min(unit - range.start.0 % unit)
    }

    fn flush<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let done = self.flush_all(io).await;
            self.note_corruption(io, done).await
        })
    }

    fn mapping_is_durable(&self, range: GuestRange) -> bool {
        self.is_mapping_durable(range)
    }

    fn block_status<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<BlockStatus>> {
        Box::pin(self.status_of(io, range))
    }

    fn resize<'a>(&'a self, io: &'a Io, size: u64) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.change_size(io, size))
    }

    fn write_compressed<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        data: &'a [u8],
    ) -> LocalFuture<'a, Result<bool>> {
        Box::pin(self.write_compressed_cluster(io, range, data))
    }

    fn change_keys<'a>(&'a self, io: &'a Io, change: &'a KeyChange) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.crypt.change_keys(io, change))
    }

    fn set_backing<'a>(
        &'a self,
        io: &'a Io,
        name: Option<&'a str>,
        format: Option<&'a str>,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.name_backing(io, name, format))
    }

    fn make_empty<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.empty_clusters(io))
    }

    fn extras(&self) -> Option<&dyn ImageExtras> {
        Some(self)
    }

    fn close<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.close_image(io))
    }
}

/// Builds the error for an operation on an image that was opened for reading.
fn read_only() -> Error {
    Error::new(crate::ErrorKind::ReadOnly)
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2")
            .field("file", &self.file)
            .field("size", &self.size())
            .field("version", &lock(&self.header).version)
            .finish_non_exhaustive()
    }
}
