//! Small ISO 9660 images, made here: a volume with one file, and for firmware a boot catalogue (El Torito).

use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes of a sector.
const SECTOR: usize = 2048;
/// Where the parts of the image are.
const TERMINATOR: u32 = 18;
const PATHS: u32 = 19;
const ROOT: u32 = 20;
const CATALOGUE: u32 = 21;
const FILE: u32 = 22;

/// What firmware starts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Boot<'a> {
    /// A BIOS: four sectors of 512 bytes, of which this is the first.
    Bios(&'a [u8]),
    /// UEFI: a FAT file system, to the end of the medium. Behind these bytes it has zeroes only, up to `size`.
    Uefi { bytes: &'a [u8], size: u64 },
}

impl Boot<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bios(bytes) | Self::Uefi { bytes, .. } => bytes,
        }
    }

    /// Bytes it takes on the medium.
    fn size(&self) -> u64 {
        match self {
            Self::Bios(_) => SECTOR as u64,
            Self::Uefi { size, .. } => *size,
        }
    }

    /// The boot catalogue that leads to it.
    fn catalogue(&self, sector: u32) -> Vec<u8> {
        // The platform, and how many sectors of 512 bytes are loaded: 0 means all there are.
        let (platform, sectors) = match self {
            Self::Bios(_) => (0, 4),
            Self::Uefi { .. } => (0xef, 0),
        };
        let mut catalogue = vec![1, platform];
        catalogue.resize(28, 0);
        // With its checksum the first entry, in words, adds up to nothing.
        let checksum = 0_u16
            .wrapping_sub(u16::from_le_bytes([1, platform]))
            .wrapping_sub(0xaa55);
        catalogue.extend(checksum.to_le_bytes());
        catalogue.extend([0x55, 0xaa]);
        // Bootable, no emulation.
        catalogue.extend([0x88, 0, 0, 0, 0, 0, sectors, 0]);
        catalogue.extend(sector.to_le_bytes());
        catalogue
    }
}

/// A number in both byte orders.
fn both32(value: u32) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

fn both16(value: u16) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

/// A directory record.
fn record(name: &[u8], sector: u32, bytes: u32, folder: bool) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both32(sector));
    record.extend(both32(bytes));
    record.extend([100, 1, 1, 0, 0, 0, 0]);
    record.extend([u8::from(folder) * 2, 0, 0]);
    record.extend(both16(1));
    record.push(name.len() as u8);
    record.extend(name);
    if record.len() % 2 == 1 {
        record.push(0);
    }
    record[0] = record.len() as u8;
    record
}

/// Makes an image with the file `DATA` of that content, and something to start if that is given.
pub(crate) fn write_iso(path: &Path, label: &str, content: &[u8], boot: Option<Boot<'_>>) {
    let behind = FILE + (content.len().div_ceil(SECTOR)) as u32;
    let started = boot.map_or(0, |boot| boot.size().div_ceil(SECTOR as u64) as u32);
    // Firmware and drives see a disc of some size.
    let sectors = behind + started.max(300);
    let mut image = vec![0; behind as usize * SECTOR];
    let mut put = |sector: u32, bytes: &[u8]| {
        let at = sector as usize * SECTOR;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(16, &volume(label, sectors));
    if let Some(boot) = boot {
        let mut descriptor = b"\0CD001\x01EL TORITO SPECIFICATION".to_vec();
        descriptor.resize(71, 0);
        descriptor.extend(CATALOGUE.to_le_bytes());
        put(17, &descriptor);
        put(CATALOGUE, &boot.catalogue(behind));
    } else {
        put(17, b"\xffCD001\x01");
    }
    put(TERMINATOR, b"\xffCD001\x01");
    let mut paths = vec![1, 0];
    paths.extend(ROOT.to_le_bytes());
    paths.extend([1, 0, 0, 0]);
    put(PATHS, &paths);
    let folder = [
        record(&[0], ROOT, SECTOR as u32, true),
        record(&[1], ROOT, SECTOR as u32, true),
        record(b"DATA.;1", FILE, content.len() as u32, false),
    ];
    put(ROOT, &folder.concat());
    put(FILE, content);
    let mut file = File::create(path).expect("an image");
    file.write_all(&image).expect("an image");
    file.write_all(boot.as_ref().map_or(&[], Boot::bytes))
        .expect("an image");
    file.set_len(u64::from(sectors) * SECTOR as u64)
        .expect("an image");
}

/// The primary volume descriptor.
fn volume(label: &str, sectors: u32) -> Vec<u8> {
    let mut volume = vec![1];
    volume.extend(b"CD001\x01\0");
    volume.extend([b' '; 32]);
    volume.extend(format!("{label:<32}").bytes());
    volume.extend([0; 8]);
    volume.extend(both32(sectors));
    volume.extend([0; 32]);
    volume.extend([both16(1), both16(1), both16(SECTOR as u16), both32(10)].concat());
    volume.extend(PATHS.to_le_bytes());
    volume.extend([0; 4]);
    volume.extend(PATHS.to_be_bytes());
    volume.extend([0; 4]);
    volume.extend(record(&[0], ROOT, SECTOR as u32, true));
    volume.resize(881, b' ');
    volume.push(1);
    volume
}
