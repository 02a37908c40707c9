//! Writing reference counts outside of a flush.

use crate::{
    FileId, Result,
    formats::qcow2::{
        header::Header,
        refcount::{DirtyCounts, Refcounts},
    },
    io::{AlignedBuf, Io},
};

/// Writes changed reference counts, in their order; the header is written where their table moves.
pub(super) async fn write_refcounts(
    io: &Io,
    file: FileId,
    refcounts: &Refcounts,
    header: &mut Header,
) -> Result<()> {
    let DirtyCounts {
        blocks,
        table,
        moved,
    } = refcounts.take_dirty();
    let result = write_dirty_counts(io, file, blocks, table, moved, header).await;
    if result.is_err() {
        refcounts.write_failed();
        return result;
    }
    if let Some((first, count)) = refcounts.move_done() {
        refcounts.release(io, first, count).await?;
    }
    Ok(())
}

async fn write_dirty_counts(
    io: &Io,
    file: FileId,
    blocks: Vec<(u64, Vec<u8>)>,
    table: Option<(u64, Vec<u8>)>,
    moved: Option<(u64, u32)>,
    header: &mut Header,
) -> Result<()> {
    for (offset, bytes) in blocks {
        io.write(file, offset, AlignedBuf::from_slice(&bytes))
            .await?;
    }
    let Some((offset, bytes)) = table else {
        return Ok(());
    };
    // Blocks are durable before the table names them.
    io.sync(file).await?;
    io.write(file, offset, AlignedBuf::from_slice(&bytes))
        .await?;
    let Some((offset, clusters)) = moved else {
        return Ok(());
    };
    // So is the table before the header names it.
    io.sync(file).await?;
    let mut changed = header.clone();
    changed.refcount_table_offset = offset;
    changed.refcount_table_clusters = clusters;
    changed.write(io, file).await?;
    *header = changed;
    Ok(())
}
