//! New images, laid out as QEMU lays them out: header, reference count table, reference count
//! blocks, L1 table; with preallocation L2 tables and data clusters follow.

mod options;

use super::header::{
    Autoclear, Compatible, CryptMethod, ExtensionType, Header, Incompatible, MAX_L1_SIZE,
    MAX_REFCOUNT_TABLE_SIZE,
};
use crate::{
    Error, FileId, Result,
    formats::luks::volume::Volume,
    io::{AlignedBuf, FallocateMode, Io},
};

pub use options::{CreateOptions, Encrypt, Preallocation};

/// Where everything of a new image goes; cluster numbers and counts.
struct Layout {
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    /// Data clusters are in a file of their own, each at its guest offset.
    data_file: bool,
    table_clusters: u64,
    blocks: u64,
    l1_at: u64,
    l1_entries: u64,
    /// The LUKS header.
    crypto_at: u64,
    l2_at: u64,
    l2_tables: u64,
    data_at: u64,
    data_clusters: u64,
    end: u64,
}

impl Layout {
    fn new(header: &Header, crypto_len: u64, preallocate: bool) -> Result<Self> {
        let too_large = || {
            Error::invalid_argument(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            )
        };
        let cluster_size = header.cluster_size();
        let l1_entries = header.l1_entries_for(header.size);
        if header.size > i64::MAX as u64 || l1_entries > MAX_L1_SIZE / 8 {
            return Err(too_large());
        }
        let l1_clusters = (l1_entries * 8).div_ceil(cluster_size);
        let crypto_clusters = crypto_len.div_ceil(cluster_size);
        let (l2_tables, data_clusters) = if preallocate {
            (l1_entries, header.size.div_ceil(cluster_size))
        } else {
            (0, 0)
        };
        let data_file = header.has(Incompatible::DATA_FILE);
        let counted_data = if data_file { 0 } else { data_clusters };
        // Blocks cover everything, themselves and the table included: grow both until they do.
        let block_bits = header.refcount_block_bits();
        let (mut table_clusters, mut blocks) = (1, 1);
        let end = loop {
            let tables = 1 + table_clusters + blocks + l1_clusters + crypto_clusters + l2_tables;
            let end = tables + counted_data;
            let needed_blocks = end.div_ceil(1 << block_bits);
            let needed_table = (needed_blocks * 8).div_ceil(cluster_size);
            if needed_blocks <= blocks && needed_table <= table_clusters {
                break end;
            }
            blocks = blocks.max(needed_blocks);
            table_clusters = table_clusters.max(needed_table);
            if table_clusters * cluster_size > MAX_REFCOUNT_TABLE_SIZE {
                return Err(too_large());
            }
        };
        let l1_at = 1 + table_clusters + blocks;
        let crypto_at = l1_at + l1_clusters;
        let l2_at = crypto_at + crypto_clusters;
        // Descriptors hold 56 bits of offset.
        if end > 1 << (56 - header.cluster_bits) {
            return Err(too_large());
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended: header.has(Incompatible::EXTENDED_L2),
            data_file,
            table_clusters,
            blocks,
            l1_at,
            l1_entries,
            crypto_at,
            l2_at,
            l2_tables,
            data_at: l2_at + l2_tables,
            data_clusters,
            end,
        })
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    /// The length of a new file. One that ends with the L1 table ends with its last entry, as QEMU's does.
    fn file_len(&self) -> u64 {
        if self.l1_entries > 0 && self.end == self.l2_at && self.crypto_at == self.l2_at {
            return self.offset(self.l1_at) + self.l1_entries * 8;
        }
        self.offset(self.end)
    }

    /// The L2 entry of a preallocated cluster, and its bitmap: no subcluster has data yet.
    fn l2_entry(&self, cluster: u64, flag: u64) -> [u64; 2] {
        let first = if self.data_file { 0 } else { self.data_at };
        // A bitmap without any bit says that nothing is there yet, encrypted or not.
        let flag = if self.extended { 0 } else { flag };
        [self.offset(first + cluster) | COPIED | flag, 0]
    }
}

/// Writes runs of big-endian numbers in large pieces.
struct TableWriter<'a> {
    io: &'a Io,
    file: FileId,
    at: u64,
    buf: Vec<u8>,
}

/// Bytes collected before they are written; a multiple of every cluster size.
const PIECE: usize = 2 << 20;

impl TableWriter<'_> {
    async fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.buf.extend_from_slice(bytes);
        if self.buf.len() >= PIECE {
            self.finish().await
        } else {
            Ok(())
        }
    }

    async fn finish(&mut self) -> Result<()> {
        let buf = AlignedBuf::from_slice(&self.buf);
        self.io.write(self.file, self.at, buf).await?;
        self.at += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }
}

/// Writes a new image to `file`, which is empty or a block device. The header goes last: before it
/// is there, the file is no image.
///
/// # Errors
/// As [`CreateOptions::check`], and the host's.
pub async fn create(io: &Io, file: FileId, options: &CreateOptions) -> Result<()> {
    if options.data_file.is_some() {
        return Err(Error::invalid_argument(
            "data file: expected the file to be given along with its name",
        ));
    }
    create_in(io, file, file, options).await
}

/// Writes a new image to `file` whose guest data will be in `data`, a file that is empty, holds the
/// data of a raw disk already, or is a block device. It gets the size of the disk.
///
/// # Errors
/// As [`create`].
pub async fn create_with_data_file(
    io: &Io,
    file: FileId,
    data: FileId,
    options: &CreateOptions,
) -> Result<()> {
    if options.data_file.is_none() {
        return Err(Error::invalid_argument(
            "data file: expected a name for it along with the file",
        ));
    }
    create_in(io, file, data, options).await
}

async fn create_in(io: &Io, file: FileId, data: FileId, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let (header, layout) = plan(options)?;
    let end = layout.offset(layout.end);
    let was_empty = io.file_len(file)? == 0;
    if was_empty {
        io.set_len(file, layout.file_len()).await?;
    } else if io.file_len(file)? < end {
        // Says "no space" where a block device is too small.
        io.set_len(file, end).await?;
    }
    let zero = prealloc_flag(options);
    write_tables(io, file, &layout, zero, was_empty).await?;
    if let Some(Encrypt::Luks { options, secret }) = &options.encrypt {
        let at = layout.offset(layout.crypto_at);
        Volume::create(io, file, at, *options, secret).await?;
    }
    if layout.data_file {
        let start = 0;
        let len = header.size;
        if io.file_len(data)? < len {
            io.set_len(data, len).await?;
        }
        reserve_data(io, data, start, len, options.preallocation).await?;
        io.sync(data).await?;
    } else {
        let start = layout.offset(layout.data_at);
        let len = layout.offset(layout.data_clusters);
        reserve_data(io, file, start, len, options.preallocation).await?;
        if !was_empty && options.preallocation != Preallocation::Full {
            clear_data(io, file, start, len).await?;
        }
    }
    io.sync(file).await?;
    let mut bytes = header.to_bytes()?;
    if !was_empty {
        // No remains of what was in the first cluster.
        bytes.resize(header.cluster_size() as usize, 0);
    }
    io.write(file, 0, AlignedBuf::from_slice(&bytes)).await?;
    io.sync(file).await
}

fn plan(options: &CreateOptions) -> Result<(Header, Layout)> {
    let size = options.size.checked_next_multiple_of(512).ok_or_else(|| {
        Error::invalid_argument("The image size is too large (try using a larger cluster size)")
    })?;
    let mut header = Header::new(
        options.version,
        options.cluster_size.trailing_zeros(),
        options.refcount_bits.trailing_zeros(),
        size,
    )?;
    header.set_compression_type(options.compression_type)?;
    if options.lazy_refcounts {
        header
            .compatible_features
            .insert(Compatible::LAZY_REFCOUNTS);
    }
    if options.extended_l2 {
        header
            .incompatible_features
            .insert(Incompatible::EXTENDED_L2);
    }
    if let Some(name) = &options.data_file {
        header.incompatible_features.insert(Incompatible::DATA_FILE);
        if options.data_file_raw {
            header.autoclear_features.insert(Autoclear::DATA_FILE_RAW);
        }
        let name = name.as_bytes().to_vec();
        header.add_before_names(ExtensionType::DATA_FILE, name);
    }
    header.set_backing(
        options.backing_file.as_deref(),
        options.backing_format.as_deref(),
    )?;
    let crypto_len = match &options.encrypt {
        None => 0,
        Some(Encrypt::Aes) => {
            header.crypt_method = CryptMethod::Aes;
            0
        }
        Some(Encrypt::Luks { options, .. }) => {
            header.crypt_method = CryptMethod::Luks;
            options.header_len()
        }
    };
    let preallocate = options.takes() != Preallocation::Off;
    let layout = Layout::new(&header, crypto_len, preallocate)?;
    if crypto_len > 0 {
        let at = layout.offset(layout.crypto_at);
        let extension = [at.to_be_bytes(), crypto_len.to_be_bytes()].concat();
        header.add_before_names(ExtensionType::CRYPTO_HEADER, extension);
    }
    // Both fit: the tables are bounded.
    header.l1_size = layout.l1_entries as u32;
    header.l1_table_offset = layout.offset(layout.l1_at);
    if layout.l1_entries == 0 {
        header.l1_table_offset = 0;
    }
    header.refcount_table_offset = layout.offset(1);
    header.refcount_table_clusters = layout.table_clusters as u32;
    // As QEMU: a small first cluster keeps its room for names.
    if options.cluster_size < 4096 {
        header.set_extension(ExtensionType::FEATURE_NAMES, None);
    }
    header.to_bytes()?;
    Ok((header, layout))
}

/// The zero flag for preallocated clusters of an encrypted image: the zeroes that they have in the
/// file are no ciphertext of zeroes. Version 2 has no such flag.
fn prealloc_flag(options: &CreateOptions) -> u64 {
    u64::from(options.encrypt.is_some() && options.version >= 3)
}

async fn write_tables(
    io: &Io,
    file: FileId,
    layout: &Layout,
    flag: u64,
    was_empty: bool,
) -> Result<()> {
    let cluster_size = 1usize << layout.cluster_bits;
    let mut out = TableWriter {
        io,
        file,
        at: layout.offset(1),
        buf: Vec::new(),
    };
    // The table and the blocks. In a new file the zeroes after the last entry are there already.
    for block in 0..layout.blocks {
        out.put(
            &layout
                .offset(1 + layout.table_clusters + block)
                .to_be_bytes(),
        )
        .await?;
    }
    if !was_empty {
        let table_len = layout.offset(layout.table_clusters) as usize;
        out.put(&vec![0; table_len - layout.blocks as usize * 8])
            .await?;
    }
    out.finish().await?;

    out.at = layout.offset(1 + layout.table_clusters);
    let mut clusters = layout.end;
    let ones = refcount_ones(cluster_size, layout.refcount_order);
    let per_block = (cluster_size as u64 * 8) >> layout.refcount_order;
    for _ in 0..layout.blocks {
        let used = clusters.min(per_block);
        clusters -= used;
        let mut bits = (used << layout.refcount_order) as usize;
        let whole = bits / 8;
        out.put(&ones[..whole]).await?;
        bits -= whole * 8;
        let mut block_len = whole;
        if bits > 0 {
            out.put(&[ones[whole] & ((1 << bits) - 1)]).await?;
            block_len += 1;
        }
        if clusters > 0 || !was_empty {
            out.put(&vec![0; cluster_size - block_len]).await?;
        }
    }
    out.finish().await?;

    if layout.l2_tables == 0 && was_empty {
        return Ok(());
    }
    let rounded = |bytes: usize| {
        if was_empty {
            bytes
        } else {
            bytes.next_multiple_of(cluster_size)
        }
    };
    out.at = layout.offset(layout.l1_at);
    for table in 0..layout.l1_entries {
        let entry = if layout.l2_tables > 0 {
            layout.offset(layout.l2_at + table) | COPIED
        } else {
            0
        };
        out.put(&entry.to_be_bytes()).await?;
    }
    let written = layout.l1_entries as usize * 8;
    out.put(&vec![0; rounded(written) - written]).await?;
    out.finish().await?;

    out.at = layout.offset(layout.l2_at);
    let words = if layout.extended { 2 } else { 1 };
    for cluster in 0..layout.data_clusters {
        for word in &layout.l2_entry(cluster, flag)[..words] {
            out.put(&word.to_be_bytes()).await?;
        }
    }
    let written = layout.data_clusters as usize * 8 * words;
    out.put(&vec![0; rounded(written) - written]).await?;
    out.finish().await
}

/// Entries of active tables whose target has a reference count of exactly one.
const COPIED: u64 = 1 << 63;

/// A block of reference counts that are all one.
fn refcount_ones(len: usize, order: u32) -> Vec<u8> {
    match order {
        0 => vec![0xff; len],
        1 => vec![0x55; len],
        2 => vec![0x11; len],
        3 => vec![1; len],
        _ => {
            let width = 1usize << (order - 3);
            (0..len)
                .map(|at| u8::from(at % width == width - 1))
                .collect()
        }
    }
}

/// Takes host space for the data clusters.
async fn reserve_data(
    io: &Io,
    file: FileId,
    start: u64,
    len: u64,
    preallocation: Preallocation,
) -> Result<()> {
    match preallocation {
        _ if len == 0 => Ok(()),
        Preallocation::Falloc => {
            io.fallocate(file, FallocateMode::Allocate, 0, start + len)
                .await
        }
        Preallocation::Full => write_zeroes(io, file, start, len).await,
        Preallocation::Off | Preallocation::Metadata => Ok(()),
    }
}

/// The guest must not see what a block device held before.
async fn clear_data(io: &Io, file: FileId, start: u64, len: u64) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    let mode = FallocateMode::ZeroRange;
    match io.fallocate(file, mode, start, len).await {
        Ok(()) => Ok(()),
        Err(_) => write_zeroes(io, file, start, len).await,
    }
}

async fn write_zeroes(io: &Io, file: FileId, mut at: u64, mut len: u64) -> Result<()> {
    let mut buf = AlignedBuf::zeroed(PIECE.min(len as usize));
    while len > 0 {
        if (buf.len() as u64) > len {
            buf = AlignedBuf::zeroed(len as usize);
        }
        let step = buf.len() as u64;
        buf = io.write(file, at, buf).await?;
        at += step;
        len -= step;
    }
    Ok(())
}
