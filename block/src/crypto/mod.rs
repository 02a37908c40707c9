//! Ciphers, hashes and key handling of encrypted images: bytes in, bytes out, no I/O.
//!
//! * `secret`: a password or key that shows itself to nobody and is wiped when it goes.
//! * [`cipher`]: which ciphers, modes and IV generators there are. `sector`: the cipher of a disk,
//!   which works on whole sectors.
//! * [`hash`]: hashes, PBKDF2 and how long it takes.
//! * `af`: the anti-forensic splitter of LUKS1.
//! * [`luks`]: the LUKS1 header and its key slots. `keys`: what can be done to those.

mod af;
pub mod cipher;
pub mod hash;
mod keys;
pub mod luks;
mod secret;
mod sector;

pub use keys::KeyChange;
pub(crate) use keys::Unlock;
pub use secret::Secret;
pub use sector::{SECTOR_SIZE, SectorCipher};

use crate::{Error, ErrorKind, Result};

/// Fills a buffer from the host's source of random bytes.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        Error::with_message(
            ErrorKind::Io(error.raw_os_error().unwrap_or(libc::EIO)),
            format!("no random bytes from the host: {error}"),
        )
    })
}
