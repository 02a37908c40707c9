//! The anti-forensic splitter (LUKS1, section 2.4): a key blown up to stripes that are all needed to
//! get it back.

use zeroize::Zeroizing;

use super::{fill_random, hash::HashAlgorithm};
use crate::Result;

/// Replaces each piece of a digest's length by the digest of its number and itself.
fn diffuse(hash: HashAlgorithm, block: &mut [u8]) {
    let mut digest = Zeroizing::new(Vec::with_capacity(hash.digest_len()));
    for (number, piece) in block.chunks_mut(hash.digest_len()).enumerate() {
        digest.clear();
        hash.digest_into(&[&(number as u32).to_be_bytes(), piece], &mut digest);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

fn xor(block: &mut [u8], other: &[u8]) {
    for (byte, other) in block.iter_mut().zip(other) {
        *byte ^= other;
    }
}

/// Splits a key into `stripes` (at least one) of its length.
pub(super) fn split(hash: HashAlgorithm, key: &[u8], stripes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(vec![0; key.len() * stripes]);
    let mut block = Zeroizing::new(vec![0; key.len()]);
    let (random, last) = out.split_at_mut(key.len() * (stripes - 1));
    fill_random(random)?;
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    xor(&mut block, key);
    last.copy_from_slice(&block);
    Ok(out)
}

/// Gets back the key that [`split`] split; `split_key` is a whole number of stripes.
pub(super) fn merge(hash: HashAlgorithm, split_key: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_len]);
    let last = split_key.len().saturating_sub(key_len);
    for stripe in split_key[..last].chunks_exact(key_len) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    xor(&mut block, &split_key[last..]);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_merges_again_and_needs_every_stripe() {
        for (hash, len) in [
            (HashAlgorithm::Sha256, 64),
            (HashAlgorithm::Sha1, 32),
            (HashAlgorithm::Sha512, 16),
        ] {
            let key: Vec<u8> = (0..len).collect();
            let mut stripes = split(hash, &key, 50).expect("random bytes");
            assert_eq!(*merge(hash, &stripes, key.len()), key, "{hash}");
            stripes[key.len() * 20] ^= 1;
            assert_ne!(*merge(hash, &stripes, key.len()), key, "{hash}");
        }
    }
}
