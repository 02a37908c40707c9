//! Ciphers, modes and IV generators, by the names that QEMU and LUKS give them.

use std::fmt;

use super::hash::HashAlgorithm;
use crate::{Error, Result};

/// A block cipher with its key size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CipherAlgorithm {
    /// AES, key of 128 bits.
    Aes128,
    /// AES, key of 192 bits.
    Aes192,
    /// AES, key of 256 bits.
    Aes256,
    /// CAST-128, key of 128 bits. Its blocks are too short for XTS.
    Cast5,
    /// Serpent, key of 128 bits.
    Serpent128,
    /// Serpent, key of 192 bits.
    Serpent192,
    /// Serpent, key of 256 bits.
    Serpent256,
    /// Twofish, key of 128 bits.
    Twofish128,
    /// Twofish, key of 192 bits.
    Twofish192,
    /// Twofish, key of 256 bits.
    Twofish256,
    /// SM4, key of 128 bits.
    Sm4,
}

impl CipherAlgorithm {
    /// Every cipher.
    pub const ALL: [Self; 11] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Cast5,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
        Self::Sm4,
    ];

    /// The name that QEMU's options use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Cast5 => "cast5-128",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
            Self::Sm4 => "sm4",
        }
    }

    /// The cipher that QEMU's options call so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.name() == name)
    }

    /// The `cipher-name` of a LUKS header, which leaves the key size out.
    #[must_use]
    pub fn luks_name(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "aes",
            Self::Cast5 => "cast5",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "twofish",
            Self::Sm4 => "sm4",
        }
    }

    /// The cipher of a `cipher-name` and a key of so many bytes.
    #[must_use]
    pub fn from_luks(name: &str, key_len: usize) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|cipher| cipher.luks_name() == name && cipher.key_len() == key_len)
    }

    /// Bytes of a key.
    #[must_use]
    pub fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Cast5 | Self::Serpent128 | Self::Twofish128 | Self::Sm4 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_len(self) -> usize {
        if self == Self::Cast5 { 8 } else { 16 }
    }
}

impl fmt::Display for CipherAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a cipher goes over the blocks of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CipherMode {
    /// Each block alone; no IV.
    Ecb,
    /// Cipher block chaining.
    Cbc,
    /// XTS, with two keys: the key is twice as long.
    Xts,
}

impl CipherMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Ecb, Self::Cbc, Self::Xts];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
        }
    }

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

impl fmt::Display for CipherMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the IV of a sector comes from its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IvGenerator {
    /// The number, 32 bits, little-endian.
    Plain,
    /// The number, 64 bits, little-endian.
    Plain64,
    /// The number encrypted with the hash of the key.
    Essiv,
}

impl IvGenerator {
    /// Every generator.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv => "essiv",
        }
    }

    /// The generator of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|iv| iv.name() == name)
    }
}

impl fmt::Display for IvGenerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Everything about how sectors are encrypted but the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// The cipher.
    pub algorithm: CipherAlgorithm,
    /// Its mode.
    pub mode: CipherMode,
    /// Where IVs come from.
    pub iv: IvGenerator,
    /// The hash of the IV generator; `essiv` needs it, others ignore it.
    pub iv_hash: Option<HashAlgorithm>,
}

impl Default for CipherSpec {
    /// `aes-xts-plain64` with two keys of 256 bits.
    fn default() -> Self {
        Self {
            algorithm: CipherAlgorithm::Aes256,
            mode: CipherMode::Xts,
            iv: IvGenerator::Plain64,
            iv_hash: None,
        }
    }
}

impl CipherSpec {
    /// AES-128 in CBC mode with plain64 IVs, the method of old qcow and qcow2 images.
    #[must_use]
    pub fn qcow_aes() -> Self {
        Self {
            algorithm: CipherAlgorithm::Aes128,
            mode: CipherMode::Cbc,
            iv: IvGenerator::Plain64,
            iv_hash: None,
        }
    }

    /// Bytes of the key.
    #[must_use]
    pub fn key_len(&self) -> usize {
        match self.mode {
            CipherMode::Xts => 2 * self.algorithm.key_len(),
            CipherMode::Ecb | CipherMode::Cbc => self.algorithm.key_len(),
        }
    }

    /// The `cipher-mode` of a LUKS header: `xts-plain64`, `cbc-essiv:sha256`.
    #[must_use]
    pub fn mode_string(&self) -> String {
        match self.iv_hash {
            Some(hash) => format!("{}-{}:{hash}", self.mode, self.iv),
            None => format!("{}-{}", self.mode, self.iv),
        }
    }

    /// The cipher that ESSIV encrypts sector numbers with: that of the same family whose key is as
    /// long as a digest, as dm-crypt does it.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) when there is none.
    pub(super) fn essiv_cipher(&self, hash: HashAlgorithm) -> Result<CipherAlgorithm> {
        let (family, len) = (self.algorithm.luks_name(), hash.digest_len());
        CipherAlgorithm::from_luks(family, len).ok_or_else(|| {
            Error::unsupported(format!("No {family} cipher with key size {len} available"))
        })
    }

    /// Checks that the parts go together.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) naming what does not.
    pub fn check(&self) -> Result<()> {
        if self.mode == CipherMode::Xts && self.algorithm.block_len() != 16 {
            return Err(Error::unsupported(format!(
                "Cipher {} has blocks of {} bytes, expected 16 in mode xts",
                self.algorithm,
                self.algorithm.block_len()
            )));
        }
        if self.iv == IvGenerator::Essiv {
            let hash = self
                .iv_hash
                .ok_or_else(|| Error::invalid_image("Missing IV generator hash specification"))?;
            self.essiv_cipher(hash)?;
        }
        Ok(())
    }
}
