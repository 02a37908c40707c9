//! A password of the Security feature set, as a sidecar keeps it: not in clear.

use std::fmt;

use pbkdf2::pbkdf2_hmac;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Bytes of a password. All of them count.
pub(super) const LEN: usize = 32;

/// Rounds of PBKDF2 for a new password, and the most that a sidecar may ask for.
const ROUNDS: u32 = 20_000;
const MAX_ROUNDS: u32 = 10_000_000;

/// A salted hash (PBKDF2 with HMAC-SHA-256) of a password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Password {
    rounds: u32,
    salt: [u8; 16],
    hash: [u8; 32],
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    /// Fails if the host has no random numbers.
    pub(super) fn new(text: &[u8; LEN]) -> Result<Self, getrandom::Error> {
        let mut salt = [0; 16];
        getrandom::fill(&mut salt)?;
        let mut password = Self {
            rounds: ROUNDS,
            salt,
            hash: [0; 32],
        };
        password.hash = password.derive(text);
        Ok(password)
    }

    fn derive(&self, text: &[u8; LEN]) -> [u8; 32] {
        let mut hash = [0; 32];
        pbkdf2_hmac::<Sha256>(text, &self.salt, self.rounds, &mut hash);
        hash
    }

    pub(super) fn is(&self, text: &[u8; LEN]) -> bool {
        self.hash.ct_eq(&self.derive(text)).into()
    }

    /// Whether it can be one of ours: it is read from a file.
    pub(super) fn check(&self) -> Result<(), String> {
        if (1..=MAX_ROUNDS).contains(&self.rounds) {
            return Ok(());
        }
        Err(format!(
            "rounds of a password are {}, expected 1 to {MAX_ROUNDS}",
            self.rounds
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_known_again_and_not_written_in_clear() {
        let (text, mut other) = ([b'x'; LEN], [b'x'; LEN]);
        other[LEN - 1] = b'y';
        let password = Password::new(&text).unwrap();
        assert!(password.is(&text) && !password.is(&other));
        let kept = serde_json::to_string(&password).unwrap();
        assert_eq!(serde_json::from_str::<Password>(&kept).unwrap(), password);
        assert_ne!(Password::new(&text).unwrap().hash, password.hash, "salted");
        assert_eq!(format!("{password:?}"), "Password");
    }
}
