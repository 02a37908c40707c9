//! What a namespace has to remember beside its image.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{identity::Identity, reservation::SavedReservations, sanitize::SavedSanitize};
use crate::host;

/// The version of the file that is written here.
const VERSION: u32 = 1;

/// The content of a sidecar file. It is untrusted when it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Content {
    pub(super) version: u32,
    /// Bytes of a logical block; 0: as configured.
    #[serde(default)]
    pub(super) lba_size: u32,
    /// Blocks marked uncorrectable: first byte and length.
    #[serde(default)]
    pub(super) uncorrectable: Vec<(u64, u64)>,
    #[serde(default)]
    pub(super) reservations: Option<SavedReservations>,
    #[serde(default)]
    pub(super) sanitize: Option<SavedSanitize>,
    /// Of a namespace in the pool: what names it for ever.
    #[serde(default)]
    pub(super) identity: Option<Identity>,
    /// Of a namespace in the pool: the controllers that it is attached to.
    #[serde(default)]
    pub(super) attached: BTreeSet<u16>,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            version: VERSION,
            lba_size: 0,
            uncorrectable: Vec::new(),
            reservations: None,
            sanitize: None,
            identity: None,
            attached: BTreeSet::new(),
        }
    }
}

impl host::Content for Content {
    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "version is {}, this is version {VERSION}",
                self.version
            ));
        }
        if !matches!(self.lba_size, 0 | 512 | 4096) {
            return Err(format!(
                "lba_size is {}, expected 512 or 4096",
                self.lba_size
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::Sidecar;

    #[test]
    fn what_was_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.nvme");
        let (sidecar, mut content) = Sidecar::<Content>::open(&path).unwrap();
        content.lba_size = 4096;
        content.uncorrectable = vec![(0, 4096)];
        sidecar.write(|| content.clone()).unwrap();
        assert_eq!(Sidecar::<Content>::open(&path).unwrap().1, content);
    }

    #[test]
    fn a_file_that_is_not_ours_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.nvme");
        for text in [
            "",
            "[]",
            r#"{"version":9}"#,
            r#"{"version":1,"lba_size":513}"#,
        ] {
            fs::write(&path, text).unwrap();
            let error = Sidecar::<Content>::open(&path).unwrap_err().to_string();
            assert!(error.contains("a.nvme"), "{error}");
        }
    }
}
