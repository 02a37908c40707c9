//! What names a namespace.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::identity::fnv;

/// What names a namespace for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) nguid: [u8; 16],
    pub(super) eui64: [u8; 8],
    pub(super) uuid: [u8; 16],
}

impl Identity {
    /// What was configured, if anything was.
    pub(super) fn configured(
        nguid: Option<[u8; 16]>,
        eui64: Option<[u8; 8]>,
        uuid: Option<[u8; 16]>,
    ) -> Option<Self> {
        let any = nguid.is_some() || eui64.is_some() || uuid.is_some();
        any.then(|| Self {
            nguid: nguid.unwrap_or_default(),
            eui64: eui64.unwrap_or_default(),
            uuid: uuid.unwrap_or_default(),
        })
    }

    /// The same for the same `seed`.
    pub(super) fn of(seed: &str) -> Self {
        let mut nguid = [0; 16];
        nguid[..8].copy_from_slice(&fnv(seed, 1).to_be_bytes());
        nguid[8..].copy_from_slice(&fnv(seed, 2).to_be_bytes());
        let mut uuid = nguid;
        // Version 8 (made by us), variant 1.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self {
            nguid,
            eui64: [0; 8],
            uuid,
        }
    }

    /// One that there was never before: a namespace that is created anew in the place of a deleted one
    /// is another one.
    pub(super) fn fresh(seed: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanoseconds = now.map_or(0, |now| now.as_nanos());
        Self::of(&format!("{seed} {nanoseconds}"))
    }
}
