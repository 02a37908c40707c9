//! What header fields and extensions may hold.

use super::{MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAPS, bad_field};
use crate::Result;

/// The big-endian 16-bit number at `at`, 0 where `bytes` ends before.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    be_bytes(bytes, at).map_or(0, u16::from_be_bytes)
}

/// The big-endian 32-bit number at `at`, 0 where `bytes` ends before.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    be_bytes(bytes, at).map_or(0, u32::from_be_bytes)
}

/// The big-endian 64-bit number at `at`, 0 where `bytes` ends before.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    be_bytes(bytes, at).map_or(0, u64::from_be_bytes)
}

fn be_bytes<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

macro_rules! feature_bits {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub u64);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self(1 << $number);)*
            /// Every bit that has a meaning here.
            pub const KNOWN: Self = Self(0 $(| Self::$bit.0)*);

            /// Whether all bits of `other` are set.
            #[must_use]
            pub fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Sets the bits of `other`.
            pub fn insert(&mut self, other: Self) {
                self.0 |= other.0;
            }

            /// Clears the bits of `other`.
            pub fn remove(&mut self, other: Self) {
                self.0 &= !other.0;
            }
        }
    };
}

feature_bits!(
    /// Incompatible features: who does not know a bit must not open the image.
    Incompatible {
        /// Reference counts may be wrong.
        DIRTY = 0,
        /// Any structure may be wrong; no writing.
        CORRUPT = 1,
        /// Guest data is in another file.
        DATA_FILE = 2,
        /// Compressed clusters are not deflate.
        COMPRESSION_TYPE = 3,
        /// L2 entries are 128 bits and describe subclusters.
        EXTENDED_L2 = 4,
    }
);

feature_bits!(
    /// Compatible features: may be ignored, and stay set.
    Compatible {
        /// Reference counts may be written late, under the dirty bit.
        LAZY_REFCOUNTS = 0,
    }
);

feature_bits!(
    /// Autoclear features: who writes without knowing a bit clears it first.
    Autoclear {
        /// The bitmaps extension is consistent.
        BITMAPS = 0,
        /// The external data file is a raw image by itself.
        DATA_FILE_RAW = 1,
    }
);

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, called zlib.
    #[default]
    Zlib = 0,
    /// Zstandard.
    Zstd = 1,
}

impl CompressionType {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Zlib),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The name QEMU uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not at all.
    #[default]
    None = 0,
    /// The old AES-CBC method.
    Aes = 1,
    /// LUKS, with its header in the image.
    Luks = 2,
}

impl CryptMethod {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Aes),
            2 => Some(Self::Luks),
            _ => None,
        }
    }
}

/// The type of a header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExtensionType(pub u32);

impl ExtensionType {
    /// The end of the extension area.
    pub const END: Self = Self(0);
    /// The backing file's format name.
    pub const BACKING_FORMAT: Self = Self(0xe279_2aca);
    /// Names of feature bits.
    pub const FEATURE_NAMES: Self = Self(0x6803_f857);
    /// Where the persistent bitmaps are.
    pub const BITMAPS: Self = Self(0x2385_2875);
    /// Where the encryption header is.
    pub const CRYPTO_HEADER: Self = Self(0x0537_be77);
    /// The external data file's name.
    pub const DATA_FILE: Self = Self(0x4441_5441);

    /// Written by Platter into a version 2 image, which has no dirty bit, while its snapshots are being
    /// changed: an image that has it is repaired when it is opened for writing.
    pub const UNFINISHED: Self = Self(0x506c_4472);

    /// Written by Platter while the header changes, in front of extensions that lie further behind for
    /// the moment. Its data is what they leave behind, and means nothing.
    pub const MOVED: Self = Self(0x506c_4473);

    /// Whether the type has a meaning here.
    #[must_use]
    pub fn is_known(self) -> bool {
        [
            Self::END,
            Self::BACKING_FORMAT,
            Self::FEATURE_NAMES,
            Self::BITMAPS,
            Self::CRYPTO_HEADER,
            Self::DATA_FILE,
            Self::UNFINISHED,
            Self::MOVED,
        ]
        .contains(&self)
    }
}

/// A header extension as it is in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub kind: ExtensionType,
    /// Its data.
    pub data: Vec<u8>,
    /// The bytes that round it up to a multiple of 8, usually zero.
    pub(super) padding: Vec<u8>,
}

impl Extension {
    /// Bytes of type and length.
    pub(super) const HEADER_LEN: usize = 8;

    /// An extension with zero padding.
    #[must_use]
    pub fn new(kind: ExtensionType, data: Vec<u8>) -> Self {
        let padding = vec![0; data.len().next_multiple_of(8) - data.len()];
        Self {
            kind,
            data,
            padding,
        }
    }
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0: incompatible, 1: compatible, 2: autoclear.
    pub kind: u8,
    /// The bit number, valid from 0 to 63.
    pub bit: u8,
    /// What the bit is called.
    pub name: String,
}

impl FeatureName {
    /// Bytes of an entry.
    pub(super) const LEN: usize = 48;

    /// The table QEMU writes.
    pub(super) const STANDARD: [(u8, u8, &'static str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];

    pub(super) fn parse(entry: &[u8; Self::LEN]) -> Self {
        let name = &entry[2..];
        let len = name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(name.len());
        Self {
            kind: entry[0],
            bit: entry[1],
            // The text goes into messages: no control characters from an image.
            name: String::from_utf8_lossy(&name[..len])
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect(),
        }
    }

    /// The incompatible feature bit it names, if it names one.
    pub(super) fn incompatible_bit(&self) -> Option<u64> {
        (self.kind == 0 && self.bit < 64 && !self.name.is_empty()).then(|| 1 << self.bit)
    }

    /// The extension with QEMU's names.
    #[must_use]
    pub fn standard_table() -> Extension {
        let mut data = vec![0; Self::STANDARD.len() * Self::LEN];
        for (entry, (kind, bit, name)) in data.chunks_exact_mut(Self::LEN).zip(Self::STANDARD) {
            entry[0] = kind;
            entry[1] = bit;
            entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        }
        Extension::new(ExtensionType::FEATURE_NAMES, data)
    }
}

/// Where the persistent bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub nb_bitmaps: u32,
    /// Bytes of the bitmap directory.
    pub bitmap_directory_size: u64,
    /// Where the directory starts.
    pub bitmap_directory_offset: u64,
}

impl BitmapsExtension {
    pub(super) fn parse(data: &[u8], cluster_size: u64) -> Result<Self> {
        if data.len() != 24 {
            return Err(bad_field(
                "bitmaps_ext: Invalid extension length",
                "bitmaps extension length",
                data.len(),
                24,
            ));
        }
        let parsed = Self {
            nb_bitmaps: be32(data, 0),
            bitmap_directory_size: be64(data, 8),
            bitmap_directory_offset: be64(data, 16),
        };
        if be32(data, 4) != 0 {
            return Err(bad_field(
                "bitmaps_ext: Reserved field is not zero",
                "reserved",
                be32(data, 4),
                0,
            ));
        }
        if parsed.nb_bitmaps > MAX_BITMAPS {
            return Err(bad_field(
                &format!(
                    "bitmaps_ext: Image has {} bitmaps, exceeding the QEMU supported maximum of \
                     {MAX_BITMAPS}",
                    parsed.nb_bitmaps
                ),
                "nb_bitmaps",
                parsed.nb_bitmaps,
                format_args!("at most {MAX_BITMAPS}"),
            ));
        }
        if parsed.nb_bitmaps == 0 {
            return Err(bad_field(
                "found bitmaps extension with zero bitmaps",
                "nb_bitmaps",
                0,
                "at least 1",
            ));
        }
        let offset = parsed.bitmap_directory_offset;
        if offset == 0 || offset & (cluster_size - 1) != 0 || offset > i64::MAX as u64 {
            return Err(bad_field(
                "bitmaps_ext: invalid bitmap directory offset",
                "bitmap_directory_offset",
                format_args!("{offset:#x}"),
                format_args!("a multiple of {cluster_size:#x}, not 0, below 2^63"),
            ));
        }
        if parsed.bitmap_directory_size > MAX_BITMAP_DIRECTORY_SIZE {
            return Err(bad_field(
                &format!(
                    "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size \
                     ({MAX_BITMAP_DIRECTORY_SIZE})",
                    parsed.bitmap_directory_size
                ),
                "bitmap_directory_size",
                parsed.bitmap_directory_size,
                format_args!("at most {MAX_BITMAP_DIRECTORY_SIZE}"),
            ));
        }
        Ok(parsed)
    }

    /// The extension's data.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.extend_from_slice(&self.nb_bitmaps.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.bitmap_directory_size.to_be_bytes());
        out.extend_from_slice(&self.bitmap_directory_offset.to_be_bytes());
        out
    }
}

/// Where the encryption header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoExtension {
    /// Where it starts.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl CryptoExtension {
    pub(super) fn parse(data: &[u8], cluster_size: u64) -> Result<Self> {
        if data.len() != 16 {
            return Err(bad_field(
                &format!(
                    "CRYPTO header extension size {}, but expected size 16",
                    data.len()
                ),
                "crypto header extension length",
                data.len(),
                16,
            ));
        }
        let parsed = Self {
            offset: be64(data, 0),
            length: be64(data, 8),
        };
        let end = parsed.offset.checked_add(parsed.length);
        if parsed.offset & (cluster_size - 1) != 0
            || parsed.offset == 0
            || end.is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(bad_field(
                &format!(
                    "Encryption header offset '{}' is not a multiple of cluster size \
                     '{cluster_size}'",
                    parsed.offset
                ),
                "crypto header offset",
                format_args!("{:#x}", parsed.offset),
                format_args!("a multiple of {cluster_size:#x}, not 0, below 2^63"),
            ));
        }
        Ok(parsed)
    }
}
