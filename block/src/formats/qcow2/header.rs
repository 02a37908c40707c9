//! The qcow2 header: parsed with every field checked, written back byte for byte.
//!
//! A message about a field begins with the words QEMU uses and goes on with the field, its value
//! and what was expected in parentheses: ` (field l1_size: value 9, expected …)`. What speaks like
//! qemu-img cuts the message there.

use std::fmt::Display;

use crate::{Error, FileId, Result, io::Io};

mod area;
mod fields;
mod store;
mod write;

use area::{needed_bytes, padded, parse_extensions};
pub use fields::{
    Autoclear, BitmapsExtension, Compatible, CompressionType, CryptMethod, CryptoExtension,
    Extension, ExtensionType, FeatureName, Incompatible,
};
pub(crate) use fields::{be16, be32, be64};

/// The first four bytes of an image: `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Largest L1 table in bytes.
pub const MAX_L1_SIZE: u64 = 32 << 20;
/// Largest reference count table in bytes.
pub const MAX_REFCOUNT_TABLE_SIZE: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Largest snapshot table in bytes.
pub const MAX_SNAPSHOT_TABLE_SIZE: u64 = 64 << 20;
/// Longest backing file name in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Most persistent bitmaps.
pub const MAX_BITMAPS: u32 = 65_535;
/// Largest bitmap directory in bytes.
pub const MAX_BITMAP_DIRECTORY_SIZE: u64 = 64 << 20;

/// Length of a version 2 header.
pub const V2_HEADER_LENGTH: u32 = 72;
/// Shortest version 3 header.
pub const V3_MIN_HEADER_LENGTH: u32 = 104;
/// Length of the version 3 header written for new images.
pub const V3_HEADER_LENGTH: u32 = 112;
/// Offset of the three feature fields; they are 24 consecutive bytes.
pub const FEATURES_OFFSET: u64 = 72;

/// How much of an image is read to look at its header; more only if the header says so.
const FIRST_READ: usize = 64 << 10;

/// The header of an image, with its extensions and backing file name.
///
/// Public fields are those of the specification, with its names. Offsets are bytes into the image
/// file. Changing a field and writing [`to_bytes`](Self::to_bytes) leaves every other byte alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// The disk size in bytes.
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_table_offset: u64,
    /// Where the reference count table starts.
    pub refcount_table_offset: u64,
    /// Clusters of the reference count table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: u64,
    /// Features without which the image cannot be understood.
    pub incompatible_features: Incompatible,
    /// Features that may be ignored.
    pub compatible_features: Compatible,
    /// Features that a writer who does not know them must clear.
    pub autoclear_features: Autoclear,
    /// The width of a reference count is `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// Length of the header without extensions, in bytes.
    pub header_length: u32,
    /// The backing file name as the image has it, not null terminated.
    pub backing_file: Option<Vec<u8>>,
    /// The header extensions in their order, unknown ones included, without the end marker.
    pub extensions: Vec<Extension>,
    /// Bytes 104 up to `header_length`: the compression type, padding, unknown fields.
    additional: Vec<u8>,
    /// What was read, where the parts were in it, so that nothing moves that did not change.
    origin: Origin,
}

/// The header area as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Origin {
    /// The start of the first cluster, up to the last byte in use.
    bytes: Vec<u8>,
    backing_file_offset: u64,
    backing_file_size: u32,
    backing_file: Option<Vec<u8>>,
    extensions: Vec<Extension>,
    header_length: u32,
}

/// Who looks at the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Use,
    /// Checking and repairing: what a repair can rebuild may be missing or wrong.
    Check,
}

fn bad_field(text: &str, field: &str, value: impl Display, expected: impl Display) -> Error {
    Error::invalid_image(format!(
        "{text} (field {field}: value {value}, expected {expected})"
    ))
}

impl Header {
    /// Reads the header of an image.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), and the host's.
    pub async fn read(io: &Io, file: FileId) -> Result<Self> {
        Self::read_as(io, file, Purpose::Use).await
    }

    /// Reads the header of an image that is to be checked: a missing reference count table and a
    /// broken snapshot table are no error.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn read_for_check(io: &Io, file: FileId) -> Result<Self> {
        Self::read_as(io, file, Purpose::Check).await
    }

    async fn read_as(io: &Io, file: FileId, purpose: Purpose) -> Result<Self> {
        let with_path = |error: Error| error.path(&io.file_path(file));
        let mut bytes = io.read_padded(file, 0, FIRST_READ).await?;
        // A file that ends inside the fixed fields is not an image, whatever zeroes would mean.
        let len = io.file_len(file)?;
        if len < u64::from(V2_HEADER_LENGTH) {
            return Err(with_path(Error::invalid_image(format!(
                "Image is not in qcow2 format (file length {len}, expected at least \
                 {V2_HEADER_LENGTH})"
            ))));
        }
        let needed = needed_bytes(&bytes);
        if needed > bytes.len() {
            bytes = io.read_padded(file, 0, needed).await?;
        }
        Self::parse_as(&bytes, purpose).map_err(with_path)
    }

    /// Parses the start of an image: its first cluster, or at least the part in use; what `bytes`
    /// does not have counts as zeroes.
    ///
    /// # Errors
    /// [`InvalidImage`](crate::ErrorKind::InvalidImage) naming field, value and expectation;
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for an unknown incompatible feature, naming
    /// it from the image's own feature name table.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Self::parse_as(bytes, Purpose::Use)
    }

    /// [`parse`](Self::parse) for an image that is to be checked.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_for_check(bytes: &[u8]) -> Result<Self> {
        Self::parse_as(bytes, Purpose::Check)
    }

    fn parse_as(bytes: &[u8], purpose: Purpose) -> Result<Self> {
        if bytes.len() < V2_HEADER_LENGTH as usize || be32(bytes, 0) != MAGIC {
            return Err(Error::invalid_image("Image is not in qcow2 format"));
        }
        let version = be32(bytes, 4);
        if version != 2 && version != 3 {
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 version {version} (field version: value {version}, expected 2 \
                 or 3)"
            )));
        }
        let cluster_bits = be32(bytes, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(bad_field(
                &format!("Unsupported cluster size: 2^{cluster_bits}"),
                "cluster_bits",
                cluster_bits,
                "9 to 21",
            ));
        }
        let cluster_size = 1u32 << cluster_bits;
        let bytes = &bytes[..bytes.len().min(cluster_size as usize)];

        let mut header = Header {
            version,
            cluster_bits,
            size: be64(bytes, 24),
            crypt_method: CryptMethod::None,
            l1_size: be32(bytes, 36),
            l1_table_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            nb_snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible_features: Incompatible::default(),
            compatible_features: Compatible::default(),
            autoclear_features: Autoclear::default(),
            refcount_order: 4,
            header_length: V2_HEADER_LENGTH,
            backing_file: None,
            extensions: Vec::new(),
            additional: Vec::new(),
            origin: Origin::default(),
        };
        if version >= 3 {
            header.parse_v3(bytes)?;
        }
        let backing_file_offset = be64(bytes, 8);
        let backing_file_size = be32(bytes, 16);
        let extensions_end = header.check_backing_offset(backing_file_offset)?;
        let (extensions, extensions_stop) = parse_extensions(
            bytes,
            header.header_length as usize,
            extensions_end as usize,
        )?;
        header.extensions = extensions;
        header.check_compression_type()?;
        header.check_unknown_features()?;
        header.check_fields(be32(bytes, 32), purpose)?;
        header.check_extensions()?;

        let mut used = extensions_stop;
        if backing_file_offset != 0 {
            let limit =
                u64::from(MAX_BACKING_NAME).min(u64::from(cluster_size) - backing_file_offset);
            if u64::from(backing_file_size) > limit {
                return Err(bad_field(
                    "Backing file name too long",
                    "backing_file_size",
                    backing_file_size,
                    format_args!("at most {limit}"),
                ));
            }
            let start = backing_file_offset as usize;
            let end = start + backing_file_size as usize;
            used = used.max(end);
            // An empty name means no backing file.
            header.backing_file = Some(padded(bytes, start, end)).filter(|name| !name.is_empty());
        }
        let last = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |at| at + 1);
        used = used.max(last).max(header.header_length as usize);
        header.origin = Origin {
            bytes: padded(bytes, 0, used),
            backing_file_offset,
            backing_file_size,
            backing_file: header.backing_file.clone(),
            extensions: header.extensions.clone(),
            header_length: header.header_length,
        };
        Ok(header)
    }

    fn parse_v3(&mut self, bytes: &[u8]) -> Result<()> {
        self.incompatible_features = Incompatible(be64(bytes, 72));
        self.compatible_features = Compatible(be64(bytes, 80));
        self.autoclear_features = Autoclear(be64(bytes, 88));
        self.refcount_order = be32(bytes, 96);
        self.header_length = be32(bytes, 100);
        if self.header_length < V3_MIN_HEADER_LENGTH {
            return Err(bad_field(
                "qcow2 header too short",
                "header_length",
                self.header_length,
                format_args!("at least {V3_MIN_HEADER_LENGTH}"),
            ));
        }
        if u64::from(self.header_length) > self.cluster_size() {
            return Err(bad_field(
                "qcow2 header exceeds cluster size",
                "header_length",
                self.header_length,
                format_args!("at most {}", self.cluster_size()),
            ));
        }
        if !self.header_length.is_multiple_of(8) {
            return Err(bad_field(
                "qcow2 header length invalid",
                "header_length",
                self.header_length,
                "a multiple of 8",
            ));
        }
        self.additional = padded(bytes, 104, self.header_length as usize);
        Ok(())
    }

    /// The end of the header extension area.
    fn check_backing_offset(&self, offset: u64) -> Result<u64> {
        if offset == 0 {
            return Ok(self.cluster_size());
        }
        if offset > self.cluster_size() || offset < u64::from(self.header_length) {
            return Err(bad_field(
                "Invalid backing file offset",
                "backing_file_offset",
                offset,
                format_args!("0, or {} to {}", self.header_length, self.cluster_size()),
            ));
        }
        Ok(offset)
    }

    fn check_compression_type(&self) -> Result<()> {
        let kind = self.additional.first().copied().unwrap_or(0);
        let bit = self
            .incompatible_features
            .contains(Incompatible::COMPRESSION_TYPE);
        if CompressionType::from_byte(kind).is_none() {
            return Err(Error::unsupported(format!(
                "qcow2: unknown compression type: {kind} (field compression_type: value {kind}, \
                 expected 0 or 1)"
            )));
        }
        if bit == (kind != 0) {
            return Ok(());
        }
        let (text, expected) = if bit {
            (
                "must not be set",
                "above 0, as incompatible feature bit 3 is set",
            )
        } else {
            ("must be set", "0, as incompatible feature bit 3 is clear")
        };
        Err(bad_field(
            &format!("qcow2: Compression type incompatible feature bit {text}"),
            "compression_type",
            kind,
            expected,
        ))
    }

    fn check_unknown_features(&self) -> Result<()> {
        let mut unknown = self.incompatible_features.0 & !Incompatible::KNOWN.0;
        if unknown == 0 {
            return Ok(());
        }
        let mut names = Vec::new();
        for feature in self.feature_names() {
            if let Some(bit) = feature.incompatible_bit()
                && unknown & bit != 0
            {
                unknown &= !bit;
                names.push(feature.name);
            }
        }
        if unknown != 0 {
            names.push(format!("Unknown incompatible feature: {unknown:x}"));
        }
        Err(Error::unsupported(format!(
            "Unsupported qcow2 feature(s): {}",
            names.join(", ")
        )))
    }

    fn check_fields(&mut self, crypt_method: u32, purpose: Purpose) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(bad_field(
                "Reference count entry width too large; may not exceed 64 bits",
                "refcount_order",
                self.refcount_order,
                "at most 6",
            ));
        }
        if self
            .incompatible_features
            .contains(Incompatible::EXTENDED_L2)
            && self.cluster_bits < 14
        {
            return Err(bad_field(
                &format!("Unsupported subcluster size: {}", self.cluster_size() / 32),
                "cluster_bits",
                self.cluster_bits,
                "at least 14 with extended L2 entries",
            ));
        }
        self.crypt_method = CryptMethod::from_number(crypt_method).ok_or_else(|| {
            Error::unsupported(format!(
                "Unsupported encryption method {crypt_method} (field crypt_method: value \
                 {crypt_method}, expected 0, 1 or 2)"
            ))
        })?;
        if purpose == Purpose::Use && self.refcount_table_clusters == 0 {
            return Err(bad_field(
                "Image does not contain a reference count table",
                "refcount_table_clusters",
                0,
                "at least 1",
            ));
        }
        self.check_table(
            "Reference count table",
            ["refcount_table_clusters", "refcount_table_offset"],
            u64::from(self.refcount_table_clusters),
            self.cluster_size(),
            MAX_REFCOUNT_TABLE_SIZE,
            self.refcount_table_offset,
            purpose == Purpose::Check,
        )?;
        if purpose == Purpose::Use {
            self.check_table(
                "Snapshot table",
                ["nb_snapshots", "snapshots_offset"],
                u64::from(self.nb_snapshots),
                40,
                40 * u64::from(MAX_SNAPSHOTS),
                self.snapshots_offset,
                false,
            )?;
        }
        self.check_l1()?;
        if self.autoclear_features.contains(Autoclear::DATA_FILE_RAW)
            && !self.has(Incompatible::DATA_FILE)
        {
            return Err(bad_field(
                "data-file-raw requires a data file",
                "autoclear_features",
                format_args!("{:#x}", self.autoclear_features.0),
                "bit 1 only with incompatible feature bit 2",
            ));
        }
        Ok(())
    }

    /// Whether the L1 table is one for a disk of this size.
    pub(crate) fn check_l1(&self) -> Result<()> {
        self.check_table(
            "Active L1 table",
            ["l1_size", "l1_table_offset"],
            u64::from(self.l1_size),
            8,
            MAX_L1_SIZE,
            self.l1_table_offset,
            false,
        )?;
        let needed = self.l1_entries_for(self.size);
        if needed > i32::MAX as u64 {
            return Err(bad_field(
                "Image is too big",
                "size",
                self.size,
                "fewer clusters",
            ));
        }
        if u64::from(self.l1_size) < needed {
            return Err(bad_field(
                "L1 table is too small",
                "l1_size",
                self.l1_size,
                format_args!("at least {needed} for a disk of {} bytes", self.size),
            ));
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the columns of a small table")]
    fn check_table(
        &self,
        name: &str,
        fields: [&str; 2],
        entries: u64,
        entry_len: u64,
        max_len: u64,
        offset: u64,
        may_be_missing: bool,
    ) -> Result<()> {
        if entries > max_len / entry_len {
            return Err(bad_field(
                &format!("{name} too large"),
                fields[0],
                entries,
                format_args!("at most {}", max_len / entry_len),
            ));
        }
        // At most 64 MiB: no overflow.
        let len = entries * entry_len;
        let in_file = offset
            .checked_add(len)
            .is_some_and(|end| end <= i64::MAX as u64);
        let not_header = offset != 0 || entries == 0 || may_be_missing;
        if !in_file || !not_header || offset & (self.cluster_size() - 1) != 0 {
            return Err(bad_field(
                &format!("{name} offset invalid"),
                fields[1],
                format_args!("{offset:#x}"),
                format_args!(
                    "a multiple of {:#x}, not 0, below 2^63",
                    self.cluster_size()
                ),
            ));
        }
        Ok(())
    }

    fn check_extensions(&self) -> Result<()> {
        let luks = self.crypt_method == CryptMethod::Luks;
        match self.extension(ExtensionType::CRYPTO_HEADER) {
            Some(_) if !luks => {
                return Err(bad_field(
                    "CRYPTO header extension only expected with LUKS encryption method",
                    "crypt_method",
                    self.crypt_method as u32,
                    "2 with extension 0x0537be77",
                ));
            }
            Some(extension) => {
                CryptoExtension::parse(&extension.data, self.cluster_size())?;
            }
            None if luks => {
                return Err(bad_field(
                    "Missing CRYPTO header for crypt method 2",
                    "crypt_method",
                    2,
                    "extension 0x0537be77 to be present",
                ));
            }
            None => {}
        }
        if self.autoclear_features.contains(Autoclear::BITMAPS) {
            let Some(extension) = self.extension(ExtensionType::BITMAPS) else {
                return Err(bad_field(
                    "bitmaps_ext: bitmaps autoclear bit without bitmaps extension",
                    "autoclear_features",
                    format_args!("{:#x}", self.autoclear_features.0),
                    "bit 0 only with extension 0x23852875",
                ));
            };
            BitmapsExtension::parse(&extension.data, self.cluster_size())?;
        }
        Ok(())
    }
}
