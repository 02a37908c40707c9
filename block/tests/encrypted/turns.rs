//! Images that QEMU and Platter write in turns.

use super::*;

/// An image and what it should hold.
pub(super) struct Pair {
    dir: TempDir,
    pub(super) path: PathBuf,
    kind: Kind,
    pub(super) model: Vec<u8>,
    rng: Random,
    what: String,
}

impl Pair {
    pub(super) fn new(kind: Kind, seed: u64, what: &str) -> Self {
        let dir = temp_dir();
        Self {
            path: dir.path().join("image"),
            dir,
            kind,
            model: vec![0; SIZE as usize],
            rng: Random(seed),
            what: format!("{kind:?} {what}"),
        }
    }

    pub(super) fn range(&mut self, unit: u64) -> (u64, u64) {
        let start = self.rng.below(SIZE / unit) * unit;
        let most = [2000, 70_000, 1 << 20][self.rng.below(3) as usize];
        let len = (1 + self.rng.below(most)).next_multiple_of(unit);
        (start, len.min(SIZE - start))
    }

    pub(super) fn fill(&mut self, start: u64, len: u64, value: u8) {
        self.model[start as usize..(start + len) as usize].fill(value);
    }

    pub(super) fn qemu_turn(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..8 {
            let (start, len) = self.range(512);
            let value = self.rng.below(255) as u8 + 1;
            self.fill(start, len, value);
            commands.push(format!("write -P {value} {start} {len}"));
            let (start, len) = self.range(512);
            self.fill(start, len, 0);
            commands.push(format!("write -z {start} {len}"));
        }
        qemu_io(&self.kind.spec(&self.path), &commands);
    }

    pub(super) fn write(&mut self, disk: &Disk, unit: u64) {
        let (start, len) = self.range(unit);
        let mut rng = Random(self.rng.next());
        let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        disk.write_at(&bytes, start).unwrap();
        self.model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
    }

    pub(super) fn our_turn(&mut self) {
        let disk = open(&self.path);
        for round in 0..12 {
            let unit = if round % 2 == 0 { 512 } else { 1 };
            self.write(&disk, unit);
            let (start, len) = self.range(1);
            self.fill(start, len, 0);
            disk.write_zeroes(start, len, round % 3 == 0).unwrap();
            let (start, len) = self.range(1);
            let mut seen = vec![0; len as usize];
            disk.read_at(&mut seen, start).unwrap();
            let model = &self.model[start as usize..(start + len) as usize];
            assert_same(&seen, model, &self.what);
        }
        disk.close().unwrap();
    }

    pub(super) fn compare(&self, when: &str) {
        let what = format!("{} {when}", self.what);
        self.kind.check(&self.path, &what);
        let seen = qemu_reads(&self.dir, &self.kind.spec(&self.path));
        // A raw target of QEMU ends where the disk does.
        assert_same(&seen, &self.model, &format!("{what}: QEMU reads"));
        let seen = read_all(&open(&self.path));
        assert_same(&seen, &self.model, &format!("{what}: Platter reads"));
    }

    pub(super) fn turns(&mut self) {
        self.qemu_turn();
        self.compare("after QEMU wrote");
        self.our_turn();
        self.compare("after Platter wrote");
        self.qemu_turn();
        self.compare("after both wrote");
    }

    /// A new LUKS volume reads as whatever its bytes decrypt to.
    pub(super) fn clear(&mut self) {
        let disk = open(&self.path);
        disk.write_at(&self.model, 0).unwrap();
        disk.close().unwrap();
    }
}

#[test]
fn images_of_both_are_read_and_written_by_both() {
    for (number, kind) in Kind::ALL.into_iter().enumerate() {
        for (cluster, more) in [
            (512, ""),
            (4096, ",compat=0.10"),
            (65536, ""),
            (2 << 20, ""),
            (65536, ",extended_l2=on"),
            (65536, ",data_file=DATA"),
        ] {
            for ours in [false, true] {
                // QEMU takes a second for each new image: it makes what is special.
                if (ours && !more.is_empty()) || (!ours && more.is_empty() && cluster != 65536) {
                    continue;
                }
                let what = format!("cluster {cluster}{more}, made here: {ours}");
                let mut pair = Pair::new(kind, cluster + number as u64, &what);
                if ours {
                    kind.create(&pair.path, cluster);
                } else if kind == Kind::Luks {
                    kind.qemu_create(&pair.path, "");
                } else {
                    let data = pair.dir.path().join("data");
                    let more = more.replace("DATA", data.to_str().unwrap());
                    kind.qemu_create(&pair.path, &format!(",cluster_size={cluster}{more}"));
                }
                if kind == Kind::Luks {
                    pair.clear();
                }
                pair.turns();
            }
            if kind == Kind::Luks && cluster == 4096 {
                // The format has no clusters: once is enough.
                break;
            }
        }
    }
}
