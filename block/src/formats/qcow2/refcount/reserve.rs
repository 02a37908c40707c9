//! Clusters that are counted before anybody has them.
//!
//! A table may name a cluster only once its reference count is durable, which costs a flush a write and
//! a sync more. So a file that grows gets counts for a run of clusters at a time: the flushes until the
//! run is used up have no counts to write. A crash leaves what nobody had: leaks, which a check gives
//! back, as closing the image does.

use super::{Refcounts, Run, State};
use crate::{Result, io::Io, sync::lock};

/// The least and the most clusters counted ahead.
const LEAST: u64 = 8;
const MOST: u64 = 64;

/// A run of clusters that are counted, follow each other and belong to nobody.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    enabled: bool,
    first: u64,
    end: u64,
    /// Clusters given out at the end of the file since the image was opened. What is counted ahead is
    /// at most half as many, so that a small image does not leak much.
    given: u64,
    /// Nobody gets one: zeroes are being written to them.
    withheld: bool,
    /// Zeroes were written up to here, or failed to be.
    zeroed: u64,
}

impl Reserve {
    /// Whether a cluster of a run that starts at `start` is one of these, and the run can have it: what
    /// is left of them stays one run.
    pub(super) fn has(&self, start: u64, cluster: u64) -> bool {
        !self.withheld && start <= self.first && (self.first..self.end).contains(&cluster)
    }

    /// Whether a run is of these alone, which were never written.
    pub(super) fn is_virgin(&self, first: u64, count: u64) -> bool {
        self.has(first, first) && first + count <= self.end
    }

    /// A run belongs to somebody now.
    pub(super) fn give_out(&mut self, run: Run) {
        if run.virgin {
            self.given += run.count;
        }
        let end = run.first + run.count;
        if run.first <= self.first && self.first < end {
            self.first = end.min(self.end);
        }
    }
}

impl Refcounts {
    /// From now on clusters are counted ahead. Whoever asks for this calls
    /// [`end_reserving`](Self::end_reserving) at the end.
    pub(in crate::formats::qcow2) fn count_ahead(self) -> Self {
        lock(&self.state).reserve.enabled = true;
        self
    }

    /// The file has grown by a run: counts the clusters behind it, as far as one block of reference
    /// counts goes and they are free.
    pub(super) fn reserve_behind(&self, state: &mut State, run: Run) {
        let wanted = (state.reserve.given / 2).min(MOST);
        let first = run.first + run.count;
        let counted_beside_it = first % self.block_len();
        let reserve = &state.reserve;
        if !reserve.enabled
            || wanted < LEAST
            || counted_beside_it == 0
            || reserve.first < reserve.end
            || first < state.virgin
        {
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

    /// Clusters that are counted ahead, at most `most`, if no zeroes were written to the first of them and
    /// they end at `end` or before. Nobody gets one before [`end_withholding`](Self::end_withholding).
    pub(in crate::formats::qcow2) fn withhold(&self, most: u64, end: u64) -> Option<(u64, u64)> {
        let reserve = &mut lock(&self.state).reserve;
        let (first, end) = (
            reserve.first,
            (reserve.first + most).min(reserve.end).min(end),
        );
        if reserve.withheld || first < reserve.zeroed || end <= first {
            return None;
        }
        reserve.withheld = true;
        Some((first, end))
    }

    /// Whoever asks gets these clusters again. Zeroes were written up to `zeroed`, or failed to be.
    pub(in crate::formats::qcow2) fn end_withholding(&self, zeroed: u64) {
        let mut state = lock(&self.state);
        let reserve = &mut state.reserve;
        reserve.withheld = false;
        reserve.zeroed = reserve.zeroed.max(zeroed);
        // Whoever searched meanwhile went past them.
        if reserve.first < reserve.end {
            state.cursor = state.cursor.min(state.reserve.first);
        }
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
