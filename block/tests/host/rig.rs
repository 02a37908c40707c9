//! Images on a disk file system.

use std::{fs, path::PathBuf};

use block::{
    Disk, OpenOptions,
    formats::qcow2::create::{CreateOptions, create},
    io::EngineKind,
    offline::{OfflineOptions, with_file},
};

/// An image file, gone when dropped.
pub(crate) struct Image {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

fn place(name: &str) -> Image {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(name);
    Image { _dir: dir, path }
}

/// A raw image of zeroes.
pub(crate) fn raw(size: u64) -> Image {
    let image = place("disk.raw");
    fs::File::create(&image.path)
        .unwrap()
        .set_len(size)
        .unwrap();
    image
}

/// An empty qcow2 image.
pub(crate) fn qcow2(size: u64) -> Image {
    let image = place("disk.qcow2");
    fs::File::create(&image.path).unwrap();
    let options = CreateOptions {
        size,
        ..CreateOptions::default()
    };
    with_file(&image.path, OfflineOptions::create(), async |io, file| {
        create(io, file, &options).await
    })
    .unwrap();
    image
}

impl Image {
    /// Opens it for every engine that can drive it here.
    pub(crate) fn each_engine(&self, mut test: impl FnMut(Disk)) {
        for engine in EngineKind::ALL {
            let direct = engine == EngineKind::LinuxAio;
            let options = OpenOptions::new().engine(engine).direct(direct);
            test(options.open_disk(&self.path).unwrap());
        }
    }

    /// Opens it with the defaults.
    pub(crate) fn open(&self) -> Disk {
        OpenOptions::new().open_disk(&self.path).unwrap()
    }
}

/// `len` bytes that tell what they are.
pub(crate) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (seed.wrapping_mul(31) ^ (at / 7).wrapping_add(at)) as u8)
        .collect()
}
