//! Loads on files in memory: what the micro-benchmarks time and what is counted.

use std::{path::Path, sync::Arc};

use block::{
    AsyncDiskFile, DiskFile, Format, OpenOptions,
    formats::qcow2::create::{CreateOptions, create},
    io::EngineKind,
    offline::{OfflineOptions, with_file_on},
};

use crate::{
    Direction, Result, Work,
    load::{Straight, Virtio},
    memory::MemoryHost,
    nvme::Nvme,
    side::Load,
};

/// One load.
pub struct Case {
    /// Its name.
    pub name: &'static str,
    image: Image,
    direction: Direction,
    device: Device,
}

#[derive(Clone, Copy)]
enum Image {
    Raw,
    Qcow2,
    Subclusters,
}

/// The device that the accesses go through.
#[derive(Clone, Copy)]
enum Device {
    None,
    VirtioBlk,
    Nvme,
}

const fn case(name: &'static str, image: Image, direction: Direction, device: Device) -> Case {
    Case {
        name,
        image,
        direction,
        device,
    }
}

/// All of them: 512 bytes, 32 in flight, on a disk of 16 MiB whose tables are in memory.
pub const CASES: &[Case] = &[
    case("raw read", Image::Raw, Direction::Read, Device::None),
    case("raw write", Image::Raw, Direction::Write, Device::None),
    case("qcow2 read", Image::Qcow2, Direction::Read, Device::None),
    case("qcow2 write", Image::Qcow2, Direction::Write, Device::None),
    case(
        "subcluster read",
        Image::Subclusters,
        Direction::Read,
        Device::None,
    ),
    case(
        "subcluster write",
        Image::Subclusters,
        Direction::Write,
        Device::None,
    ),
    case(
        "virtio-blk raw read",
        Image::Raw,
        Direction::Read,
        Device::VirtioBlk,
    ),
    case(
        "virtio-blk qcow2 read",
        Image::Qcow2,
        Direction::Read,
        Device::VirtioBlk,
    ),
    case(
        "virtio-blk qcow2 write",
        Image::Qcow2,
        Direction::Write,
        Device::VirtioBlk,
    ),
    case("nvme raw read", Image::Raw, Direction::Read, Device::Nvme),
    case("nvme raw write", Image::Raw, Direction::Write, Device::Nvme),
];

/// The disk whose mapping is of interest by itself.
pub const MAPPED: Case = case("qcow2 read", Image::Qcow2, Direction::Read, Device::None);

const SIZE: u64 = 16 << 20;

impl Case {
    /// The accesses.
    #[must_use]
    pub fn work(&self) -> Work {
        Work {
            direction: self.direction,
            direct: false,
            block: 512,
            depth: 32,
            size: SIZE,
        }
    }

    /// Makes the image and the load, on the calling thread.
    ///
    /// # Errors
    /// The image's and the device's.
    pub fn load(&self) -> Result<Box<dyn Load>> {
        let disk = self.disk()?;
        let work = self.work();
        Ok(match self.device {
            Device::None => Box::new(Straight::new(&*disk, work)?),
            Device::VirtioBlk => Box::new(Virtio::new(disk, work, false)?),
            Device::Nvme => Box::new(Nvme::new(disk, work)?),
        })
    }

    /// A disk every byte of which was written.
    ///
    /// # Errors
    /// The image's.
    pub fn disk(&self) -> Result<Box<dyn AsyncDiskFile>> {
        let host = MemoryHost::new(2 * SIZE as usize);
        let path = Path::new("disk");
        let format = match self.image {
            Image::Raw => Format::Raw,
            Image::Qcow2 | Image::Subclusters => Format::Qcow2,
        };
        let options = CreateOptions {
            size: SIZE,
            extended_l2: matches!(self.image, Image::Subclusters),
            ..CreateOptions::default()
        };
        let made = Arc::clone(&host);
        with_file_on(
            made,
            path,
            OfflineOptions::create(),
            async |io, file| match format {
                Format::Raw => io.set_len(file, SIZE).await,
                _ => create(io, file, &options).await,
            },
        )?;
        let disk = OpenOptions::new()
            .format(format)
            .engine(EngineKind::IoUring)
            .open_on(path, host)?;
        let data = vec![1; 1 << 20];
        for offset in (0..SIZE).step_by(data.len()) {
            disk.write_at(&data, offset)?;
        }
        disk.flush()?;
        Ok(Box::new(disk))
    }
}
