//! A round: one image, some turns of each program, and what must hold after each.

use std::{collections::HashSet, fs};

use block::{DiskExtras, DiskFile};

use crate::{
    image::Image,
    model::{Model, assert_same},
    random::Rng,
    shapes::Shape,
};

/// Turns of a round.
const TURNS: u64 = 3;
const BITMAP: &str = "b";
const SNAPSHOT: &str = "s";

pub(crate) struct Round {
    pub(crate) image: Image,
    pub(crate) rng: Rng,
    pub(crate) model: Model,
    /// The content when a snapshot was taken.
    pub(crate) snapshot: Option<Vec<u8>>,
    /// The content when a bitmap was added.
    pub(crate) bitmap: Option<Vec<u8>>,
}

impl Round {
    pub(crate) fn new(number: u64, shape: Shape) -> Self {
        let mut rng = Rng(number.wrapping_mul(7919).wrapping_add(1));
        let image = Image::new(number, shape, &mut rng);
        let cluster = shape.number("cluster_size");
        Self {
            model: Model {
                bytes: Vec::new(),
                cluster,
                unit: if shape.is("extended_l2", "on") {
                    cluster / 32
                } else {
                    cluster
                },
                keeps_discarded: shape.is("compat", "0.10") && !shape.is("backing", "none"),
                compressed: HashSet::new(),
            },
            image,
            rng,
            snapshot: None,
            bitmap: None,
        }
    }

    pub(crate) fn what(&self) -> String {
        self.image.what()
    }

    pub(crate) fn can_compress(&self) -> bool {
        !self.image.has_data_file() && !self.image.is_encrypted()
    }

    pub(crate) fn range(&mut self, unit: u64) -> (u64, u64) {
        let size = self.model.size();
        let start = self.rng.below(size / unit) * unit;
        let most = if self.rng.one_in(8) {
            size
        } else {
            3 * self.model.cluster + 2048
        };
        let len = (1 + self.rng.below(most)).next_multiple_of(unit);
        (start, len.min((size - start) / unit * unit))
    }

    /// Whole clusters, up to the end of the disk.
    pub(crate) fn clusters(&mut self) -> (u64, u64) {
        let (cluster, size) = (self.model.cluster, self.model.size());
        let start = self.rng.below(size.div_ceil(cluster)) * cluster;
        let len = (1 + self.rng.below(3)) * cluster;
        (start, len.min(size - start))
    }

    pub(crate) fn play(&mut self) {
        self.model.bytes = self.image.make(&mut self.rng);
        if self.image.shape.is("data_file", "raw") && self.image.is_encrypted() {
            // Its clusters are mapped from the beginning, to what no key has written.
            self.fill_all();
        }
        let shape = self.image.shape;
        if shape.is("compat", "1.1") && self.rng.one_in(3) && self.image.add_bitmap(BITMAP) {
            self.bitmap = Some(self.model.bytes.clone());
        }
        // A shared cluster is counted twice.
        let can_share = !shape.is("refcount_bits", "1") && !self.image.has_data_file();
        let snapshot_at = if can_share && self.rng.one_in(3) {
            1
        } else {
            TURNS
        };
        for turn in 0..TURNS {
            if turn == snapshot_at {
                self.image.qemu_img("snapshot", &["-c", SNAPSHOT], &[]);
                self.snapshot = Some(self.model.bytes.clone());
            }
            if self.rng.one_in(2) {
                self.qemu_turn();
            }
            self.platter_turn();
            self.compare(&format!("after turn {turn}"));
        }
    }

    fn fill_all(&mut self) {
        let disk = self.image.open(false);
        disk.write_at(&self.model.bytes, 0).unwrap();
        disk.close().unwrap();
    }

    fn compare(&self, when: &str) {
        let what = format!("{} {when}", self.what());
        self.image.qemu_img("check", &["-q"], &[]);
        let model = &self.model.bytes;
        let seen = self.image.extract(None);
        assert_same(&seen, model, &format!("{what}: QEMU reads"));
        if self.image.shape.is("data_file", "raw") && !self.image.is_encrypted() {
            let mut data = fs::read(self.image.data_file()).unwrap();
            // QEMU makes it a whole number of clusters long.
            data.truncate(model.len());
            assert_same(&data, model, &format!("{what}: the raw data file"));
        }
        if let Some(snapshot) = &self.snapshot {
            let seen = self.image.extract(Some(SNAPSHOT));
            assert_same(&seen, snapshot, &format!("{what}: the snapshot"));
        }
        let disk = self.image.open(true);
        let mut bytes = vec![0xa5; model.len()];
        disk.read_at(&mut bytes, 0).unwrap();
        assert_same(&bytes, model, &format!("{what}: Platter reads"));
        if let Some(old) = &self.bitmap {
            let bits = disk.bitmap_bits(BITMAP).unwrap();
            let mut clean = 0;
            for dirty in bits.ranges() {
                let same = self.model.same_as(old, clean, dirty.start.0);
                assert!(same, "{what}: {clean} to {} changed unseen", dirty.start.0);
                clean = dirty.end();
            }
            let same = self.model.same_as(old, clean, self.model.size());
            assert!(same, "{what}: behind {clean} is a change unseen");
        }
    }
}
