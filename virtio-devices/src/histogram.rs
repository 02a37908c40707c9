//! Log-linear histograms of latencies.
//!
//! Values are nanoseconds. Up to 63 each value has its own bucket; above, every power of two is cut
//! into 32 equal buckets, so a bucket is at most 1/32 of its value wide. A percentile is reported as
//! the middle of its bucket: **at most 1.6 % off**. Values above 2^40 ns (18 minutes) count as that.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Buckets of a power of two, as a power of two.
const SUB_BITS: u32 = 5;
/// The largest power of two that has its own buckets.
const TOP_BIT: u32 = 39;
/// All buckets: the linear ones below `2 << SUB_BITS`, then 32 a power of two.
const BUCKETS: usize = (((TOP_BIT - SUB_BITS) as usize) << SUB_BITS) + (2 << SUB_BITS);

fn bucket(value: u64) -> usize {
    let value = value.min((1 << (TOP_BIT + 1)) - 1);
    let top = 63 - (value | 1).leading_zeros();
    if top <= SUB_BITS {
        return value as usize;
    }
    let shift = top - SUB_BITS;
    ((shift as usize) << SUB_BITS) + (value >> shift) as usize
}

/// The first value of a bucket and the number of values in it.
fn range(bucket: usize) -> (u64, u64) {
    if bucket < 2 << SUB_BITS {
        return (bucket as u64, 1);
    }
    let shift = (bucket >> SUB_BITS) as u32 - 1;
    let mantissa = (bucket & ((1 << SUB_BITS) - 1)) as u64 + (1 << SUB_BITS);
    (mantissa << shift, 1 << shift)
}

/// Values that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// The smallest value, in nanoseconds.
    pub from: u64,
    /// The largest value, in nanoseconds. The last bucket of all holds whatever is larger, too.
    pub to: u64,
    /// The number of values.
    pub count: u64,
}

/// A histogram that one thread fills, or that several were merged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram.
    #[must_use]
    pub fn new() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            count: 0,
            sum: 0,
            max: 0,
        }
    }

    /// Counts one value.
    pub fn record(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    /// Adds everything that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// The number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest value, exactly.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean, rounded down; 0 when empty.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The value that `fraction` (0 to 1) of all values do not exceed; 0 when empty.
    #[must_use]
    pub fn quantile(&self, fraction: f64) -> u64 {
        if self.count == 0 {
            return 0;
        }
        let rank = (fraction.clamp(0.0, 1.0) * self.count as f64)
            .ceil()
            .max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let (first, width) = range(index);
                return (first + width / 2).min(self.max);
            }
        }
        self.max
    }

    /// The buckets that hold something, in the order of their values.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> + '_ {
        let filled = self.counts.iter().enumerate();
        filled
            .filter(|(_, count)| **count > 0)
            .map(|(index, &count)| {
                let (from, width) = range(index);
                let to = from + (width - 1);
                Bucket { from, to, count }
            })
    }

    /// The median.
    #[must_use]
    pub fn p50(&self) -> u64 {
        self.quantile(0.5)
    }

    /// The 99th percentile.
    #[must_use]
    pub fn p99(&self) -> u64 {
        self.quantile(0.99)
    }

    /// The 99.9th percentile.
    #[must_use]
    pub fn p999(&self) -> u64 {
        self.quantile(0.999)
    }
}

/// A histogram that its one writer fills while any thread reads it. A reader may see a value in one
/// field and not yet in another.
#[derive(Debug)]
pub struct SharedHistogram {
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for SharedHistogram {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl SharedHistogram {
    /// Counts one value. Only one thread at a time may do so: with two, counts get lost.
    pub fn record(&self, nanoseconds: u64) {
        add(&self.counts[bucket(nanoseconds)], 1);
        add(&self.sum, nanoseconds);
        if nanoseconds > self.max.load(Ordering::Relaxed) {
            self.max.store(nanoseconds, Ordering::Relaxed);
        }
    }

    /// What has been counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Histogram {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        Histogram {
            count: counts.iter().sum(),
            counts,
            sum: self.sum.load(Ordering::Relaxed),
            max: self.max.load(Ordering::Relaxed),
        }
    }
}

/// Adds to a counter that has one writer: no locked instruction.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(value),
        Ordering::Relaxed,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_tile_all_values() {
        let mut next = 0;
        for index in 0..BUCKETS {
            let (first, width) = range(index);
            assert_eq!(first, next, "bucket {index}");
            assert_eq!(bucket(first), index);
            assert_eq!(bucket(first + width - 1), index);
            next = first + width;
        }
        assert_eq!(next, 1 << (TOP_BIT + 1));
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_within_the_documented_error() {
        let mut histogram = Histogram::new();
        for value in 1..=100_000u64 {
            histogram.record(value * 10);
        }
        for (fraction, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.999, 999_000.0)] {
            let got = histogram.quantile(fraction) as f64;
            assert!((got - exact).abs() / exact <= 0.016, "{got} for {exact}");
        }
        assert_eq!(histogram.max(), 1_000_000);
        assert_eq!(histogram.mean(), 500_005);
    }

    #[test]
    fn buckets_hold_what_was_counted() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.buckets().next(), None);
        for value in [3, 3, 64, 65, 1_000_000] {
            histogram.record(value);
        }
        let buckets: Vec<Bucket> = histogram.buckets().collect();
        let bucket = |from, to, count| Bucket { from, to, count };
        assert_eq!(buckets[..2], [bucket(3, 3, 2), bucket(64, 65, 2)]);
        let last = buckets[2];
        assert!(last.count == 1 && (last.from..=last.to).contains(&1_000_000));
        assert_eq!(buckets.len(), 3);
    }

    #[test]
    fn merging_is_counting_together() {
        let (mut a, mut b, mut both) = (Histogram::new(), Histogram::new(), Histogram::new());
        for value in 0..1000 {
            let half = if value % 2 == 0 { &mut a } else { &mut b };
            half.record(value * value);
            both.record(value * value);
        }
        a.merge(&b);
        assert_eq!(a, both);
    }

    #[test]
    fn a_shared_histogram_counts_the_same() {
        let shared = SharedHistogram::default();
        let mut plain = Histogram::new();
        for value in [0, 1, 63, 64, 65, 1_000_000, u64::MAX >> 1] {
            shared.record(value);
            plain.record(value);
        }
        assert_eq!(shared.snapshot(), plain);
        assert_eq!(Histogram::new().p99(), 0);
    }
}
