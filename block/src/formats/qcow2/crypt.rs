//! Encryption: LUKS, whose header lies in clusters of the image, and the legacy AES method.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use zeroize::Zeroizing;

use super::header::{CryptMethod, Header};
use crate::{
    Error, FileId, Result,
    crypto::{KeyChange, Secret, SectorCipher, Unlock, cipher::CipherSpec},
    encryption::{CountedFrom, Encryption},
    formats::luks::volume::{OpenVolume, Volume, change_in, missing_key},
    image::ImageInfo,
    io::Io,
    sync::lock,
};

/// What opens an encrypted image, as QEMU's options call it.
const KEY_OPTION: &str = "encrypt.key-secret";

/// How an image is encrypted.
#[derive(Debug, Default)]
pub(super) struct Crypt {
    /// None for an image that is not.
    pub(super) encryption: Option<Arc<Encryption>>,
    /// The LUKS header.
    volume: Option<Mutex<OpenVolume>>,
}

impl Crypt {
    /// Unlocks the image.
    pub(super) async fn open(
        io: &Io,
        file: FileId,
        header: &Header,
        unlock: &Unlock,
    ) -> Result<Self> {
        match header.crypt_method {
            CryptMethod::None => Ok(Self::default()),
            CryptMethod::Aes => {
                let cipher = match unlock {
                    Unlock::Nothing => return Err(missing_key(KEY_OPTION)),
                    Unlock::Locked => None,
                    Unlock::With(secret) => Some(legacy_cipher(secret)?),
                };
                Ok(Self {
                    encryption: Some(Encryption::new(cipher, CountedFrom::GuestOffset)),
                    volume: None,
                })
            }
            CryptMethod::Luks => {
                let place = header.crypto_header().ok_or_else(|| {
                    Error::invalid_image("Missing CRYPTO header for crypt method 2")
                })?;
                let volume = Volume::read(io, file, place.offset, place.length).await?;
                let (volume, cipher) = OpenVolume::new(io, volume, unlock, KEY_OPTION).await?;
                Ok(Self {
                    encryption: Some(Encryption::new(cipher, CountedFrom::HostOffset)),
                    volume: Some(Mutex::new(volume)),
                })
            }
        }
    }

    /// Adds what `info` shows of the LUKS header.
    pub(super) fn describe(&self, info: &mut ImageInfo) {
        if let Some(volume) = &self.volume {
            let mut map = lock(volume).volume.info();
            map.insert("format".into(), "luks".into());
            info.format_specific
                .insert("encrypt".into(), Value::Object(map));
        }
    }

    /// Changes the passwords.
    pub(super) async fn change_keys(&self, io: &Io, change: &KeyChange) -> Result<()> {
        match &self.volume {
            Some(volume) => change_in(volume, io, change).await,
            None => Err(Error::unsupported(
                "only LUKS encryption has key slots: this image is not encrypted with it",
            )),
        }
    }
}

/// The password itself is the key: its first 16 bytes, filled up with zeroes.
fn legacy_cipher(secret: &Secret) -> Result<SectorCipher> {
    let mut key = Zeroizing::new([0; 16]);
    let len = secret.as_bytes().len().min(key.len());
    key[..len].copy_from_slice(&secret.as_bytes()[..len]);
    SectorCipher::new(CipherSpec::qcow_aes(), &*key)
}
