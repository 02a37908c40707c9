//! What the disk holds.

use std::collections::HashSet;

/// The content of the disk and what decides how it changes.
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    pub(crate) cluster: u64,
    /// What a discard can forget by itself: a cluster, or a subcluster.
    pub(crate) unit: u64,
    /// A discard does nothing: it would show the backing file again.
    pub(crate) keeps_discarded: bool,
    /// Clusters that may be compressed: a discard leaves parts of them as they are.
    pub(crate) compressed: HashSet<u64>,
}

impl Model {
    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(crate) fn at(&mut self, start: u64, len: u64) -> &mut [u8] {
        &mut self.bytes[start as usize..(start + len) as usize]
    }

    /// The part of a discarded range that becomes zero: what there is of whole units.
    pub(crate) fn discard(&mut self, start: u64, len: u64, unit: u64) {
        if self.keeps_discarded {
            return;
        }
        let (start, len) = self.whole(start, len, unit);
        self.at(start, len).fill(0);
    }

    /// The whole units of a range; the last unit of the disk may be short.
    pub(crate) fn whole(&self, start: u64, len: u64, unit: u64) -> (u64, u64) {
        let end = start + len;
        let end = if end == self.size() {
            end
        } else {
            end / unit * unit
        };
        let start = start.next_multiple_of(unit).min(end);
        (start, end - start)
    }

    /// A range to discard, of which it is known what it makes zero: near a compressed cluster
    /// only whole clusters.
    pub(crate) fn discardable(&self, start: u64, len: u64) -> (u64, u64, u64) {
        let parts = [start / self.cluster, (start + len - 1) / self.cluster];
        if parts.iter().any(|at| self.compressed.contains(at)) {
            let (start, len) = self.whole(start, len, self.cluster);
            return (start, len, self.cluster);
        }
        (start, len, self.unit)
    }

    /// Whether the disk still reads as a copy of it did, between `first` and `end`.
    pub(crate) fn same_as(&self, old: &[u8], first: u64, end: u64) -> bool {
        (first..end).all(|at| {
            let at = at as usize;
            self.bytes.get(at).copied().unwrap_or(0) == old.get(at).copied().unwrap_or(0)
        })
    }
}

/// Fails at the first byte that is another.
pub(crate) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at} is {:#x}, expected {:#x}",
            found[at], expected[at]
        );
    }
}
