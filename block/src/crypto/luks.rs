//! The header of LUKS version 1 and its key slots: "LUKS On-Disk Format Specification", version
//! 1.2.3.
//!
//! A message about a field begins with the words QEMU uses, followed by field, value and
//! expectation in parentheses.

mod fields;

use std::time::Duration;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use self::fields::{
    CIPHER_MODE, CIPHER_NAME, HASH_SPEC, KEY_BYTES, MK_DIGEST, MK_ITERATIONS, MK_SALT,
    PAYLOAD_OFFSET, SLOT_LEN, SLOTS, UUID, UUID_LEN, VERSION, array, bad_field, be32, parse_hash,
    parse_slots, parse_spec, text,
};
use super::{
    SECTOR_SIZE, SectorCipher, af,
    cipher::{CipherSpec, IvGenerator},
    fill_random,
    hash::HashAlgorithm,
};
use crate::{Error, ErrorKind, Result};

/// The first bytes of a header.
pub const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Bytes of the header, key slots included, key material not.
pub const HEADER_LEN: usize = 592;
/// Key slots of a header.
pub const KEY_SLOTS: usize = 8;
/// Stripes that a key is split into; no other number is in use anywhere.
pub const STRIPES: u32 = 4000;
/// The default of [`LuksOptions::iter_time`].
pub const DEFAULT_ITER_TIME: Duration = Duration::from_secs(2);

/// Key material starts, and is aligned, so.
const MATERIAL_ALIGNMENT: u64 = 4096;
const MIN_ITERATIONS: u64 = 1000;
/// The most rounds of PBKDF2 that trying a password on every key slot may take: some minutes.
const MAX_ROUNDS: u64 = 1 << 28;
const DIGEST_LEN: usize = 20;
const SALT_LEN: usize = 32;

const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;

/// How a new LUKS volume is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksOptions {
    /// How sectors are encrypted.
    pub spec: CipherSpec,
    /// The hash of passwords and of the splitter.
    pub hash: HashAlgorithm,
    /// How long trying a password should take.
    pub iter_time: Duration,
}

impl Default for LuksOptions {
    /// `aes-xts-plain64` with keys of 256 bits, SHA-256, two seconds.
    fn default() -> Self {
        Self {
            spec: CipherSpec::default(),
            hash: HashAlgorithm::Sha256,
            iter_time: DEFAULT_ITER_TIME,
        }
    }
}

impl LuksOptions {
    /// The options that QEMU's names ask for: `essiv` without a hash takes SHA-256.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) when the parts do not go together,
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for an iteration time of 0.
    pub fn check(mut self) -> Result<Self> {
        if self.spec.iv == IvGenerator::Essiv {
            self.spec.iv_hash.get_or_insert(HashAlgorithm::Sha256);
        }
        self.spec.check()?;
        if self.iter_time.is_zero() {
            return Err(Error::invalid_argument("iter-time must be at least 1 ms"));
        }
        Ok(self)
    }

    /// Bytes in front of the payload: header and key material.
    #[must_use]
    pub fn header_len(&self) -> u64 {
        MATERIAL_ALIGNMENT + material_room(self.spec.key_len()) * KEY_SLOTS as u64
    }
}

/// One of the eight places for a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether there is a password.
    pub active: bool,
    /// Iterations of PBKDF2.
    pub iterations: u32,
    /// Where the key material starts, in bytes from the start of the volume.
    pub key_offset: u64,
    /// Stripes of the key material.
    pub stripes: u32,
    salt: [u8; SALT_LEN],
}

/// The header of a LUKS1 volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// How the payload and the key material are encrypted.
    pub spec: CipherSpec,
    /// The hash of passwords and of the splitter.
    pub hash: HashAlgorithm,
    /// Where the payload starts, in bytes from the start of the volume.
    pub payload_offset: u64,
    /// Iterations for the digest of the master key.
    pub master_key_iterations: u32,
    /// The volume's UUID as text.
    pub uuid: String,
    /// The key slots.
    pub slots: [KeySlot; KEY_SLOTS],
    mk_digest: [u8; DIGEST_LEN],
    mk_salt: [u8; SALT_LEN],
    /// What was read: names and padding stay as they are.
    bytes: Vec<u8>,
}

/// The key that the payload is encrypted with.
pub type MasterKey = Zeroizing<Vec<u8>>;

/// Bytes that the split key takes, and the next one's distance.
fn material_len(key_len: usize) -> u64 {
    key_len as u64 * u64::from(STRIPES)
}

fn material_room(key_len: usize) -> u64 {
    material_len(key_len).next_multiple_of(MATERIAL_ALIGNMENT)
}

impl LuksHeader {
    /// Parses a header of [`HEADER_LEN`] bytes.
    ///
    /// # Errors
    /// [`InvalidImage`](ErrorKind::InvalidImage) naming field, value and expectation;
    /// [`Unsupported`](ErrorKind::Unsupported) for another version or an unknown cipher.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_LEN || !bytes.starts_with(MAGIC) {
            return Err(Error::invalid_image("Volume is not in LUKS format"));
        }
        let bytes = &bytes[..HEADER_LEN];
        let version = u16::from_be_bytes(array(bytes, VERSION));
        if version != 1 {
            return Err(Error::unsupported(format!(
                "LUKS version {version} is not supported (field version: value {version}, \
                 expected 1)"
            )));
        }
        let cipher_name = text(bytes, CIPHER_NAME, "cipher-name")?;
        let cipher_mode = text(bytes, CIPHER_MODE, "cipher-mode")?;
        let hash = parse_hash(text(bytes, HASH_SPEC, "hash-spec")?)?;
        let spec = parse_spec(cipher_name, cipher_mode, be32(bytes, KEY_BYTES))?;
        let uuid = &bytes[UUID..UUID + UUID_LEN];
        let uuid_len = uuid.iter().position(|byte| *byte == 0).unwrap_or(UUID_LEN);
        let header = Self {
            spec,
            hash,
            payload_offset: u64::from(be32(bytes, PAYLOAD_OFFSET)) * SECTOR_SIZE,
            master_key_iterations: be32(bytes, MK_ITERATIONS),
            uuid: String::from_utf8_lossy(&uuid[..uuid_len]).into_owned(),
            slots: parse_slots(bytes)?,
            mk_digest: array(bytes, MK_DIGEST),
            mk_salt: array(bytes, MK_SALT),
            bytes: bytes.to_vec(),
        };
        header.check_places()?;
        header.check_work()?;
        Ok(header)
    }

    fn check_places(&self) -> Result<()> {
        if self.payload_offset < MATERIAL_ALIGNMENT {
            return Err(bad_field(
                "LUKS payload is overlapping with the header",
                "payload-offset",
                self.payload_offset / SECTOR_SIZE,
                format_args!("at least {}", MATERIAL_ALIGNMENT / SECTOR_SIZE),
            ));
        }
        let len = self.material_len().next_multiple_of(SECTOR_SIZE);
        for (index, slot) in self.slots.iter().enumerate() {
            let field = format!("key-slot-{index} key-material-offset");
            let at = slot.key_offset / SECTOR_SIZE;
            if slot.stripes != STRIPES {
                return Err(bad_field(
                    &format!(
                        "Keyslot {index} is corrupted (stripes count {})",
                        slot.stripes
                    ),
                    &format!("key-slot-{index} stripes"),
                    slot.stripes,
                    STRIPES,
                ));
            }
            // The header takes less than two sectors.
            if slot.key_offset < 2 * SECTOR_SIZE {
                return Err(bad_field(
                    &format!("Keyslot {index} is overlapping with the LUKS header"),
                    &field,
                    at,
                    "at least 2",
                ));
            }
            // Both come from 32 bits of sectors: no overflow.
            if slot.key_offset + len > self.payload_offset {
                return Err(bad_field(
                    &format!("Keyslot {index} is overlapping with the encrypted payload"),
                    &field,
                    at,
                    format_args!(
                        "at least {} sectors before payload-offset, {}",
                        len / SECTOR_SIZE,
                        self.payload_offset / SECTOR_SIZE
                    ),
                ));
            }
            for (other, before) in self.slots[..index].iter().enumerate() {
                let distance = before.key_offset.abs_diff(slot.key_offset);
                if distance < len {
                    return Err(bad_field(
                        &format!("Keyslots {other} and {index} are overlapping in the header"),
                        &field,
                        at,
                        format_args!("{} sectors for each", len / SECTOR_SIZE),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_work(&self) -> Result<()> {
        if self.master_key_iterations == 0 {
            return Err(bad_field(
                "LUKS key iteration count is zero",
                "mk-digest-iter",
                0,
                "at least 1",
            ));
        }
        let mut rounds = 0;
        for (index, slot) in self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.active)
        {
            if slot.iterations == 0 {
                return Err(bad_field(
                    &format!("Keyslot {index} iteration count is zero"),
                    &format!("key-slot-{index} iterations"),
                    0,
                    "at least 1",
                ));
            }
            rounds += self.rounds(slot.iterations);
            if rounds > MAX_ROUNDS {
                return Err(bad_field(
                    &format!("Keyslot {index} iteration count is too large"),
                    &format!("key-slot-{index} iterations"),
                    slot.iterations,
                    format_args!(
                        "no more than {MAX_ROUNDS} rounds of {} for all active key slots and \
                         their digests (mk-digest-iter {})",
                        self.hash, self.master_key_iterations
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Rounds of PBKDF2 for a password in a slot of so many iterations.
    fn rounds(&self, iterations: u32) -> u64 {
        let pieces = |len: usize| len.div_ceil(self.hash.digest_len()) as u64;
        u64::from(iterations) * pieces(self.spec.key_len())
            + u64::from(self.master_key_iterations) * pieces(DIGEST_LEN)
    }

    /// A new volume: its header, with a password in the first slot, its master key, and the key
    /// material of that slot. `clock` is the time that passwords are measured in.
    ///
    /// # Errors
    /// As [`LuksOptions::check`], and the host's when it has no random bytes.
    pub fn create(
        options: &LuksOptions,
        password: &[u8],
        clock: fn() -> Duration,
    ) -> Result<(Self, MasterKey, Vec<u8>)> {
        let options = options.check()?;
        let key_len = options.spec.key_len();
        let mut key = Zeroizing::new(vec![0; key_len]);
        fill_random(&mut key)?;
        let mut mk_salt = [0; SALT_LEN];
        fill_random(&mut mk_salt)?;
        let counted = options
            .hash
            .iterations_in(options.iter_time, DIGEST_LEN, clock);
        // An eighth, as others do it: the password itself is what should take long.
        let master_key_iterations = limited(counted / 8, MAX_ROUNDS / 64)?;
        let mut mk_digest = [0; DIGEST_LEN];
        options
            .hash
            .pbkdf2(&key, &mk_salt, master_key_iterations, &mut mk_digest);
        let slot = |index: usize| KeySlot {
            active: false,
            iterations: 0,
            key_offset: MATERIAL_ALIGNMENT + material_room(key_len) * index as u64,
            stripes: STRIPES,
            salt: [0; SALT_LEN],
        };
        let mut header = Self {
            spec: options.spec,
            hash: options.hash,
            payload_offset: options.header_len(),
            master_key_iterations,
            uuid: random_uuid()?,
            slots: std::array::from_fn(slot),
            mk_digest,
            mk_salt,
            bytes: vec![0; HEADER_LEN],
        };
        let material = header.add_key(0, &key, password, options.iter_time, clock)?;
        Ok((header, key, material))
    }

    /// The header as it goes to the volume.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        if self.bytes[..MAGIC.len()] != *MAGIC {
            // A new one. The names are shorter than their fields.
            put(0, MAGIC);
            put(VERSION, &1u16.to_be_bytes());
            put(CIPHER_NAME, self.spec.algorithm.luks_name().as_bytes());
            put(CIPHER_MODE, self.spec.mode_string().as_bytes());
            put(HASH_SPEC, self.hash.name().as_bytes());
            let payload = (self.payload_offset / SECTOR_SIZE) as u32;
            put(PAYLOAD_OFFSET, &payload.to_be_bytes());
            put(KEY_BYTES, &(self.spec.key_len() as u32).to_be_bytes());
            put(MK_DIGEST, &self.mk_digest);
            put(MK_SALT, &self.mk_salt);
            put(MK_ITERATIONS, &self.master_key_iterations.to_be_bytes());
            put(UUID, self.uuid.as_bytes());
        }
        for (index, slot) in self.slots.iter().enumerate() {
            let at = SLOTS + index * SLOT_LEN;
            let state = if slot.active {
                SLOT_ENABLED
            } else {
                SLOT_DISABLED
            };
            put(at, &state.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            let offset = (slot.key_offset / SECTOR_SIZE) as u32;
            put(at + 40, &offset.to_be_bytes());
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        bytes
    }

    /// Bytes of the key material of a slot.
    #[must_use]
    pub fn material_len(&self) -> u64 {
        material_len(self.spec.key_len())
    }

    /// Tries a password on a slot, whose encrypted key material is given; `None` when it does not
    /// fit. This takes long.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a slot or material that there is not.
    pub fn unlock(
        &self,
        slot: usize,
        password: &[u8],
        material: &mut [u8],
    ) -> Result<Option<MasterKey>> {
        let slot = self.slot(slot)?;
        if !slot.active {
            return Ok(None);
        }
        if material.len() as u64 != self.material_len() {
            return Err(Error::invalid_argument("key material of another length"));
        }
        self.slot_cipher(slot, password)?.decrypt(0, material);
        let key = af::merge(self.hash, material, self.spec.key_len());
        let mut digest = [0; DIGEST_LEN];
        let iterations = self.master_key_iterations;
        self.hash
            .pbkdf2(&key, &self.mk_salt, iterations, &mut digest);
        let fits: bool = digest.ct_eq(&self.mk_digest).into();
        Ok(fits.then_some(key))
    }

    /// Puts a password into a slot and returns its encrypted key material. This takes long.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a slot in use or one that there is not, or
    /// when the passwords together would take too long.
    pub fn add_key(
        &mut self,
        index: usize,
        key: &MasterKey,
        password: &[u8],
        iter_time: Duration,
        clock: fn() -> Duration,
    ) -> Result<Vec<u8>> {
        let mut slot = *self.slot(index)?;
        if slot.active {
            return Err(Error::invalid_argument(format!(
                "Can't activate keyslot {index} - it is already active"
            )));
        }
        let counted = self
            .hash
            .iterations_in(iter_time, self.spec.key_len(), clock);
        slot.iterations = limited(counted, MAX_ROUNDS)?;
        slot.stripes = STRIPES;
        slot.active = true;
        fill_random(&mut slot.salt)?;
        let mut after = self.clone();
        after.slots[index] = slot;
        after.check_work().map_err(|error| {
            Error::invalid_argument(format!("iter-time: too long: {}", error.message()))
        })?;
        let mut material = af::split(self.hash, key, STRIPES as usize)?;
        after
            .slot_cipher(&slot, password)?
            .encrypt(0, &mut material);
        *self = after;
        Ok(std::mem::take(&mut *material))
    }

    /// Forgets the password of a slot. Its key material must be overwritten.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a slot that there is not.
    pub fn erase_key(&mut self, index: usize) -> Result<()> {
        self.slot(index)?;
        let slot = &mut self.slots[index];
        slot.active = false;
        slot.iterations = 0;
        slot.salt = [0; SALT_LEN];
        Ok(())
    }

    /// How many slots have a password.
    #[must_use]
    pub fn active_slots(&self) -> usize {
        self.slots.iter().filter(|slot| slot.active).count()
    }

    fn slot(&self, index: usize) -> Result<&KeySlot> {
        self.slots.get(index).ok_or_else(|| {
            Error::invalid_argument(format!(
                "Invalid keyslot {index} specified. Must be between 0 and {}",
                KEY_SLOTS - 1
            ))
        })
    }

    /// The cipher of a slot's key material.
    fn slot_cipher(&self, slot: &KeySlot, password: &[u8]) -> Result<SectorCipher> {
        let mut key = Zeroizing::new(vec![0; self.spec.key_len()]);
        self.hash
            .pbkdf2(password, &slot.salt, slot.iterations, &mut key);
        SectorCipher::new(self.spec, &key)
    }
}

/// A number of iterations that is at least the usual minimum and at most `max`.
fn limited(iterations: u64, max: u64) -> Result<u32> {
    let iterations = iterations.max(MIN_ITERATIONS);
    u32::try_from(iterations)
        .ok()
        .filter(|count| u64::from(*count) <= max)
        .ok_or_else(|| {
            Error::with_message(
                ErrorKind::InvalidArgument,
                format!("iter-time: {iterations} iterations of PBKDF2, expected at most {max}"),
            )
        })
}

/// A random UUID (version 4) as text.
fn random_uuid() -> Result<String> {
    let mut bytes = [0; 16];
    fill_random(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
