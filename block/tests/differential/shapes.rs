//! What an image can be: the dimensions, which of their combinations the format allows, and the
//! order in which the suite takes them.

use std::collections::HashSet;

use crate::random::Rng;

/// Each property of an image and its values. Properties that are only written are QEMU's options.
pub(crate) const DIMENSIONS: [(&str, &[&str]); 9] = [
    ("compat", &["0.10", "1.1"]),
    (
        "cluster_size",
        &["512", "1024", "4096", "16384", "65536", "262144", "2097152"],
    ),
    ("refcount_bits", &["1", "2", "4", "8", "16", "32", "64"]),
    ("extended_l2", &["off", "on"]),
    ("compression_type", &["zlib", "zstd"]),
    ("data_file", &["none", "file", "raw"]),
    ("backing", &["none", "raw", "short", "qcow2"]),
    ("encrypt", &["none", "luks", "aes"]),
    ("lazy_refcounts", &["off", "on"]),
];

/// A combination: the index of a value for each dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape([usize; DIMENSIONS.len()]);

impl Shape {
    /// The value of a dimension.
    pub(crate) fn get(self, name: &str) -> &'static str {
        let (value, (_, values)) = self
            .0
            .iter()
            .zip(&DIMENSIONS)
            .find(|(_, (dimension, _))| *dimension == name)
            .unwrap();
        values[*value]
    }

    pub(crate) fn is(self, name: &str, value: &str) -> bool {
        self.get(name) == value
    }

    pub(crate) fn number(self, name: &str) -> u64 {
        self.get(name).parse().unwrap()
    }

    /// Whether the format has such images.
    fn is_allowed(self) -> bool {
        let only_version_3 = self.is("refcount_bits", "16")
            && self.is("extended_l2", "off")
            && self.is("compression_type", "zlib")
            && self.is("data_file", "none")
            && self.is("lazy_refcounts", "off");
        (self.is("compat", "1.1") || only_version_3)
            && (self.is("extended_l2", "off") || self.number("cluster_size") >= 16384)
            && (self.is("backing", "none") || !self.is("data_file", "raw"))
    }

    /// Every two of its values.
    fn pairs(self) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let all = self.0;
        (0..all.len())
            .flat_map(move |one| (0..one).map(move |other| (one, all[one], other, all[other])))
    }

    fn all() -> Vec<Self> {
        let count = DIMENSIONS
            .iter()
            .map(|(_, values)| values.len())
            .product::<usize>();
        let numbered = |mut number: usize| {
            let mut shape = [0; DIMENSIONS.len()];
            for (value, (_, values)) in shape.iter_mut().zip(&DIMENSIONS) {
                *value = number % values.len();
                number /= values.len();
            }
            Self(shape)
        };
        (0..count)
            .map(numbered)
            .filter(|shape| shape.is_allowed())
            .collect()
    }
}

/// All combinations, and those to begin with.
pub(crate) struct Shapes {
    all: Vec<Shape>,
    /// Some in which any two values that can be together are.
    crossing: Vec<Shape>,
}

impl Shapes {
    pub(crate) fn new() -> Self {
        let all = Shape::all();
        let mut rng = Rng(1);
        let mut missing: HashSet<_> = all.iter().flat_map(|shape| shape.pairs()).collect();
        let mut crossing = Vec::new();
        while !missing.is_empty() {
            let gain = |shape: &Shape| shape.pairs().filter(|pair| missing.contains(pair)).count();
            // The best of some, and once none of those helps, of all.
            let drawn = (0..300).map(|_| rng.pick(&all)).max_by_key(gain).unwrap();
            let best = if gain(&drawn) > 0 {
                drawn
            } else {
                *all.iter().max_by_key(|shape| gain(shape)).unwrap()
            };
            for pair in best.pairs() {
                missing.remove(&pair);
            }
            crossing.push(best);
        }
        Self { all, crossing }
    }

    /// Rounds after which every two values that can be together have been.
    pub(crate) fn crossing(&self) -> u64 {
        self.crossing.len() as u64
    }

    /// What the image of a round is.
    pub(crate) fn of(&self, round: u64) -> Shape {
        match self.crossing.get(round as usize) {
            Some(shape) => *shape,
            None => Rng(round.wrapping_mul(7919)).pick(&self.all),
        }
    }
}
