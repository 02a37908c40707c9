//! Clusters that are counted before anybody has them.
//!
//! A table may name a cluster only once its reference count is durable, which costs a flush a write and
//! a sync more. So a file that grows gets counts for a run of clusters at a time: the flushes until the
//! run is used up have no counts to write. A crash leaves what nobody had: leaks, which a check gives
//! back, as closing the image does.

use super::{Refcounts, Run, State};
use crate::{Result, io::Io};

/// The least and the most clusters counted ahead.
const LEAST: u64 = 8;
const MOST: u64 = 64;

/// A run of clusters that are counted, follow each other and belong to nobody.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    first: u64,
    end: u64,
    /// Clusters given out at the end of the file since the image was opened. What is counted ahead is
    /// at most half as many, so that a small image does not leak much.
    given: u64,
}

impl Reserve {
    /// Whether a search for free clusters that has come to `cluster` finds the run there.
    pub(super) fn starts_at(&self, cluster: u64) -> bool {
        self.first == cluster && self.first < self.end
    }
}

impl Refcounts {
    /// Gives out up to `wanted` clusters of those reserved.
    pub(super) fn take_reserved(state: &mut State, wanted: u64) -> Run {
        let reserve = &mut state.reserve;
        let first = reserve.first;
        let count = wanted.min(reserve.end - first);
        reserve.first += count;
        reserve.given += count;
        state.cursor = state.cursor.max(first + count);
        Self::give_out(state, first, count)
    }

    /// The file has grown by a run: counts the clusters behind it, as far as one block of reference
    /// counts goes and they are free.
    pub(super) fn reserve_behind(&self, state: &mut State, run: Run) {
        state.reserve.given += run.count;
        let wanted = (state.reserve.given / 2).min(MOST);
        let first = run.first + run.count;
        let counted_beside_it = first % self.block_len();
        if wanted < LEAST || counted_beside_it == 0 || state.reserve.first < state.reserve.end {
            return;
        }
        let limit = first + wanted.min(self.block_len() - counted_beside_it);
        let is_free = |state: &State, cluster| {
            matches!(self.count(state, cluster), Ok(0)) && self.check_free(state, cluster).is_ok()
        };
        let mut end = first;
        while end < limit && is_free(state, end) && self.set_count(state, end, 1).is_ok() {
            end += 1;
        }
        state.reserve.first = first;
        state.reserve.end = end;
    }

    /// Takes back the counts of clusters that nobody has got.
    pub(in crate::formats::qcow2) async fn end_reserving(&self, io: &Io) -> Result<()> {
        self.with_blocks(io, |state| {
            while state.reserve.first < state.reserve.end {
                let last = state.reserve.end - 1;
                self.set_count(state, last, 0)?;
                state.reserve.end = last;
                state.cursor = state.cursor.min(last);
            }
            Ok(())
        })
        .await
    }
}
