//! Reading many tables: in the order of the file, close ones together, several reads in flight.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
};

use crate::{
    FileId, Result,
    io::{AlignedBuf, Io},
};

/// Bytes of one read, unless a single table is larger.
const READ: u64 = 1 << 20;
/// A gap between two tables that is read rather than skipped.
const GAP: u64 = 32 << 10;
/// Reads in flight.
const IN_FLIGHT: usize = 8;

/// Waits for all of the futures; their results in order.
pub(super) async fn join<T>(mut futures: Vec<Pin<Box<dyn Future<Output = T> + '_>>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(context)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// Reads the tables of `len` bytes at `offsets` and gives each to `visit` with its place in
/// `offsets`. What lies beyond the end of the file reads as zeroes. Fastest where offsets ascend.
pub(super) async fn for_each_table(
    io: &Io,
    file: FileId,
    offsets: impl Iterator<Item = u64>,
    len: u64,
    mut visit: impl FnMut(usize, &[u8]),
) -> Result<()> {
    let mut offsets = offsets.peekable();
    let mut index = 0;
    while offsets.peek().is_some() {
        // The tables of each read.
        let mut reads: Vec<Vec<u64>> = Vec::with_capacity(IN_FLIGHT);
        while reads.len() < IN_FLIGHT
            && let Some(start) = offsets.next()
        {
            let mut tables = vec![start];
            let mut last = start;
            while let Some(next) = offsets.next_if(|next| {
                *next >= last
                    && *next - last <= len + GAP
                    && next.saturating_add(len) - start <= READ
            }) {
                tables.push(next);
                last = next;
            }
            reads.push(tables);
        }
        let futures = reads
            .iter()
            .map(|tables| {
                let start = tables[0];
                let bytes = tables[tables.len() - 1] - start + len;
                let read: Pin<Box<dyn Future<Output = Result<AlignedBuf>> + '_>> =
                    Box::pin(io.read_padded(file, start, bytes as usize));
                read
            })
            .collect();
        for (tables, read) in reads.iter().zip(join(futures).await) {
            let bytes = read?;
            for offset in tables {
                let start = (offset - tables[0]) as usize;
                visit(index, &bytes[start..start + len as usize]);
                index += 1;
            }
        }
    }
    Ok(())
}

/// Reads a run of big-endian 64-bit numbers in pieces and gives each number to `visit` with its
/// index. What lies beyond the end of the file reads as zeroes.
pub(super) async fn for_each_number(
    io: &Io,
    file: FileId,
    offset: u64,
    count: u64,
    mut visit: impl FnMut(u64, u64),
) -> Result<()> {
    let mut index = 0;
    while index < count {
        let numbers = (count - index).min(READ / 8);
        let bytes = io
            .read_padded(file, offset + index * 8, numbers as usize * 8)
            .await?;
        for number in bytes.as_chunks().0 {
            visit(index, u64::from_be_bytes(*number));
            index += 1;
        }
    }
    Ok(())
}
