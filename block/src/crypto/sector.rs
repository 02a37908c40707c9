//! The cipher of a disk: whole sectors, encrypted and decrypted where they are.

use std::fmt;

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::{
    Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt,
    BlockSizeUser, InnerIvInit, KeyInit,
    array::{Array, ArraySize},
    consts::U16,
};
use serpent::Serpent;
use sm4::Sm4;
use twofish::Twofish;
use zeroize::Zeroizing;

use super::cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator};
use crate::{Error, Result};

/// Bytes that are encrypted under one IV.
pub const SECTOR_SIZE: u64 = 512;
const SECTOR: usize = SECTOR_SIZE as usize;

/// Sectors whose tweaks are encrypted together.
const GROUP: usize = 8;
/// Blocks of 16 bytes in a sector.
const BLOCKS: usize = SECTOR / 16;

/// A block cipher both ways.
trait BlockCipher: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static {}
impl<C> BlockCipher for C where
    C: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static
{
}

/// A cipher in a mode, over consecutive sectors.
trait Mode: Send + Sync {
    fn encrypt(&self, iv: &Iv, first: u64, data: &mut [u8]);
    fn decrypt(&self, iv: &Iv, first: u64, data: &mut [u8]);
}

/// Encrypts single blocks.
trait OneBlock: Send + Sync {
    fn encrypt(&self, block: &mut [u8]);
}

/// Where IVs come from.
enum Iv {
    Plain,
    Plain64,
    Essiv(Box<dyn OneBlock>),
}

impl Iv {
    /// The IV of a sector; a cipher with shorter blocks takes the start of it.
    fn of(&self, sector: u64, block_len: usize) -> [u8; 16] {
        let mut iv = [0; 16];
        match self {
            Iv::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Iv::Plain64 => iv[..8].copy_from_slice(&sector.to_le_bytes()),
            Iv::Essiv(salt) => {
                iv[..8].copy_from_slice(&sector.to_le_bytes());
                salt.encrypt(&mut iv[..block_len]);
            }
        }
        iv
    }
}

fn blocks_of<N: ArraySize>(bytes: &mut [u8]) -> &mut [Array<u8, N>] {
    let (blocks, rest) = Array::slice_as_chunks_mut(bytes);
    debug_assert!(rest.is_empty(), "sectors are whole blocks");
    blocks
}

struct Ecb<C>(C);

impl<C: BlockCipher> OneBlock for Ecb<C> {
    fn encrypt(&self, block: &mut [u8]) {
        self.0.encrypt_blocks(blocks_of(block));
    }
}

impl<C: BlockCipher> Mode for Ecb<C> {
    fn encrypt(&self, _iv: &Iv, _first: u64, data: &mut [u8]) {
        self.0.encrypt_blocks(blocks_of(data));
    }

    fn decrypt(&self, _iv: &Iv, _first: u64, data: &mut [u8]) {
        self.0.decrypt_blocks(blocks_of(data));
    }
}

struct Cbc<C>(C);

impl<C: BlockCipher> Cbc<C> {
    fn iv(iv: &Iv, sector: u64) -> Block<C> {
        let len = C::block_size();
        let bytes = iv.of(sector, len);
        Block::<C>::try_from(&bytes[..len]).unwrap_or_default()
    }
}

impl<C: BlockCipher> Mode for Cbc<C> {
    fn encrypt(&self, iv: &Iv, first: u64, data: &mut [u8]) {
        for (number, sector) in (first..).zip(data.chunks_mut(SECTOR)) {
            let iv = Self::iv(iv, number);
            cbc::Encryptor::inner_iv_init(&self.0, &iv).encrypt_blocks(blocks_of(sector));
        }
    }

    fn decrypt(&self, iv: &Iv, first: u64, data: &mut [u8]) {
        for (number, sector) in (first..).zip(data.chunks_mut(SECTOR)) {
            let iv = Self::iv(iv, number);
            cbc::Decryptor::inner_iv_init(&self.0, &iv).decrypt_blocks(blocks_of(sector));
        }
    }
}

/// XTS (IEEE 1619). Of our own, because the crate for it does one block after the other, which leaves
/// most of a processor's AES units idle: here all blocks of a sector go to the cipher at once.
struct Xts<C> {
    data: C,
    tweak: C,
}

impl<C: BlockCipher + BlockSizeUser<BlockSize = U16>> Xts<C> {
    fn apply(&self, iv: &Iv, first: u64, data: &mut [u8], cipher: impl Fn(&C, &mut [Block<C>])) {
        let mut number = first;
        for group in data.chunks_mut(GROUP * SECTOR) {
            let mut tweaks: [Block<C>; GROUP] = Default::default();
            for tweak in &mut tweaks {
                *tweak = iv.of(number, 16).into();
                number = number.wrapping_add(1);
            }
            self.tweak.encrypt_blocks(&mut tweaks);
            for (sector, tweak) in group.chunks_mut(SECTOR).zip(tweaks) {
                let masks = masks(u128::from_le_bytes(tweak.into()));
                let blocks = blocks_of::<U16>(sector);
                mask(blocks, &masks);
                cipher(&self.data, blocks);
                mask(blocks, &masks);
            }
        }
    }
}

impl<C: BlockCipher + BlockSizeUser<BlockSize = U16>> Mode for Xts<C> {
    fn encrypt(&self, iv: &Iv, first: u64, data: &mut [u8]) {
        self.apply(iv, first, data, |cipher, blocks| {
            cipher.encrypt_blocks(blocks);
        });
    }

    fn decrypt(&self, iv: &Iv, first: u64, data: &mut [u8]) {
        self.apply(iv, first, data, |cipher, blocks| {
            cipher.decrypt_blocks(blocks);
        });
    }
}

/// The tweak of every block of a sector: each is the one before times x, in the field of 2^128.
fn masks(mut tweak: u128) -> [u128; BLOCKS] {
    let mut masks = [0; BLOCKS];
    for mask in &mut masks {
        *mask = tweak;
        tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
    }
    masks
}

fn mask(blocks: &mut [Array<u8, U16>], masks: &[u128; BLOCKS]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        let plain = u128::from_le_bytes((*block).into());
        *block = (plain ^ mask).to_le_bytes().into();
    }
}

/// A cipher with its key: encrypts and decrypts sectors of [`SECTOR_SIZE`] bytes.
pub struct SectorCipher {
    spec: CipherSpec,
    mode: Box<dyn Mode>,
    iv: Iv,
}

impl SectorCipher {
    /// The cipher under a key.
    ///
    /// # Errors
    /// As [`CipherSpec::check`]; [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for a key of
    /// another length.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        spec.check()?;
        if key.len() != spec.key_len() {
            return Err(Error::invalid_argument(format!(
                "key: {} bytes, expected {} for {}-{}",
                key.len(),
                spec.key_len(),
                spec.algorithm,
                spec.mode
            )));
        }
        let iv = match (spec.iv, spec.iv_hash) {
            (IvGenerator::Plain, _) => Iv::Plain,
            (IvGenerator::Plain64, _) => Iv::Plain64,
            (IvGenerator::Essiv, Some(hash)) => {
                let mut salt = Zeroizing::new(Vec::with_capacity(hash.digest_len()));
                hash.digest_into(&[key], &mut salt);
                Iv::Essiv(one_block(spec.essiv_cipher(hash)?, &salt)?)
            }
            (IvGenerator::Essiv, None) => {
                return Err(Error::invalid_image(
                    "Missing IV generator hash specification",
                ));
            }
        };
        let mode = mode(spec.algorithm, spec.mode, key)?;
        Ok(Self { spec, mode, iv })
    }

    /// What it is.
    #[must_use]
    pub fn spec(&self) -> CipherSpec {
        self.spec
    }

    /// Whether a sector takes a microsecond rather than a small part of one: nothing but AES has
    /// instructions of its own.
    #[must_use]
    pub fn is_slow(&self) -> bool {
        self.spec.algorithm.luks_name() != "aes"
    }

    /// Encrypts consecutive sectors; the first has the number `first`.
    pub fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.mode.encrypt(&self.iv, first, data);
    }

    /// Decrypts consecutive sectors; the first has the number `first`.
    pub fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.mode.decrypt(&self.iv, first, data);
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CipherSpec { algorithm, .. } = self.spec;
        write!(f, "SectorCipher({algorithm}-{})", self.spec.mode_string())
    }
}

fn keyed<C: KeyInit>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key)
        .map_err(|_| Error::invalid_argument(format!("key: {} bytes do not fit", key.len())))
}

fn one_block(algorithm: CipherAlgorithm, key: &[u8]) -> Result<Box<dyn OneBlock>> {
    fn make<C: BlockCipher>(key: &[u8]) -> Result<Box<dyn OneBlock>> {
        Ok(Box::new(Ecb(keyed::<C>(key)?)))
    }
    match algorithm {
        CipherAlgorithm::Aes128 => make::<Aes128>(key),
        CipherAlgorithm::Aes192 => make::<Aes192>(key),
        CipherAlgorithm::Aes256 => make::<Aes256>(key),
        CipherAlgorithm::Cast5 => make::<Cast5>(key),
        CipherAlgorithm::Serpent128 | CipherAlgorithm::Serpent192 | CipherAlgorithm::Serpent256 => {
            make::<Serpent>(key)
        }
        CipherAlgorithm::Twofish128 | CipherAlgorithm::Twofish192 | CipherAlgorithm::Twofish256 => {
            make::<Twofish>(key)
        }
        CipherAlgorithm::Sm4 => make::<Sm4>(key),
    }
}

fn mode(algorithm: CipherAlgorithm, mode: CipherMode, key: &[u8]) -> Result<Box<dyn Mode>> {
    fn any<C: BlockCipher>(mode: CipherMode, key: &[u8]) -> Result<Box<dyn Mode>> {
        match mode {
            CipherMode::Ecb => Ok(Box::new(Ecb(keyed::<C>(key)?))),
            CipherMode::Cbc => Ok(Box::new(Cbc(keyed::<C>(key)?))),
            CipherMode::Xts => Err(Error::unsupported("mode xts needs blocks of 16 bytes")),
        }
    }
    fn wide<C>(mode: CipherMode, key: &[u8]) -> Result<Box<dyn Mode>>
    where
        C: BlockCipher + BlockSizeUser<BlockSize = U16>,
    {
        if mode != CipherMode::Xts {
            return any::<C>(mode, key);
        }
        let (data, tweak) = key.split_at(key.len() / 2);
        Ok(Box::new(Xts {
            data: keyed::<C>(data)?,
            tweak: keyed::<C>(tweak)?,
        }))
    }
    match algorithm {
        CipherAlgorithm::Aes128 => wide::<Aes128>(mode, key),
        CipherAlgorithm::Aes192 => wide::<Aes192>(mode, key),
        CipherAlgorithm::Aes256 => wide::<Aes256>(mode, key),
        CipherAlgorithm::Cast5 => any::<Cast5>(mode, key),
        CipherAlgorithm::Serpent128 | CipherAlgorithm::Serpent192 | CipherAlgorithm::Serpent256 => {
            wide::<Serpent>(mode, key)
        }
        CipherAlgorithm::Twofish128 | CipherAlgorithm::Twofish192 | CipherAlgorithm::Twofish256 => {
            wide::<Twofish>(mode, key)
        }
        CipherAlgorithm::Sm4 => wide::<Sm4>(mode, key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::hash::HashAlgorithm;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex"))
            .collect()
    }

    fn spec(algorithm: CipherAlgorithm, mode: CipherMode, iv: IvGenerator) -> CipherSpec {
        CipherSpec {
            algorithm,
            mode,
            iv,
            iv_hash: (iv == IvGenerator::Essiv).then_some(HashAlgorithm::Sha256),
        }
    }

    /// IEEE 1619-2007, annex B: vectors 1, 2 and 4 (the first two have 32 bytes, a part of a sector).
    #[test]
    fn xts_vectors() {
        let xts = |key: &str, sector: u64, data: &mut [u8]| {
            let spec = spec(
                CipherAlgorithm::Aes128,
                CipherMode::Xts,
                IvGenerator::Plain64,
            );
            SectorCipher::new(spec, &bytes(key))
                .expect("key")
                .encrypt(sector, data);
        };
        let mut data = [0; 32];
        xts(&"00".repeat(32), 0, &mut data);
        assert_eq!(
            data.to_vec(),
            bytes("917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e")
        );
        let mut data = [0x44; 32];
        let key = "11".repeat(16) + &"22".repeat(16);
        xts(&key, 0x33_3333_3333, &mut data);
        assert_eq!(
            data.to_vec(),
            bytes("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0")
        );
        let mut data: Vec<u8> = (0..512).map(|byte| byte as u8).collect();
        xts(
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            &mut data,
        );
        assert_eq!(data[..16], bytes("27a7479befa1d476489f308cd4cfa6e2"));
        assert_eq!(data[496..], bytes("0a282df920147beabe421ee5319d0568")[..]);
    }

    /// FIPS 197 and the submissions of the other ciphers, single blocks.
    #[test]
    fn block_vectors() {
        let zero = "00".repeat(16);
        for (algorithm, key, plain, expected) in [
            (
                CipherAlgorithm::Aes192,
                "000102030405060708090a0b0c0d0e0f1011121314151617",
                "00112233445566778899aabbccddeeff",
                "dda97ca4864cdfe06eaf70a0ec0d7191",
            ),
            (
                CipherAlgorithm::Aes256,
                "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
                "00112233445566778899aabbccddeeff",
                "8ea2b7ca516745bfeafc49904b496089",
            ),
            (
                CipherAlgorithm::Twofish128,
                &zero,
                &zero,
                "9f589f5cf6122c32b6bfec2f2ae8c35a",
            ),
            (
                CipherAlgorithm::Cast5,
                "0123456712345678234567893456789a",
                "0123456789abcdef",
                "238b4fe5847e44b2",
            ),
            (
                CipherAlgorithm::Sm4,
                "0123456789abcdeffedcba9876543210",
                "0123456789abcdeffedcba9876543210",
                "681edf34d206965e86b3e94f536e4246",
            ),
        ] {
            let spec = spec(algorithm, CipherMode::Ecb, IvGenerator::Plain64);
            let cipher = SectorCipher::new(spec, &bytes(key)).expect("key");
            let mut block = bytes(plain);
            cipher.encrypt(7, &mut block);
            assert_eq!(block, bytes(expected), "{algorithm}");
            cipher.decrypt(7, &mut block);
            assert_eq!(block, bytes(plain), "{algorithm}");
        }
    }

    #[test]
    fn every_combination_goes_both_ways_and_depends_on_the_sector() {
        for algorithm in CipherAlgorithm::ALL {
            for mode in CipherMode::ALL {
                for iv in IvGenerator::ALL {
                    let spec = spec(algorithm, mode, iv);
                    let key: Vec<u8> = (1..=spec.key_len() as u8).collect();
                    let Ok(cipher) = SectorCipher::new(spec, &key) else {
                        let narrow = algorithm == CipherAlgorithm::Cast5 && mode == CipherMode::Xts;
                        // SHA-256 gives ESSIV a key of 32 bytes, which these ciphers do not take.
                        let short = iv == IvGenerator::Essiv
                            && matches!(algorithm, CipherAlgorithm::Cast5 | CipherAlgorithm::Sm4);
                        assert!(narrow || short, "{spec:?}");
                        continue;
                    };
                    let plain: Vec<u8> = (0..11 * SECTOR).map(|at| (at / 7) as u8).collect();
                    let mut whole = plain.clone();
                    cipher.encrypt(5, &mut whole);
                    assert_ne!(whole, plain, "{spec:?}");
                    // One sector at a time is the same.
                    let mut pieces = plain.clone();
                    for (number, sector) in (5..).zip(pieces.chunks_mut(SECTOR)) {
                        cipher.encrypt(number, sector);
                    }
                    assert_eq!(whole, pieces, "{spec:?}");
                    cipher.decrypt(5, &mut whole);
                    assert_eq!(whole, plain, "{spec:?}");
                    let mut elsewhere = plain.clone();
                    cipher.encrypt(6, &mut elsewhere);
                    assert_eq!(elsewhere == pieces, mode == CipherMode::Ecb, "{spec:?}");
                }
            }
        }
    }

    #[test]
    fn plain_ivs_wrap_and_plain64_do_not() {
        for (iv, same) in [(IvGenerator::Plain, true), (IvGenerator::Plain64, false)] {
            let cipher =
                SectorCipher::new(spec(CipherAlgorithm::Aes128, CipherMode::Cbc, iv), &[7; 16])
                    .expect("key");
            let (mut low, mut high) = ([0; SECTOR], [0; SECTOR]);
            cipher.encrypt(3, &mut low);
            cipher.encrypt((1 << 32) + 3, &mut high);
            assert_eq!(low == high, same, "{iv}");
        }
    }
}
