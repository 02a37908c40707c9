//! Reading the header's parts, changing them and writing the header back.

use super::{
    Autoclear, BitmapsExtension, CompressionType, CryptMethod, CryptoExtension, Extension,
    ExtensionType, FEATURES_OFFSET, FeatureName, Header, Incompatible, MAGIC, MAX_BACKING_NAME,
    Origin, V2_HEADER_LENGTH, V3_HEADER_LENGTH, bad_field,
};
use crate::{
    Error, FileId, Result,
    io::{AlignedBuf, Io},
};

/// Autoclear bits whose data this version keeps correct while it writes.
const MAINTAINED_AUTOCLEAR: Autoclear =
    Autoclear(Autoclear::BITMAPS.0 | Autoclear::DATA_FILE_RAW.0);

impl Header {
    /// The header of a new image: version 2 or 3, nothing allocated, QEMU's feature name table.
    ///
    /// # Errors
    /// When version or cluster size are out of range.
    pub fn new(version: u32, cluster_bits: u32, refcount_order: u32, size: u64) -> Result<Self> {
        if !(2..=3).contains(&version)
            || !(super::MIN_CLUSTER_BITS..=super::MAX_CLUSTER_BITS).contains(&cluster_bits)
            || refcount_order > 6
            || (version == 2 && refcount_order != 4)
        {
            return Err(Error::invalid_argument(format!(
                "no header with version {version}, cluster_bits {cluster_bits}, refcount_order \
                 {refcount_order}"
            )));
        }
        let header_length = if version == 2 {
            V2_HEADER_LENGTH
        } else {
            V3_HEADER_LENGTH
        };
        let mut header = Self {
            version,
            cluster_bits,
            size,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: Incompatible::default(),
            compatible_features: super::Compatible::default(),
            autoclear_features: Autoclear::default(),
            refcount_order,
            header_length,
            backing_file: None,
            extensions: Vec::new(),
            additional: Vec::new(),
            origin: Origin::default(),
        };
        if version == 3 {
            header.additional = vec![0; (V3_HEADER_LENGTH - 104) as usize];
            header.extensions.push(FeatureName::standard_table());
        }
        Ok(header)
    }

    /// Makes a version 2 header a version 3 one.
    pub fn upgrade(&mut self) {
        self.version = 3;
        self.header_length = V3_HEADER_LENGTH;
        self.additional = vec![0; (V3_HEADER_LENGTH - 104) as usize];
        self.refcount_order = 4;
        if self.extension(ExtensionType::FEATURE_NAMES).is_none() {
            let mut named = self.clone();
            named.extensions.push(FeatureName::standard_table());
            // Where there is room: the names are for other programs.
            if named.to_bytes().is_ok() {
                *self = named;
            }
        }
    }

    /// Makes a version 3 header a version 2 one; what only version 3 can express is lost.
    pub fn downgrade(&mut self) {
        self.version = 2;
        self.header_length = V2_HEADER_LENGTH;
        self.additional.clear();
        self.incompatible_features = Incompatible::default();
        self.compatible_features = super::Compatible::default();
        self.autoclear_features = Autoclear::default();
        self.set_extension(ExtensionType::FEATURE_NAMES, None);
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bits of a reference count.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Reference counts in one block, as a power of two.
    #[must_use]
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The highest reference count that fits.
    #[must_use]
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Bytes of an L2 entry.
    #[must_use]
    pub fn l2_entry_size(&self) -> u64 {
        if self.has(Incompatible::EXTENDED_L2) {
            16
        } else {
            8
        }
    }

    /// Entries of an L2 table, as a power of two.
    #[must_use]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_size().trailing_zeros()
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[must_use]
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << (self.cluster_bits + self.l2_bits()))
    }

    /// Whether an incompatible feature is set.
    #[must_use]
    pub fn has(&self, feature: Incompatible) -> bool {
        self.incompatible_features.contains(feature)
    }

    /// How compressed clusters are compressed.
    #[must_use]
    pub fn compression_type(&self) -> CompressionType {
        let byte = self.additional.first().copied().unwrap_or(0);
        CompressionType::from_byte(byte).unwrap_or_default()
    }

    /// Sets how compressed clusters are compressed, with its feature bit. A version 2 header or one
    /// of 104 bytes has no room for anything but zlib.
    ///
    /// # Errors
    /// When the header has no room.
    pub fn set_compression_type(&mut self, kind: CompressionType) -> Result<()> {
        match (self.additional.first_mut(), kind) {
            (Some(byte), _) => *byte = kind as u8,
            (None, CompressionType::Zlib) => {}
            (None, CompressionType::Zstd) => {
                return Err(Error::invalid_argument(
                    "compression type zstd needs a version 3 header with a compression_type field",
                ));
            }
        }
        if kind == CompressionType::Zlib {
            self.incompatible_features
                .remove(Incompatible::COMPRESSION_TYPE);
        } else {
            self.incompatible_features
                .insert(Incompatible::COMPRESSION_TYPE);
        }
        Ok(())
    }

    /// The extension of that type.
    #[must_use]
    pub fn extension(&self, kind: ExtensionType) -> Option<&Extension> {
        self.extensions
            .iter()
            .find(|extension| extension.kind == kind)
    }

    /// Adds an extension before the names of the features, which are the last that QEMU writes of those that
    /// a new image has.
    pub(in crate::formats::qcow2) fn add_before_names(
        &mut self,
        kind: ExtensionType,
        data: Vec<u8>,
    ) {
        let names = self
            .extensions
            .iter()
            .position(|extension| extension.kind == ExtensionType::FEATURE_NAMES);
        let at = names.unwrap_or(self.extensions.len());
        self.extensions.insert(at, Extension::new(kind, data));
    }

    /// Sets, replaces or removes the extension of that type; the others stay where they are.
    pub fn set_extension(&mut self, kind: ExtensionType, data: Option<Vec<u8>>) {
        let is_it = |extension: &Extension| extension.kind == kind;
        let at = self.extensions.iter().position(is_it);
        // One of them is left where there were several.
        let mut index = 0;
        self.extensions.retain(|extension| {
            index += 1;
            !is_it(extension) || at == Some(index - 1)
        });
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at] = Extension::new(kind, data),
            (Some(at), None) => {
                self.extensions.remove(at);
            }
            (None, Some(data)) => self.extensions.push(Extension::new(kind, data)),
            (None, None) => {}
        }
    }

    /// The backing file's name as text, up to a null byte as QEMU reads it.
    #[must_use]
    pub fn backing_file_name(&self) -> Option<String> {
        self.backing_file
            .as_deref()
            .map(text)
            .filter(|name| !name.is_empty())
    }

    /// The backing file's format name.
    #[must_use]
    pub fn backing_format(&self) -> Option<String> {
        self.extensions
            .iter()
            .rfind(|extension| extension.kind == ExtensionType::BACKING_FORMAT)
            .map(|extension| text(&extension.data))
    }

    /// The external data file's name.
    #[must_use]
    pub fn data_file_name(&self) -> Option<String> {
        self.extension(ExtensionType::DATA_FILE)
            .map(|extension| text(&extension.data))
    }

    /// Names a backing file and its format, or neither.
    ///
    /// # Errors
    /// When the name is too long.
    pub fn set_backing(&mut self, name: Option<&[u8]>, format: Option<&str>) -> Result<()> {
        if let Some(name) = name
            && name.len() > MAX_BACKING_NAME as usize
        {
            return Err(Error::invalid_argument(format!(
                "Backing file name too long (length {}, expected at most {MAX_BACKING_NAME})",
                name.len()
            )));
        }
        self.backing_file = name.filter(|name| !name.is_empty()).map(<[u8]>::to_vec);
        let format = format.filter(|_| self.backing_file.is_some());
        let before = self.backing_format();
        self.set_extension(
            ExtensionType::BACKING_FORMAT,
            format.map(|format| format.as_bytes().to_vec()),
        );
        // QEMU writes the format before everything else.
        if let Some(at) = self
            .extensions
            .iter()
            .position(|extension| extension.kind == ExtensionType::BACKING_FORMAT)
            && before.is_none()
        {
            let extension = self.extensions.remove(at);
            self.extensions.insert(0, extension);
        }
        Ok(())
    }

    /// The names the image gives to feature bits.
    pub fn feature_names(&self) -> impl Iterator<Item = FeatureName> {
        self.extension(ExtensionType::FEATURE_NAMES)
            .into_iter()
            .flat_map(|extension| extension.data.chunks(FeatureName::LEN))
            .map(|entry| {
                // The last entry may end early: what is missing is zero, as QEMU reads it.
                let mut whole = [0; FeatureName::LEN];
                whole[..entry.len()].copy_from_slice(entry);
                FeatureName::parse(&whole)
            })
    }

    /// Where the persistent bitmaps are, whether or not they are consistent. `None` without
    /// bitmaps, or when the extension is damaged.
    #[must_use]
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        let extension = self.extension(ExtensionType::BITMAPS)?;
        BitmapsExtension::parse(&extension.data, self.cluster_size()).ok()
    }

    /// Where the encryption header is.
    #[must_use]
    pub fn crypto_header(&self) -> Option<CryptoExtension> {
        let extension = self.extension(ExtensionType::CRYPTO_HEADER)?;
        CryptoExtension::parse(&extension.data, self.cluster_size()).ok()
    }

    /// Whether this version can use the image, for reading or for writing too. A dirty image is
    /// accepted: whoever opens it for writing repairs it first.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) naming the feature,
    /// [`Corrupt`](crate::ErrorKind::Corrupt) for a corrupt image opened for writing.
    pub fn check_supported(&self, writable: bool) -> Result<()> {
        if self.has(Incompatible::DATA_FILE) {
            self.check_data_file(writable)?;
        }
        if writable && self.has(Incompatible::CORRUPT) {
            return Err(Error::corrupt(
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        Ok(())
    }

    /// What cannot be together with a data file.
    fn check_data_file(&self, writable: bool) -> Result<()> {
        let raw = self.autoclear_features.contains(Autoclear::DATA_FILE_RAW);
        if raw && self.backing_file.is_some() {
            return Err(Error::unsupported(
                "a backing file together with data-file-raw: the data file would not be the disk",
            )
            .field(
                "autoclear_features",
                format_args!("{:#x}", self.autoclear_features.0),
                "bit 1 to be clear with a backing file",
            ));
        }
        if writable && self.nb_snapshots > 0 {
            return Err(Error::unsupported(format!(
                "{} snapshots together with an external data file: writing would change them",
                self.nb_snapshots
            ))
            .field("nb_snapshots", self.nb_snapshots, "0 with a data file"));
        }
        Ok(())
    }

    /// Clears the autoclear bits that do not survive writing. Returns whether there were any: then
    /// the header is written before anything else is.
    pub fn clear_for_writing(&mut self) -> bool {
        let kept = Autoclear(self.autoclear_features.0 & MAINTAINED_AUTOCLEAR.0);
        let cleared = kept != self.autoclear_features;
        self.autoclear_features = kept;
        cleared
    }

    /// The three feature fields as they go to [`FEATURES_OFFSET`]; version 3 only.
    #[must_use]
    pub fn feature_bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.incompatible_features.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.compatible_features.0.to_be_bytes());
        bytes[16..].copy_from_slice(&self.autoclear_features.0.to_be_bytes());
        bytes
    }

    /// Writes the three feature fields alone and makes them durable; nothing for version 2.
    ///
    /// # Errors
    /// The host's.
    pub async fn write_features(&self, io: &Io, file: FileId) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        io.write(
            file,
            FEATURES_OFFSET,
            AlignedBuf::from_slice(&self.feature_bytes()),
        )
        .await?;
        io.sync(file).await
    }

    /// The bytes from the start of the image that hold the header, its extensions and the backing
    /// file name. Where neither extensions nor the name changed, every byte that no changed field
    /// covers is the one that was read; otherwise the name moves behind the last extension.
    ///
    /// # Errors
    /// When all that does not fit into the first cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let origin = &self.origin;
        let keeps_layout = !origin.bytes.is_empty()
            && self.header_length == origin.header_length
            && self.extensions == origin.extensions
            && self.backing_file == origin.backing_file;
        let (mut out, name_at, name_len) = if keeps_layout {
            (
                origin.bytes.clone(),
                origin.backing_file_offset,
                origin.backing_file_size,
            )
        } else {
            self.new_layout()?
        };
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &self.version.to_be_bytes());
        put(8, &name_at.to_be_bytes());
        put(16, &name_len.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(32, &(self.crypt_method as u32).to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_table_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.nb_snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.feature_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.header_length.to_be_bytes());
            put(104, &self.additional);
        }
        Ok(out)
    }

    /// Header area with extensions and name placed anew, fixed fields still zero; where the name
    /// is and its length.
    fn new_layout(&self) -> Result<(Vec<u8>, u64, u32)> {
        let mut out = vec![0; self.header_length as usize];
        // What a change that was cut off left is not taken along.
        let kept = |extension: &&Extension| extension.kind != ExtensionType::MOVED;
        for extension in self.extensions.iter().filter(kept) {
            // At most a cluster each.
            out.extend_from_slice(&extension.kind.0.to_be_bytes());
            out.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
            out.extend_from_slice(&extension.data);
            out.extend_from_slice(&extension.padding);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.resize(out.len() + 8, 0);
        let mut name_at = 0;
        let mut name_len = 0;
        if let Some(name) = &self.backing_file {
            name_at = out.len() as u64;
            name_len = name.len() as u32;
            out.extend_from_slice(name);
        }
        if out.len() as u64 > self.cluster_size() {
            return Err(bad_field(
                "Header, extensions and backing file name do not fit into the first cluster",
                "header area",
                out.len(),
                format_args!("at most {}", self.cluster_size()),
            ));
        }
        // What was there before and is not any more becomes zero.
        out.resize(out.len().max(self.origin.bytes.len()), 0);
        Ok((out, name_at, name_len))
    }
}

/// Bytes of an image as text, up to a null byte.
fn text(bytes: &[u8]) -> String {
    let len = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}
