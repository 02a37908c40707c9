//! Small ISO 9660 images, made here: a volume with one file, and for firmware a boot catalogue (El Torito).

/// Bytes of a sector.
const SECTOR: usize = 2048;
/// Where the parts of the image are.
const TERMINATOR: u32 = 18;
const PATHS: u32 = 19;
const ROOT: u32 = 20;
const CATALOGUE: u32 = 21;
const BOOT: u32 = 22;
const FILE: u32 = 23;

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

/// An image with the file `DATA` of that content, and a boot sector if one is given.
pub(crate) fn iso(label: &str, content: &[u8], boot: Option<&[u8]>) -> Vec<u8> {
    let sectors = FILE + (content.len().div_ceil(SECTOR)) as u32;
    // Firmware and drives see a disc of some size.
    let mut image = vec![0; (sectors as usize + 300) * SECTOR];
    let mut put = |sector: u32, bytes: &[u8]| {
        let at = sector as usize * SECTOR;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let mut volume = vec![1];
    volume.extend(b"CD001\x01\0");
    volume.extend([b' '; 32]);
    volume.extend(format!("{label:<32}").bytes());
    volume.extend([0; 8]);
    volume.extend(both32(sectors + 300));
    volume.extend([0; 32]);
    volume.extend([both16(1), both16(1), both16(SECTOR as u16), both32(10)].concat());
    volume.extend(PATHS.to_le_bytes());
    volume.extend([0; 4]);
    volume.extend(PATHS.to_be_bytes());
    volume.extend([0; 4]);
    volume.extend(record(&[0], ROOT, SECTOR as u32, true));
    volume.resize(881, b' ');
    volume.push(1);
    put(16, &volume);
    if boot.is_some() {
        let mut descriptor = b"\0CD001\x01EL TORITO SPECIFICATION".to_vec();
        descriptor.resize(71, 0);
        descriptor.extend(CATALOGUE.to_le_bytes());
        put(17, &descriptor);
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
    if let Some(boot) = boot {
        let mut catalogue = vec![1, 0];
        catalogue.resize(28, 0);
        catalogue.extend([0xaa, 0x55, 0x55, 0xaa]);
        // Bootable, no emulation, four sectors of 512 bytes.
        catalogue.extend([0x88, 0, 0, 0, 0, 0, 4, 0]);
        catalogue.extend(BOOT.to_le_bytes());
        put(CATALOGUE, &catalogue);
        put(BOOT, boot);
    }
    put(FILE, content);
    image
}
