//! The area after the fixed fields: header extensions and the backing file name.

use super::{
    Extension, ExtensionType, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, V2_HEADER_LENGTH, bad_field,
    be32, be64,
};
use crate::Result;

/// How many bytes of the image the header area takes, as far as `bytes` can tell.
pub(super) fn needed_bytes(bytes: &[u8]) -> usize {
    let cluster_bits = be32(bytes, 20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return 0;
    }
    let cluster_size = 1usize << cluster_bits;
    let version = be32(bytes, 4);
    let mut at = if version == 2 {
        V2_HEADER_LENGTH as usize
    } else {
        be32(bytes, 100) as usize
    };
    let backing_offset = be64(bytes, 8);
    if backing_offset != 0 {
        let end = backing_offset.saturating_add(u64::from(be32(bytes, 16)));
        if end > bytes.len() as u64 {
            return cluster_size;
        }
    }
    while at.saturating_add(8) <= bytes.len() {
        let kind = be32(bytes, at);
        if kind == ExtensionType::END.0 {
            return 0;
        }
        at = at
            .saturating_add(8)
            .saturating_add((be32(bytes, at + 4) as usize).next_multiple_of(8));
        if backing_offset != 0 && at as u64 >= backing_offset {
            return 0;
        }
    }
    cluster_size
}

/// Where what the first sector names ends: the extensions, or the backing file name. `None` where they
/// cannot be followed.
pub(super) fn referenced_end(bytes: &[u8]) -> Option<usize> {
    let cluster_bits = be32(bytes, 20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return None;
    }
    let start = if be32(bytes, 4) == 2 {
        V2_HEADER_LENGTH as usize
    } else {
        be32(bytes, 100) as usize
    };
    let name_at = usize::try_from(be64(bytes, 8)).ok()?;
    let end = if name_at == 0 {
        1 << cluster_bits
    } else {
        name_at
    };
    let (_, stop) = parse_extensions(bytes, start, end).ok()?;
    let name_end = name_at.checked_add(be32(bytes, 16) as usize)?;
    Some(if name_at == 0 {
        stop
    } else {
        stop.max(name_end)
    })
}

/// The extensions between `at` and `end`, and where the area stops.
pub(super) fn parse_extensions(
    bytes: &[u8],
    mut at: usize,
    end: usize,
) -> Result<(Vec<Extension>, usize)> {
    let mut extensions: Vec<Extension> = Vec::new();
    while at < end {
        let too_large = |len: u64| {
            bad_field(
                "Header extension too large",
                "header extension length",
                len,
                format_args!("to end at or before {end:#x}"),
            )
        };
        if end - at < 8 {
            return Err(too_large(8));
        }
        let kind = ExtensionType(be32(bytes, at));
        let len = be32(bytes, at + 4);
        at += 8;
        if len as usize > end - at {
            return Err(too_large(u64::from(len)));
        }
        if kind == ExtensionType::END {
            break;
        }
        // QEMU has written a second backing format where its own tools added one; the last one counts.
        let may_repeat = kind == ExtensionType::BACKING_FORMAT;
        if kind.is_known() && !may_repeat && extensions.iter().any(|known| known.kind == kind) {
            return Err(bad_field(
                "Header extension appears twice",
                "header extension type",
                format_args!("{:#x}", kind.0),
                "at most one",
            ));
        }
        // The last extension may lack its padding when the area ends with it.
        let rounded = (len as usize).next_multiple_of(8).min(end - at);
        extensions.push(Extension {
            kind,
            data: padded(bytes, at, at + len as usize),
            padding: padded(bytes, at + len as usize, at + rounded),
        });
        at += rounded;
    }
    Ok((extensions, at))
}

/// The bytes from `start` to `end`, which lie in the first cluster, with zeroes where `bytes` ends
/// before: an image may be shorter than its first cluster.
pub(super) fn padded(bytes: &[u8], start: usize, end: usize) -> Vec<u8> {
    let have = bytes.get(start..).unwrap_or_default();
    let len = end - start;
    let mut out = have[..have.len().min(len)].to_vec();
    out.resize(len, 0);
    out
}
