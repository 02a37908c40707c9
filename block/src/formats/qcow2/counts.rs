//! Writing reference counts to the file, in their order.

use super::{
    header::Header,
    refcount::{DirtyCounts, Refcounts},
};
use crate::{
    FileId, Result,
    faults::Event,
    io::{AlignedBuf, Io},
    sync::join_all,
};

/// Writes in flight at a time.
const WRITES_AT_A_TIME: usize = 64;

/// Writes changed reference counts: the blocks; if there is a new one, the table that names it, once
/// the blocks are durable; if that moved, the header, once the table is durable. `header` changes
/// with the file. After an error everything in memory counts as changed again.
pub(super) async fn write_counts(
    io: &Io,
    file: FileId,
    refcounts: &Refcounts,
    header: &mut Header,
) -> Result<()> {
    let result = write_dirty(io, file, refcounts, header).await;
    if result.is_err() {
        refcounts.write_failed();
    }
    result
}

async fn write_dirty(
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
    if !blocks.is_empty() {
        io.event(file, Event::RefblockUpdate).await;
    }
    write_pieces(io, file, blocks).await?;
    let Some((offset, bytes)) = table else {
        return Ok(());
    };
    io.sync(file).await?;
    io.event(file, Event::ReftableUpdate).await;
    io.write(file, offset, AlignedBuf::from_slice(&bytes))
        .await?;
    let Some(moved) = moved else {
        return Ok(());
    };
    io.sync(file).await?;
    let mut changed = header.clone();
    changed.refcount_table_offset = moved.offset;
    changed.refcount_table_clusters = moved.clusters;
    changed.write(io, file).await?;
    io.sync(file).await?;
    *header = changed;
    for (first, count) in refcounts.move_done(moved) {
        refcounts.release(io, first, count).await?;
    }
    Ok(())
}

/// Writes pieces of the image file, several at a time, neighbours together.
pub(super) async fn write_pieces(
    io: &Io,
    file: FileId,
    mut pieces: Vec<(u64, Vec<u8>)>,
) -> Result<()> {
    pieces.sort_unstable_by_key(|(offset, _)| *offset);
    let mut merged: Vec<(u64, Vec<u8>)> = Vec::with_capacity(pieces.len());
    for (offset, bytes) in pieces {
        match merged.last_mut() {
            Some((start, run)) if *start + run.len() as u64 == offset => run.extend(bytes),
            _ => merged.push((offset, bytes)),
        }
    }
    for group in merged.chunks(WRITES_AT_A_TIME) {
        let writes = group
            .iter()
            .map(|(offset, bytes)| io.write(file, *offset, AlignedBuf::from_slice(bytes)));
        for result in join_all(writes).await {
            result?;
        }
    }
    Ok(())
}
