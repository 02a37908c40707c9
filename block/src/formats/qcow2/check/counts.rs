//! A reference count for each host cluster: one byte, wider only where that does not do.

use std::collections::HashMap;

/// The byte that says: the count is elsewhere.
const ELSEWHERE: u8 = u8::MAX;

/// Clusters compared at a time.
const BLOCK: usize = 4096;

/// Reference counts of all clusters. They saturate at `u32::MAX`, far above what any image reaches.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Counts below 255; the allocation is zeroed lazily by the host, so clusters that nobody counts
    /// cost nothing.
    small: Vec<u8>,
    /// Counts from 255 on, while there are few.
    large: HashMap<u64, u32>,
    /// All counts, once there are many large ones.
    wide: Vec<u32>,
}

impl Counts {
    /// No references to any of `clusters`.
    pub(super) fn new(clusters: u64) -> Self {
        Self {
            small: vec![0; clusters as usize],
            ..Self::default()
        }
    }

    /// The number of clusters counted.
    pub(super) fn len(&self) -> u64 {
        self.small.len() as u64
    }

    /// The count of a cluster, 0 beyond the end.
    #[inline]
    pub(super) fn get(&self, cluster: u64) -> u32 {
        match self.small.get(cluster as usize) {
            Some(&ELSEWHERE) => self.get_elsewhere(cluster),
            Some(&count) => u32::from(count),
            None => 0,
        }
    }

    #[cold]
    fn get_elsewhere(&self, cluster: u64) -> u32 {
        match self.wide.get(cluster as usize) {
            Some(&count) => count,
            None => self.large.get(&cluster).copied().unwrap_or(0),
        }
    }

    /// Sets the count of a cluster; beyond the end is ignored.
    #[inline]
    pub(super) fn set(&mut self, cluster: u64, count: u64) {
        if let Some(small) = self.small.get_mut(cluster as usize) {
            if count < u64::from(ELSEWHERE) && *small != ELSEWHERE {
                *small = count as u8;
            } else {
                self.set_large(cluster, count);
            }
        }
    }

    #[cold]
    fn set_large(&mut self, cluster: u64, count: u64) {
        let at = cluster as usize;
        if count < u64::from(ELSEWHERE) {
            self.small[at] = count as u8;
            self.large.remove(&cluster);
            return;
        }
        self.small[at] = ELSEWHERE;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if self.wide.is_empty() {
            self.large.insert(cluster, count);
            if self.large.len() > 4096 + self.small.len() / 32 {
                self.wide = vec![0; self.small.len()];
                for (cluster, count) in self.large.drain() {
                    self.wide[cluster as usize] = count;
                }
            }
        } else {
            self.wide[at] = count;
        }
    }

    /// Adds references to a cluster.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, references: u64) {
        let old = u64::from(self.get(cluster));
        self.set(cluster, old.saturating_add(references));
    }

    /// Forgets one reference.
    pub(super) fn remove(&mut self, cluster: u64) {
        self.set(cluster, u64::from(self.get(cluster)).saturating_sub(1));
    }

    /// Makes room for `clusters`.
    pub(super) fn grow(&mut self, clusters: u64) {
        if clusters > self.len() {
            self.small.resize(clusters as usize, 0);
            if !self.wide.is_empty() {
                self.wide.resize(clusters as usize, 0);
            }
        }
    }

    /// The highest cluster with a count above 0.
    pub(super) fn highest(&self) -> Option<u64> {
        let zero = [0; BLOCK];
        let mut end = self.small.len();
        while end > 0 {
            let start = (end - 1) / BLOCK * BLOCK;
            let block = &self.small[start..end];
            if *block != zero[..block.len()] {
                return block
                    .iter()
                    .rposition(|count| *count != 0)
                    .map(|at| (start + at) as u64);
            }
            end = start;
        }
        None
    }

    /// Whether any of the clusters from `start` to `end` has a count above 0.
    pub(super) fn any(&self, start: u64, end: u64) -> bool {
        let end = (end as usize).min(self.small.len());
        let block = self.small.get(start as usize..end).unwrap_or_default();
        let zero = [0; BLOCK];
        block.chunks(BLOCK).any(|part| *part != zero[..part.len()])
    }

    /// Calls `differs` for each cluster from `start` to `end` whose count is not the one in
    /// `other`, in order.
    pub(super) fn for_each_difference(
        &self,
        other: &Self,
        start: u64,
        end: u64,
        mut differs: impl FnMut(u64, u32, u32),
    ) {
        let end = end.min(self.len().max(other.len()));
        let mut at = start;
        while at < end {
            let stop = (at + BLOCK as u64).min(end);
            let range = at as usize..stop as usize;
            let same = match (self.small.get(range.clone()), other.small.get(range)) {
                (Some(a), Some(b)) => a == b && !a.contains(&ELSEWHERE),
                _ => false,
            };
            if !same {
                for cluster in at..stop {
                    let (a, b) = (self.get(cluster), other.get(cluster));
                    if a != b {
                        differs(cluster, a, b);
                    }
                }
            }
            at = stop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_grow_from_bytes_to_words() {
        let mut counts = Counts::new(10_000);
        for cluster in 0..10_000 {
            counts.add(cluster, 254);
            assert_eq!(counts.get(cluster), 254);
            counts.add(cluster, 2);
            assert_eq!(counts.get(cluster), 256);
        }
        assert!(!counts.wide.is_empty() && counts.large.is_empty());
        counts.add(5, u64::MAX);
        assert_eq!(counts.get(5), u32::MAX);
        counts.set(5, 3);
        counts.remove(5);
        assert_eq!(counts.get(5), 2);
        assert_eq!(counts.get(10_000), 0);
        counts.grow(20_000);
        counts.set(19_999, u64::MAX);
        assert_eq!(counts.get(19_999), u32::MAX);
        assert_eq!(counts.highest(), Some(19_999));
    }

    #[test]
    fn differences_are_found_in_order() {
        let mut a = Counts::new(20_000);
        let mut b = Counts::new(19_000);
        a.set(7, 1);
        a.set(12_345, 300);
        b.set(12_345, 301);
        b.set(18_000, 2);
        a.set(18_000, 2);
        a.set(19_500, 1);
        let mut found = Vec::new();
        a.for_each_difference(&b, 0, u64::MAX, |cluster, a, b| found.push((cluster, a, b)));
        assert_eq!(found, [(7, 1, 0), (12_345, 300, 301), (19_500, 1, 0)]);
        assert!(a.any(0, 8) && !a.any(8, 12_345) && a.any(19_500, u64::MAX));
        assert_eq!(Counts::new(0).highest(), None);
        assert_eq!(Counts::new(9000).highest(), None);
    }
}
