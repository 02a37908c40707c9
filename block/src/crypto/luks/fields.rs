//! The fields of a header, as the specification places them.

use std::fmt::Display;

use super::{KEY_SLOTS, KeySlot, SALT_LEN, SLOT_DISABLED, SLOT_ENABLED};
use crate::{
    Error, Result,
    crypto::{
        SECTOR_SIZE,
        cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator},
        hash::HashAlgorithm,
    },
};

// Where the fields of the header are.
pub(super) const VERSION: usize = 6;
pub(super) const CIPHER_NAME: usize = 8;
pub(super) const CIPHER_MODE: usize = 40;
pub(super) const HASH_SPEC: usize = 72;
pub(super) const NAME_LEN: usize = 32;
pub(super) const PAYLOAD_OFFSET: usize = 104;
pub(super) const KEY_BYTES: usize = 108;
pub(super) const MK_DIGEST: usize = 112;
pub(super) const MK_SALT: usize = 132;
pub(super) const MK_ITERATIONS: usize = 164;
pub(super) const UUID: usize = 168;
pub(super) const UUID_LEN: usize = 40;
pub(super) const SLOTS: usize = 208;
pub(super) const SLOT_LEN: usize = 48;

pub(super) fn bad_field(
    text: &str,
    field: &str,
    value: impl Display,
    expected: impl Display,
) -> Error {
    Error::invalid_image(format!(
        "{text} (field {field}: value {value}, expected {expected})"
    ))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A text field, which must end with a null byte.
pub(super) fn text<'a>(bytes: &'a [u8], at: usize, field: &str) -> Result<&'a str> {
    let bytes = &bytes[at..at + NAME_LEN];
    let end = bytes.iter().position(|byte| *byte == 0);
    let end = end.ok_or_else(|| {
        bad_field(
            &format!(
                "LUKS header {} is not NUL terminated",
                field.replace('-', " ")
            ),
            field,
            String::from_utf8_lossy(bytes).escape_debug(),
            format_args!("at most {} bytes", NAME_LEN - 1),
        )
    })?;
    std::str::from_utf8(&bytes[..end]).map_err(|_| {
        bad_field(
            "LUKS header has a name that is no text",
            field,
            String::from_utf8_lossy(&bytes[..end]).escape_debug(),
            "UTF-8",
        )
    })
}

pub(super) fn parse_hash(name: &str) -> Result<HashAlgorithm> {
    HashAlgorithm::from_name(name).ok_or_else(|| {
        Error::unsupported(format!(
            "Hash algorithm '{name}' is not supported (field hash-spec: value {name}, expected one \
             of {})",
            HashAlgorithm::ALL.map(HashAlgorithm::name).join(", ")
        ))
    })
}

/// `cipher-mode` is `MODE-IV[:HASH]`.
pub(super) fn parse_spec(name: &str, mode_spec: &str, key_bytes: u32) -> Result<CipherSpec> {
    let Some((mode_name, iv)) = mode_spec.split_once('-') else {
        return Err(bad_field(
            &format!("Unexpected cipher mode string format '{mode_spec}'"),
            "cipher-mode",
            mode_spec,
            "MODE-IV[:HASH]",
        ));
    };
    let (iv_name, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(parse_hash(hash)?)),
        None => (iv, None),
    };
    let unsupported = |what: &str, name: &str| {
        Error::unsupported(format!(
            "{what} '{name}' is not supported (field cipher-mode: value {mode_spec})"
        ))
    };
    let mode =
        CipherMode::from_name(mode_name).ok_or_else(|| unsupported("Cipher mode", mode_name))?;
    let iv = IvGenerator::from_name(iv_name).ok_or_else(|| unsupported("IV generator", iv_name))?;
    let key_len = key_bytes as usize;
    let one_key = match mode {
        CipherMode::Xts if key_len.is_multiple_of(2) => key_len / 2,
        CipherMode::Xts => 0,
        CipherMode::Cbc | CipherMode::Ecb => key_len,
    };
    let algorithm = CipherAlgorithm::from_luks(name, one_key).ok_or_else(|| {
        Error::unsupported(format!(
            "Algorithm '{name}' with key size {one_key} bytes not supported (fields cipher-name, \
             key-bytes: values {name}, {key_bytes})"
        ))
    })?;
    let spec = CipherSpec {
        algorithm,
        mode,
        iv,
        iv_hash,
    };
    spec.check()?;
    Ok(spec)
}

pub(super) fn parse_slots(bytes: &[u8]) -> Result<[KeySlot; KEY_SLOTS]> {
    let mut slots = [KeySlot {
        active: false,
        iterations: 0,
        key_offset: 0,
        stripes: 0,
        salt: [0; SALT_LEN],
    }; KEY_SLOTS];
    for (index, slot) in slots.iter_mut().enumerate() {
        let at = SLOTS + index * SLOT_LEN;
        let state = be32(bytes, at);
        if state != SLOT_ENABLED && state != SLOT_DISABLED {
            return Err(bad_field(
                &format!("Keyslot {index} state (active/disable) is corrupted"),
                &format!("key-slot-{index} active"),
                format_args!("{state:#x}"),
                format_args!("{SLOT_ENABLED:#x} or {SLOT_DISABLED:#x}"),
            ));
        }
        *slot = KeySlot {
            active: state == SLOT_ENABLED,
            iterations: be32(bytes, at + 4),
            key_offset: u64::from(be32(bytes, at + 40)) * SECTOR_SIZE,
            stripes: be32(bytes, at + 44),
            salt: array(bytes, at + 8),
        };
    }
    Ok(slots)
}
