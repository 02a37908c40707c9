//! Secrets.

use std::{fmt, path::Path, sync::Arc};

use zeroize::Zeroizing;

use crate::{Error, Result};

/// The longest secret read from a file, as QEMU's.
const MAX_FILE_LEN: u64 = 512 << 10;

/// A password or key. Its bytes are wiped when the last copy goes, and no message shows them.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// These bytes, all of them.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// The content of a file, all of it: a line end at its end belongs to the secret.
    ///
    /// # Errors
    /// The host's, and [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for more than 512 KiB.
    pub fn from_file(path: &Path) -> Result<Self> {
        use std::io::Read;
        let at = |error: std::io::Error| Error::from(error).operation("read secret").path(path);
        let mut bytes = Zeroizing::new(Vec::new());
        std::fs::File::open(path)
            .map_err(at)?
            .take(MAX_FILE_LEN + 1)
            .read_to_end(&mut bytes)
            .map_err(at)?;
        if bytes.len() as u64 > MAX_FILE_LEN {
            return Err(Error::invalid_argument(format!(
                "secret: longer than {MAX_FILE_LEN} bytes"
            ))
            .path(path));
        }
        Ok(Self(Arc::new(bytes)))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}
