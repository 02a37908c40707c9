//! Whole sectors in mode 1 (ECMA-130): sync, header, user data, EDC and ECC.

use serde::{Deserialize, Serialize};

/// Bytes of a whole sector.
pub const SECTOR: usize = 2352;

const SYNC: [u8; 12] = [
    0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0,
];

/// Which parts of a sector are wanted: they lie one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fields {
    sync: bool,
    header: bool,
    user: bool,
    check: bool,
}

impl Fields {
    /// The selection of byte 9 of READ CD, for sectors in mode 1; `None` for one that leaves out
    /// what lies between two others, which no drive does (MMC-6, table 351). Sub-headers have no
    /// bytes in mode 1.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        let fields = Self {
            sync: byte & 0x80 != 0,
            header: byte & 0x20 != 0,
            user: byte & 0x10 != 0,
            check: byte & 0x08 != 0,
        };
        let before = fields.sync || fields.header;
        let gap = (fields.sync && !fields.header && (fields.user || fields.check))
            || (before && !fields.user && fields.check);
        (!gap).then_some(fields)
    }

    /// Bytes of each sector.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "a number of bytes, no collection"
    )]
    pub fn len(&self) -> usize {
        let part = |wanted: bool, len: usize| if wanted { len } else { 0 };
        part(self.sync, 12) + part(self.header, 4) + part(self.user, 2048) + part(self.check, 288)
    }

    /// Whether it is the user data alone.
    #[must_use]
    pub fn is_user_data(&self) -> bool {
        self.user && self.len() == 2048
    }

    /// The wanted part of a whole sector.
    #[must_use]
    pub fn of<'a>(&self, sector: &'a [u8; SECTOR]) -> &'a [u8] {
        let start = match (self.sync, self.header, self.user) {
            (true, _, _) => 0,
            (false, true, _) => 12,
            (false, false, true) => 16,
            (false, false, false) => 2064,
        };
        &sector[start..start + self.len()]
    }
}

/// The whole sector at an address, around its user data.
#[must_use]
pub fn assemble(lba: u32, user: &[u8; 2048]) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..12].copy_from_slice(&SYNC);
    let [_, minutes, seconds, frames] = minutes(lba);
    sector[12..16].copy_from_slice(&[bcd(minutes), bcd(seconds), bcd(frames), 1]);
    sector[16..2064].copy_from_slice(user);
    let edc = edc(&sector[..2064]);
    sector[2064..2068].copy_from_slice(&edc.to_le_bytes());
    // Eight zeroes, then parity P over what is before, then Q over that and P.
    let (data, parity) = sector.split_at_mut(2076);
    let (p, q) = parity.split_at_mut(172);
    ecc(&data[12..], 86, 24, 2, 86, p);
    let mut with_p = [0; 2236];
    with_p[..2064].copy_from_slice(&data[12..]);
    with_p[2064..].copy_from_slice(p);
    ecc(&with_p, 52, 43, 86, 88, q);
    sector
}

/// An address as minutes, seconds and frames; the first sector is at two seconds.
pub(super) fn minutes(lba: u32) -> [u8; 4] {
    let frames = lba.saturating_add(150);
    let minutes = (frames / 75 / 60).min(255) as u8;
    [0, minutes, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

fn bcd(value: u8) -> u8 {
    let value = value % 100;
    ((value / 10) << 4) | (value % 10)
}

/// The error detection code: a CRC of 32 bits.
fn edc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 != 0 {
                crc >> 1 ^ 0xd801_8001
            } else {
                crc >> 1
            }
        })
    })
}

/// Twice a value in the field of 256 elements over x^8 + x^4 + x^3 + x^2 + 1.
fn double(value: u8) -> u8 {
    value << 1 ^ if value & 0x80 != 0 { 0x1d } else { 0 }
}

/// The value whose sum with its double is this.
fn undo(value: u8) -> u8 {
    // x^255 is 1, and 3 = 1 + 2 generates the field: v / 3 by multiplying with 3^254.
    let triple = |v: u8| v ^ double(v);
    (0..254).fold(value, |v, _| triple(v))
}

/// Parities of a product code: `count` vectors of `len` bytes, `step` apart, wrapping around.
fn ecc(data: &[u8], count: usize, len: usize, stride: usize, step: usize, out: &mut [u8]) {
    let size = count * len;
    for at in 0..count {
        let mut index = at / 2 * stride + at % 2;
        let (mut weighted, mut sum) = (0, 0);
        for _ in 0..len {
            let byte = data[index];
            index = (index + step) % size;
            weighted = double(weighted ^ byte);
            sum ^= byte;
        }
        let first = undo(double(weighted) ^ sum);
        out[at] = first;
        out[at + count] = first ^ sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector is a code word: all syndromes are 0.
    fn syndromes(
        sector: &[u8; SECTOR],
        count: usize,
        len: usize,
        stride: usize,
        step: usize,
    ) -> u8 {
        let data = &sector[12..];
        let size = count * len;
        let mut bad = 0;
        for at in 0..count {
            let mut index = at / 2 * stride + at % 2;
            let (mut weighted, mut sum) = (0, 0);
            for _ in 0..len {
                weighted = double(weighted) ^ data[index];
                sum ^= data[index];
                index = (index + step) % size;
            }
            for parity in [data[size + at], data[size + count + at]] {
                weighted = double(weighted) ^ parity;
                sum ^= parity;
            }
            bad |= weighted | sum;
        }
        bad
    }

    #[test]
    fn parities_are_those_of_the_code() {
        let mut user = [0; 2048];
        for (at, byte) in user.iter_mut().enumerate() {
            *byte = (at * 7 % 255) as u8;
        }
        let mut sector = assemble(1234, &user);
        assert_eq!(sector[12..16], [0x00, 0x18, 0x34, 1], "00:18.34");
        assert_eq!(edc(&sector[..2068]), 0);
        assert_eq!(syndromes(&sector, 86, 24, 2, 86), 0);
        assert_eq!(syndromes(&sector, 52, 43, 86, 88), 0);
        sector[100] ^= 1;
        assert_ne!(syndromes(&sector, 86, 24, 2, 86), 0);
    }

    #[test]
    fn fields_without_gaps() {
        assert_eq!(Fields::from_byte(0x10).map(|f| f.len()), Some(2048));
        assert_eq!(Fields::from_byte(0xf8).map(|f| f.len()), Some(2352));
        assert_eq!(Fields::from_byte(0x00).map(|f| f.len()), Some(0));
        assert_eq!(Fields::from_byte(0x90), None);
        assert_eq!(Fields::from_byte(0x28), None);
    }
}
