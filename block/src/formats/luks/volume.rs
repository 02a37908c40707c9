//! The header of a LUKS volume in a file: a whole image, or some clusters of a qcow2 image.

use std::{fmt, sync::Mutex, time::Duration};

use serde_json::{Map, Value, json};

use crate::{
    Error, ErrorKind, FileId, Result,
    crypto::{
        KeyChange, Secret, SectorCipher, Unlock,
        cipher::IvGenerator,
        fill_random,
        luks::{HEADER_LEN, KEY_SLOTS, LuksHeader, LuksOptions, MasterKey},
    },
    io::{AlignedBuf, Io, thread_time},
    sync::lock,
};

/// The header of a volume, and where it is.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    pub(crate) file: FileId,
    /// Where the header starts.
    pub(crate) base: u64,
    pub(crate) header: LuksHeader,
}

impl Volume {
    /// Reads the header at `base`; header and key material end before `len` bytes.
    pub(crate) async fn read(io: &Io, file: FileId, base: u64, len: u64) -> Result<Self> {
        let bytes = io.read_padded(file, base, HEADER_LEN).await?;
        let header = LuksHeader::parse(&bytes)?;
        if header.payload_offset > len {
            return Err(Error::invalid_image(format!(
                "LUKS header is cut off (field payload-offset: value {}, expected at most {})",
                header.payload_offset / 512,
                len / 512
            )));
        }
        Ok(Self { file, base, header })
    }

    /// Writes the header and first key material of a new volume at `base`, where there are zeroes.
    pub(crate) async fn create(
        io: &Io,
        file: FileId,
        base: u64,
        options: LuksOptions,
        secret: &Secret,
    ) -> Result<Self> {
        let password = secret.clone();
        let made = io
            .run(move || LuksHeader::create(&options, password.as_bytes(), thread_time))
            .await??;
        let (header, _key, material) = made;
        let volume = Self { file, base, header };
        volume.write_material(io, 0, &material).await?;
        volume.write_header(io).await?;
        Ok(volume)
    }

    /// Finds the slot that has the password, and the key in it.
    pub(crate) async fn unlock(&self, io: &Io, secret: &Secret) -> Result<MasterKey> {
        for slot in 0..KEY_SLOTS {
            if let Some(key) = self.try_slot(io, slot, secret).await? {
                return Ok(key);
            }
        }
        Err(Error::with_message(
            ErrorKind::Denied,
            "Invalid password, cannot unlock any keyslot",
        ))
    }

    /// The cipher of the payload.
    pub(crate) fn cipher(&self, key: &MasterKey) -> Result<SectorCipher> {
        SectorCipher::new(self.header.spec, key)
    }

    async fn try_slot(&self, io: &Io, slot: usize, secret: &Secret) -> Result<Option<MasterKey>> {
        let Some(place) = self.header.slots.get(slot).filter(|slot| slot.active) else {
            return Ok(None);
        };
        // The parser bounded it: at most 64 bytes for each of 4000 stripes.
        let len = self.header.material_len() as usize;
        let at = self.base + place.key_offset;
        let mut material = io.read_padded(self.file, at, len).await?;
        let (header, secret) = (self.header.clone(), secret.clone());
        io.run(move || header.unlock(slot, secret.as_bytes(), &mut material))
            .await?
    }

    async fn write_header(&self, io: &Io) -> Result<()> {
        let bytes = AlignedBuf::from_slice(&self.header.to_bytes());
        io.write(self.file, self.base, bytes).await?;
        io.sync(self.file).await
    }

    async fn write_material(&self, io: &Io, slot: usize, material: &[u8]) -> Result<()> {
        let at = self.base + self.header.slots[slot].key_offset;
        io.write(self.file, at, AlignedBuf::from_slice(material))
            .await?;
        io.sync(self.file).await
    }

    /// Changes the passwords. `key` is the volume's own, where it was unlocked. The messages are
    /// QEMU's.
    pub(crate) async fn change_keys(
        &mut self,
        io: &Io,
        key: Option<&MasterKey>,
        change: &KeyChange,
    ) -> Result<()> {
        match change {
            KeyChange::Add {
                new,
                slot,
                iter_time,
                force,
            } => {
                let key = key.ok_or_else(|| {
                    Error::with_message(
                        ErrorKind::Denied,
                        "a password can be added only with another one: the image was opened \
                         without its key",
                    )
                })?;
                let slot = self.slot_to_fill(*slot, *force)?;
                self.add(io, slot, key, new, *iter_time).await
            }
            KeyChange::Erase { old, slot, force } => {
                let slots = self.slots_to_erase(io, old.as_ref(), *slot, *force).await?;
                self.erase(io, &slots).await
            }
        }
    }

    fn slot_to_fill(&self, slot: Option<usize>, force: bool) -> Result<usize> {
        match slot {
            Some(slot) => {
                if self.is_active(slot)? && !force {
                    return Err(Error::invalid_argument(format!(
                        "Refusing to overwrite active keyslot {slot} - please erase it first"
                    )));
                }
                Ok(slot)
            }
            None => (0..KEY_SLOTS)
                .find(|slot| !self.header.slots[*slot].active)
                .ok_or_else(|| {
                    Error::invalid_argument("Can't add a keyslot - all keyslots are in use")
                }),
        }
    }

    fn is_active(&self, slot: usize) -> Result<bool> {
        match self.header.slots.get(slot) {
            Some(slot) => Ok(slot.active),
            None => Err(Error::invalid_argument(format!(
                "Invalid keyslot {slot} specified, must be between 0 and {}",
                KEY_SLOTS - 1
            ))),
        }
    }

    async fn add(
        &mut self,
        io: &Io,
        slot: usize,
        key: &MasterKey,
        secret: &Secret,
        iter_time: Duration,
    ) -> Result<()> {
        let (mut header, key, secret) = (self.header.clone(), key.clone(), secret.clone());
        header.erase_key(slot)?;
        let (header, material) = io
            .run(move || {
                let password = secret.as_bytes();
                let material = header.add_key(slot, &key, password, iter_time, thread_time)?;
                Ok::<_, Error>((header, material))
            })
            .await??;
        // The material is durable before the header says that the slot is in use.
        self.write_material(io, slot, &material).await?;
        self.header = header;
        self.write_header(io).await
    }

    async fn slots_to_erase(
        &self,
        io: &Io,
        old: Option<&Secret>,
        slot: Option<usize>,
        force: bool,
    ) -> Result<Vec<usize>> {
        let refuse = |text: String| Err(Error::invalid_argument(text));
        let (Some(slot), old) = (slot, old) else {
            let Some(old) = old else {
                return refuse(
                    "To erase keyslot(s), either explicit keyslot index or the password \
                     currently contained in them must be given"
                        .into(),
                );
            };
            return self.slots_with(io, old, force).await;
        };
        if !self.is_active(slot)? && !force {
            return refuse(format!("Given keyslot {slot} is already erased (inactive)"));
        }
        if let Some(old) = old
            && self.try_slot(io, slot, old).await?.is_none()
        {
            return refuse(format!(
                "Given keyslot {slot} doesn't contain the given (old) password"
            ));
        }
        if self.is_active(slot)? && self.header.active_slots() == 1 && !force {
            return refuse(format!(
                "Attempt to erase the only active keyslot {slot} which will erase all the data in \
                 the image irreversibly - refusing operation"
            ));
        }
        Ok(vec![slot])
    }

    async fn slots_with(&self, io: &Io, old: &Secret, force: bool) -> Result<Vec<usize>> {
        let mut slots = Vec::new();
        for slot in 0..KEY_SLOTS {
            if self.try_slot(io, slot, old).await?.is_some() {
                slots.push(slot);
            }
        }
        if slots.is_empty() {
            return Err(Error::invalid_argument(
                "No keyslots match given (old) password for erase operation",
            ));
        }
        if slots.len() == self.header.active_slots() && !force {
            return Err(Error::invalid_argument(
                "All the active keyslots match the (old) password that was given and erasing them \
                 will erase all the data in the image irreversibly - refusing operation",
            ));
        }
        Ok(slots)
    }

    async fn erase(&mut self, io: &Io, slots: &[usize]) -> Result<()> {
        for slot in slots {
            self.header.erase_key(*slot)?;
        }
        self.write_header(io).await?;
        // An old copy of the header is of no use without the material.
        for slot in slots {
            let mut noise = vec![0; self.header.material_len() as usize];
            fill_random(&mut noise)?;
            self.write_material(io, *slot, &noise).await?;
        }
        Ok(())
    }

    /// What `info` shows of it.
    pub(crate) fn info(&self) -> Map<String, Value> {
        let header = &self.header;
        let spec = header.spec;
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("ivgen-alg", spec.iv.name().into());
        put("detached-header", false.into());
        if let (IvGenerator::Essiv, Some(hash)) = (spec.iv, spec.iv_hash) {
            put("ivgen-hash-alg", hash.name().into());
        }
        put("hash-alg", header.hash.name().into());
        put("cipher-alg", spec.algorithm.name().into());
        put("uuid", header.uuid.as_str().into());
        put("cipher-mode", spec.mode.name().into());
        let slots = header.slots.iter().map(|slot| {
            if slot.active {
                json!({
                    "active": true,
                    "iters": slot.iterations,
                    "key-offset": slot.key_offset,
                    "stripes": slot.stripes,
                })
            } else {
                json!({"active": false, "key-offset": slot.key_offset})
            }
        });
        put("slots", slots.collect());
        put("payload-offset", header.payload_offset.into());
        put("master-key-iters", header.master_key_iterations.into());
        map
    }
}

/// A volume whose key may be known, as an opened image has it.
#[derive(Clone)]
pub(crate) struct OpenVolume {
    pub(crate) volume: Volume,
    key: Option<MasterKey>,
}

impl fmt::Debug for OpenVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        self.volume.fmt(f)
    }
}

impl OpenVolume {
    /// Unlocks a volume, unless it stays locked. `option` is the name of the missing key in messages.
    pub(crate) async fn new(
        io: &Io,
        volume: Volume,
        unlock: &Unlock,
        option: &str,
    ) -> Result<(Self, Option<SectorCipher>)> {
        let key = match unlock {
            Unlock::Locked => None,
            Unlock::With(secret) => Some(volume.unlock(io, secret).await?),
            Unlock::Nothing => return Err(missing_key(option)),
        };
        let cipher = key.as_ref().map(|key| volume.cipher(key)).transpose()?;
        Ok((Self { volume, key }, cipher))
    }

    /// Changes the passwords.
    pub(crate) async fn change_keys(&mut self, io: &Io, change: &KeyChange) -> Result<()> {
        let mut after = self.volume.clone();
        let result = after.change_keys(io, self.key.as_ref(), change).await;
        // What is in the file after a failure is what was tried last, or not: it is read again.
        if result.is_err() && after.header != self.volume.header {
            let len = after.header.payload_offset;
            after = Volume::read(io, after.file, after.base, len).await?;
        }
        self.volume = after;
        result
    }
}

/// The error for an encrypted image that was opened without its key.
pub(crate) fn missing_key(option: &str) -> Error {
    Error::with_message(
        ErrorKind::Denied,
        format!("Parameter '{option}' is required for cipher"),
    )
}

/// Changes the passwords of an image's volume. The disk is drained: nobody else does.
pub(crate) async fn change_in(
    volume: &Mutex<OpenVolume>,
    io: &Io,
    change: &KeyChange,
) -> Result<()> {
    let mut open = lock(volume).clone();
    let result = open.change_keys(io, change).await;
    *lock(volume) = open;
    result
}
