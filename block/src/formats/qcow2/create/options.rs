//! What a new image should be.

use crate::{
    Error, Result,
    crypto::{Secret, luks::LuksOptions},
    formats::qcow2::header::CompressionType,
};

/// What space a new image takes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing but the header and the top-level tables.
    #[default]
    Off,
    /// All tables; the data clusters are holes of the file.
    Metadata,
    /// All tables, and host space for the data clusters.
    Falloc,
    /// All tables, and zeroes written to the data clusters.
    Full,
}

impl Preallocation {
    /// The preallocation of that name, as QEMU calls it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

/// How a new image is encrypted.
#[derive(Clone, Debug)]
pub enum Encrypt {
    /// The legacy method, AES-128-CBC. Its key is the password, of which a new image knows nothing.
    Aes,
    /// LUKS.
    Luks {
        /// How.
        options: LuksOptions,
        /// The password of the first key slot.
        secret: Secret,
    },
}

/// What a new image should be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The disk size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a reference count: a power of two up to 64.
    pub refcount_bits: u32,
    /// Allow reference counts to be written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// What space to take at once.
    pub preallocation: Preallocation,
    /// The backing file name to record.
    pub backing_file: Option<Vec<u8>>,
    /// The backing file's format name to record.
    pub backing_format: Option<String>,
    /// L2 entries of 128 bits, which divide a cluster into 32 subclusters.
    pub extended_l2: bool,
    /// The name to record of the file that guest data goes to.
    pub data_file: Option<String>,
    /// That file is a raw disk by itself. Takes at least the preallocation of metadata.
    pub data_file_raw: bool,
    /// How guest data is encrypted.
    pub encrypt: Option<Encrypt>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression_type: CompressionType::Zlib,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            encrypt: None,
        }
    }
}

/// The smallest cluster that has room for 32 subclusters of 512 bytes.
const MIN_EXTENDED_CLUSTER: u64 = 16 << 10;

/// The longest name of a data file: that of a path.
const MAX_DATA_FILE_NAME: usize = 4095;

impl CreateOptions {
    /// What is preallocated: a raw data file needs all of its mapping.
    pub(super) fn takes(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            taken => taken,
        }
    }

    /// Checks the options against each other. The messages are QEMU's.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument),
    /// [`Unsupported`](crate::ErrorKind::Unsupported) naming the feature.
    pub fn check(&self) -> Result<()> {
        let invalid = |message: &str| Err(Error::invalid_argument(message));
        if let Some(Encrypt::Luks { options, .. }) = &self.encrypt {
            options.check()?;
        }
        if !(2..=3).contains(&self.version) {
            return invalid(
                "Invalid compatibility level: expected 0.10 (version 2) or 1.1 (version 3)",
            );
        }
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.extended_l2 && self.cluster_size < MIN_EXTENDED_CLUSTER {
            return Err(Error::invalid_argument(format!(
                "Extended L2 entries are only supported with cluster sizes of at least \
                 {MIN_EXTENDED_CLUSTER} bytes"
            ))
            .field(
                "cluster_size",
                self.cluster_size,
                "at least 16384 with extended_l2",
            ));
        }
        self.check_data_file()?;
        self.check_version()?;
        if self.preallocation != Preallocation::Off
            && self.backing_file.is_some()
            && !self.extended_l2
        {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return invalid("Backing format cannot be used without backing file");
        }
        Ok(())
    }

    fn check_data_file(&self) -> Result<()> {
        if self.data_file_raw && self.data_file.is_none() {
            return Err(
                Error::invalid_argument("data-file-raw requires data-file").field(
                    "data_file_raw",
                    "on",
                    "off without data_file",
                ),
            );
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(Error::invalid_argument(
                "Backing file and data-file-raw cannot be used at the same time",
            )
            .field("data_file_raw", "on", "off with a backing file"));
        }
        if let Some(name) = &self.data_file
            && (name.is_empty() || name.len() > MAX_DATA_FILE_NAME)
        {
            return Err(Error::invalid_argument(format!(
                "data file name of {} bytes, expected 1 to {MAX_DATA_FILE_NAME}",
                name.len()
            )));
        }
        Ok(())
    }

    /// Refuses what version 2 has no place for.
    fn check_version(&self) -> Result<()> {
        if self.version >= 3 {
            return Ok(());
        }
        let (what, or, field, value, expected) = if self.extended_l2 {
            let what = "Extended L2 entries are only supported with";
            (what, "and", "extended_l2", "on".into(), "off")
        } else if let Some(name) = &self.data_file {
            let what = "External data files are only supported with";
            (what, "and", "data_file", name.clone(), "none")
        } else if self.refcount_bits != 16 {
            let what = "Different refcount widths than 16 bits require";
            let bits = self.refcount_bits.to_string();
            (what, "or", "refcount_bits", bits, "16")
        } else if self.lazy_refcounts {
            let what = "Lazy refcounts only supported with";
            (what, "and", "lazy_refcounts", "on".into(), "off")
        } else if self.compression_type != CompressionType::Zlib {
            let what = "Non-zlib compression type is only supported with";
            let kind = "zstd".into();
            (what, "and", "compression_type", kind, "zlib")
        } else {
            return Ok(());
        };
        let message =
            format!("{what} compatibility level 1.1 {or} above (use version=v3 or greater)");
        Err(Error::invalid_argument(message).field(
            field,
            value,
            &format!("{expected} with version 2"),
        ))
    }
}
