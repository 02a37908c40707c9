//! Dirty bits: which parts of a disk were written, at some granularity.
//!
//! Kept sparse: a part with no bit set takes no memory, and neither does a part with every bit set.

use std::collections::BTreeMap;

use crate::GuestRange;

/// Words of a chunk: 4 KiB.
const WORDS: usize = 512;
/// Bits of a chunk.
const CHUNK_BITS: u64 = WORDS as u64 * 64;

/// A part of the bits that are not all clear.
#[derive(Clone)]
enum Chunk {
    /// Every bit is set.
    Ones,
    /// Some are; least significant first.
    Mixed(Box<[u64; WORDS]>),
}

impl Chunk {
    fn word(&self, at: usize) -> u64 {
        match self {
            Chunk::Ones => u64::MAX,
            Chunk::Mixed(words) => words[at],
        }
    }
}

/// The bits of a dirty bitmap. A bit stands for `granularity` bytes of the disk.
#[derive(Clone)]
pub struct DirtyBits {
    /// Bytes of the disk.
    size: u64,
    granularity_bits: u32,
    chunks: BTreeMap<u64, Chunk>,
}

impl DirtyBits {
    /// No bit set, for a disk of `size` bytes and bits of `1 << granularity_bits` bytes
    /// (at most 63).
    #[must_use]
    pub fn new(size: u64, granularity_bits: u32) -> Self {
        Self {
            size,
            granularity_bits: granularity_bits.min(63),
            chunks: BTreeMap::new(),
        }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the disk that a bit stands for.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// The number of bits.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// Whether no bit is set.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.next_set(0).is_none()
    }

    /// Bytes of memory that the bits take, about.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let mixed = |chunk: &&Chunk| matches!(chunk, Chunk::Mixed(_));
        let mixed = self.chunks.values().filter(mixed).count();
        (self.chunks.len() * 64 + mixed * WORDS * 8) as u64
    }

    /// The dirty ranges in order; each as long as it can be, the last one cut at the end of the disk.
    pub fn ranges(&self) -> impl Iterator<Item = GuestRange> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_set(at)?;
            at = self.next_clear(first);
            let start = first << self.granularity_bits;
            // The last bit may stand for less than its granularity.
            let end = at
                .checked_mul(self.granularity())
                .map_or(self.size, |end| end.min(self.size));
            Some(GuestRange::new(start, end - start))
        })
    }

    /// Bytes of the disk that are dirty.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.ranges().map(|range| range.len).sum()
    }

    /// Marks every bit that a range of the disk touches; what lies beyond the end is ignored.
    pub fn mark(&mut self, range: GuestRange) {
        if range.len == 0 || range.start.0 >= self.size {
            return;
        }
        let last = range.end().min(self.size) - 1;
        self.set(
            range.start.0 >> self.granularity_bits,
            (last >> self.granularity_bits) + 1,
        );
    }

    /// Marks what another bitmap of a disk of the same size has; granularities may differ.
    pub fn merge(&mut self, other: &Self) {
        for range in other.ranges() {
            self.mark(range);
        }
    }

    /// Clears every bit.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// The disk has another size now: new bits are clear, those beyond the end are gone.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        let bits = self.bits();
        let (chunk, within) = (bits / CHUNK_BITS, bits % CHUNK_BITS);
        let _gone = self.chunks.split_off(&(chunk + u64::from(within > 0)));
        if within == 0 {
            return;
        }
        if let Some(last) = self.chunks.get_mut(&chunk) {
            let mut words = Box::new([0; WORDS]);
            for (at, word) in words.iter_mut().enumerate() {
                *word = last.word(at) & mask_below(within, at);
            }
            *last = Chunk::Mixed(words);
        }
    }

    /// Sets the bits from `first` up to `end`.
    fn set(&mut self, mut first: u64, end: u64) {
        while first < end {
            let chunk = first / CHUNK_BITS;
            let stop = end.min((chunk + 1) * CHUNK_BITS);
            let (from, to) = (first % CHUNK_BITS, stop - chunk * CHUNK_BITS);
            first = stop;
            if to - from == CHUNK_BITS {
                self.chunks.insert(chunk, Chunk::Ones);
                continue;
            }
            let place = self
                .chunks
                .entry(chunk)
                .or_insert_with(|| Chunk::Mixed(Box::new([0; WORDS])));
            if let Chunk::Mixed(words) = place {
                let (low, high) = ((from / 64) as usize, to.div_ceil(64) as usize);
                for (at, word) in words.iter_mut().enumerate().take(high).skip(low) {
                    *word |= mask_below(to, at) & !mask_below(from, at);
                }
            }
        }
    }

    /// The first set bit at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        let first = from / CHUNK_BITS;
        for (chunk, content) in self.chunks.range(first..) {
            let skip = if *chunk == first {
                from % CHUNK_BITS
            } else {
                0
            };
            for at in (skip / 64) as usize..WORDS {
                let word = content.word(at) & !mask_below(skip, at);
                if word != 0 {
                    return Some(
                        chunk * CHUNK_BITS + at as u64 * 64 + u64::from(word.trailing_zeros()),
                    );
                }
            }
        }
        None
    }

    /// The first clear bit at or after `from`; the number of bits where all are set up to the end.
    #[must_use]
    pub fn next_clear(&self, from: u64) -> u64 {
        let (mut chunk, mut skip) = (from / CHUNK_BITS, from % CHUNK_BITS);
        loop {
            let start = chunk * CHUNK_BITS;
            match self.chunks.get(&chunk) {
                None => return (start + skip).min(self.bits()),
                Some(Chunk::Ones) => {}
                Some(Chunk::Mixed(words)) => {
                    for (at, word) in words.iter().enumerate().skip((skip / 64) as usize) {
                        let clear = !word & !mask_below(skip, at);
                        if clear != 0 {
                            let bit = start + at as u64 * 64 + u64::from(clear.trailing_zeros());
                            return bit.min(self.bits());
                        }
                    }
                }
            }
            (chunk, skip) = (chunk + 1, 0);
        }
    }

    /// Sets the bits that `bytes` has, least significant first, from bit `first` (a multiple of 64)
    /// on; what lies beyond the end is ignored.
    pub(crate) fn set_bytes(&mut self, first: u64, bytes: &[u8]) {
        let bits = self.bits();
        for (at, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let bit = first + at as u64 * 64;
            if bit >= bits {
                return;
            }
            let mut word = u64::from_le_bytes(*word);
            if bits - bit < 64 {
                word &= (1 << (bits - bit)) - 1;
            }
            if word == 0 {
                continue;
            }
            let place = self
                .chunks
                .entry(bit / CHUNK_BITS)
                .or_insert_with(|| Chunk::Mixed(Box::new([0; WORDS])));
            if let Chunk::Mixed(words) = place {
                words[(bit % CHUNK_BITS / 64) as usize] |= word;
            }
        }
    }

    /// Sets the bits from `first` up to `end`; what lies beyond the end is ignored.
    pub(crate) fn set_all(&mut self, first: u64, end: u64) {
        let end = end.min(self.bits());
        self.set(first, end);
    }

    /// The bits from bit `first` (a multiple of 64) on, least significant first.
    pub(crate) fn get_bytes(&self, first: u64, bytes: &mut [u8]) {
        for (at, out) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let bit = first + at as u64 * 64;
            let place = (bit % CHUNK_BITS / 64) as usize;
            let word = match self.chunks.get(&(bit / CHUNK_BITS)) {
                Some(chunk) => chunk.word(place),
                None => 0,
            };
            *out = word.to_le_bytes();
        }
    }
}

/// The bits of word `at` that lie below bit `end` of the chunk.
fn mask_below(end: u64, at: usize) -> u64 {
    match end.saturating_sub(at as u64 * 64) {
        bits @ 0..64 => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

impl std::fmt::Debug for DirtyBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyBits")
            .field("size", &self.size)
            .field("granularity", &self.granularity())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(bits: &DirtyBits) -> Vec<(u64, u64)> {
        bits.ranges().map(|r| (r.start.0, r.end())).collect()
    }

    #[test]
    fn ranges_are_rounded_to_bits_and_cut_at_the_end() {
        let mut bits = DirtyBits::new(10_000, 9);
        bits.mark(GuestRange::new(511, 2));
        bits.mark(GuestRange::new(9_999, 500));
        bits.mark(GuestRange::new(20_000, 500));
        bits.mark(GuestRange::new(3000, 0));
        assert_eq!(list(&bits), [(0, 1024), (9728, 10_000)]);
        assert_eq!(bits.dirty_bytes(), 1024 + 272);
        bits.clear();
        assert!(bits.is_clear());
    }

    #[test]
    fn whole_chunks_take_no_memory() {
        let size = CHUNK_BITS * 512 * 8;
        let mut bits = DirtyBits::new(size, 9);
        bits.mark(GuestRange::new(0, size));
        assert!(bits.memory() < 1024);
        assert_eq!(list(&bits), [(0, size)]);
        bits.resize(size / 2 + 512);
        assert_eq!(list(&bits), [(0, size / 2 + 512)]);
        bits.resize(size);
        assert_eq!(list(&bits), [(0, size / 2 + 512)]);
    }

    #[test]
    fn agrees_with_a_list_of_booleans() {
        let mut state = 12345u64;
        let mut next = |limit: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % limit
        };
        let count = CHUNK_BITS * 3 + 77;
        let mut bits = DirtyBits::new(count, 0);
        let mut model = vec![false; count as usize];
        for _ in 0..60 {
            let first = next(count);
            let most = if next(3) == 0 { count } else { 200 };
            let end = (first + next(most)).min(count);
            bits.mark(GuestRange::new(first, end - first));
            model[first as usize..end as usize].fill(true);
            let mut expected = Vec::new();
            let mut start = None;
            for at in 0..=count {
                let set = at < count && model[at as usize];
                match (set, start) {
                    (true, None) => start = Some(at),
                    (false, Some(from)) => {
                        expected.push((from, at));
                        start = None;
                    }
                    _ => {}
                }
            }
            assert_eq!(list(&bits), expected);
            if next(20) == 0 {
                bits.clear();
                model.fill(false);
            }
        }
        // Through bytes and back.
        let mut copy = DirtyBits::new(count, 0);
        for first in (0..count).step_by(4096) {
            let mut bytes = [0; 512];
            bits.get_bytes(first, &mut bytes);
            copy.set_bytes(first, &bytes);
        }
        assert_eq!(list(&copy), list(&bits));
    }

    #[test]
    fn merging_converts_the_granularity() {
        let mut fine = DirtyBits::new(1 << 20, 9);
        fine.mark(GuestRange::new(70_000, 1));
        let mut coarse = DirtyBits::new(1 << 20, 16);
        coarse.merge(&fine);
        assert_eq!(list(&coarse), [(65_536, 131_072)]);
    }
}
