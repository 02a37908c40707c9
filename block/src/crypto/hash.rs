//! Hashes, PBKDF2, and how many iterations take how long.

use std::{fmt, time::Duration};

use md5::Md5;
use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use sm3::Sm3;

/// A hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HashAlgorithm {
    /// MD5.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// Evaluates an expression with `$digest` as the type of a hash.
macro_rules! with_digest {
    ($hash:expr, $digest:ident => $work:expr) => {
        match $hash {
            HashAlgorithm::Md5 => {
                type $digest = Md5;
                $work
            }
            HashAlgorithm::Sha1 => {
                type $digest = Sha1;
                $work
            }
            HashAlgorithm::Sha224 => {
                type $digest = Sha224;
                $work
            }
            HashAlgorithm::Sha256 => {
                type $digest = Sha256;
                $work
            }
            HashAlgorithm::Sha384 => {
                type $digest = Sha384;
                $work
            }
            HashAlgorithm::Sha512 => {
                type $digest = Sha512;
                $work
            }
            HashAlgorithm::Ripemd160 => {
                type $digest = Ripemd160;
                $work
            }
            HashAlgorithm::Sm3 => {
                type $digest = Sm3;
                $work
            }
        }
    };
}

impl HashAlgorithm {
    /// Every hash.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// The hash of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// Bytes of a digest.
    #[must_use]
    pub fn digest_len(self) -> usize {
        with_digest!(self, D => <D as Digest>::output_size())
    }

    /// Appends the digest of several parts, one after the other.
    pub(super) fn digest_into(self, parts: &[&[u8]], out: &mut Vec<u8>) {
        with_digest!(self, D => {
            let mut digest = D::new();
            for part in parts {
                digest.update(part);
            }
            out.extend_from_slice(&digest.finalize());
        });
    }

    /// PBKDF2 with HMAC: derives as many bytes as `out` has.
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        with_digest!(self, D => pbkdf2_hmac::<D>(password, salt, iterations, out));
    }

    /// How many iterations of PBKDF2 derive `len` bytes in `time`, measured by `clock`.
    pub(super) fn iterations_in(self, time: Duration, len: usize, clock: fn() -> Duration) -> u64 {
        let mut out = zeroize::Zeroizing::new(vec![0; len]);
        let mut iterations = 1 << 12;
        // Long enough to mean something, and no longer than what is asked for.
        let enough = time.clamp(Duration::from_millis(5), Duration::from_millis(200));
        loop {
            let before = clock();
            self.pbkdf2(b"password", &[0x5a; 32], iterations, &mut out);
            let took = clock().saturating_sub(before);
            if took >= enough || iterations >= 1 << 28 {
                let took = took.as_nanos().max(1);
                let count = u128::from(iterations) * time.as_nanos() / took;
                return u64::try_from(count).unwrap_or(u64::MAX);
            }
            iterations *= 2;
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 6070 and RFC 7914, section 11.
    #[test]
    fn pbkdf2_vectors() {
        let mut out = [0; 20];
        HashAlgorithm::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
        assert_eq!(hex(&out), "4b007901b765489abead49d926f721d065a429c1");
        let mut out = [0; 64];
        HashAlgorithm::Sha256.pbkdf2(b"passwd", b"salt", 1, &mut out);
        assert_eq!(
            hex(&out),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }

    #[test]
    fn digests_of_abc() {
        for (hash, expected) in [
            (HashAlgorithm::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (
                HashAlgorithm::Sha1,
                "a9993e364706816aba3e25717850c26c9cd0d89d",
            ),
            (
                HashAlgorithm::Ripemd160,
                "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc",
            ),
            (
                HashAlgorithm::Sha256,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                HashAlgorithm::Sm3,
                "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0",
            ),
        ] {
            let mut out = Vec::new();
            hash.digest_into(&[b"a", b"bc"], &mut out);
            assert_eq!(hex(&out), expected, "{hash}");
            assert_eq!(out.len(), hash.digest_len(), "{hash}");
        }
    }

    #[test]
    fn more_time_is_more_iterations() {
        let hash = HashAlgorithm::Sha256;
        let clock = crate::io::thread_time;
        let few = hash.iterations_in(Duration::from_millis(1), 32, clock);
        let many = hash.iterations_in(Duration::from_millis(1000), 32, clock);
        assert!(few > 0 && many > few * 20, "{few} and {many}");
    }
}
