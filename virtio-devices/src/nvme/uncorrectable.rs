//! Blocks marked by Write Uncorrectable, in bytes of the namespace.

use std::collections::BTreeMap;

/// Disjoint ranges: first byte → end. Bounded, because a host could mark every other block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Uncorrectable {
    ranges: BTreeMap<u64, u64>,
}

/// The most ranges kept. More than that cannot be marked.
const MAX_RANGES: usize = 65536;

impl Uncorrectable {
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether any of the bytes is marked.
    pub(super) fn overlaps(&self, start: u64, len: u64) -> bool {
        let end = start.saturating_add(len);
        let before = self.ranges.range(..end).next_back();
        before.is_some_and(|(_, last)| *last > start)
    }

    /// Marks the bytes; false if there are too many marks.
    pub(super) fn mark(&mut self, start: u64, len: u64) -> bool {
        let (mut from, mut to) = (start, start.saturating_add(len));
        let touching: Vec<(u64, u64)> = self
            .ranges
            .range(..=to)
            .rev()
            .take_while(|(_, end)| **end >= from)
            .map(|(start, end)| (*start, *end))
            .collect();
        if touching.is_empty() && self.ranges.len() >= MAX_RANGES {
            return false;
        }
        for (start, end) in touching {
            self.ranges.remove(&start);
            from = from.min(start);
            to = to.max(end);
        }
        self.ranges.insert(from, to);
        true
    }

    /// Takes the marks off; returns whether there were any.
    pub(super) fn clear(&mut self, start: u64, len: u64) -> bool {
        let to = start.saturating_add(len);
        let touching: Vec<(u64, u64)> = self
            .ranges
            .range(..to)
            .rev()
            .take_while(|(_, end)| **end > start)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (first, end) in &touching {
            self.ranges.remove(first);
            if *first < start {
                self.ranges.insert(*first, start);
            }
            if *end > to {
                self.ranges.insert(to, *end);
            }
        }
        !touching.is_empty()
    }

    pub(super) fn list(&self) -> Vec<(u64, u64)> {
        self.ranges
            .iter()
            .map(|(start, end)| (*start, end - start))
            .collect()
    }

    pub(super) fn from_list(list: &[(u64, u64)]) -> Self {
        let mut marks = Self::default();
        for (start, len) in list {
            if *len > 0 {
                marks.mark(*start, *len);
            }
        }
        marks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_agree_with_a_map_of_bytes() {
        let mut marks = Uncorrectable::default();
        let mut model = [false; 64];
        let mut seed = 0x1234_5678_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        for _ in 0..2000 {
            let start = next(60);
            let len = next(64 - start) + 1;
            let len = len.min(64 - start);
            let range = start as usize..(start + len) as usize;
            match next(3) {
                0 => {
                    assert!(marks.mark(start, len));
                    model[range].fill(true);
                }
                1 => {
                    let any = model[range.clone()].contains(&true);
                    assert_eq!(marks.clear(start, len), any);
                    model[range].fill(false);
                }
                _ => assert_eq!(marks.overlaps(start, len), model[range].contains(&true)),
            }
            assert_eq!(Uncorrectable::from_list(&marks.list()), marks);
        }
    }
}
