//! The data of a migration: a header, the configuration space, the state of the device model.
//!
//! | bytes | |
//! | --- | --- |
//! | 0 to 7 | `PLTRVFIO` |
//! | 8 to 11 | version, 1 |
//! | 12 to 15 | the PCI class code of the device |
//! | 16 to 19 | bytes of the configuration space |
//! | 20 to 23 | bytes of the state, which is JSON |
//!
//! All numbers are little-endian. Whatever comes in was made by somebody else.

const MAGIC: [u8; 8] = *b"PLTRVFIO";
const VERSION: u32 = 1;
/// Bytes of the header.
const HEADER: usize = 24;
/// The most bytes of a configuration space.
const MAX_CONFIG: usize = 4096;
/// The most bytes of all: what the fullest queues of the largest controller take fits well.
pub(super) const MAX_BYTES: usize = 64 << 20;
const MAX_DEVICE: usize = MAX_BYTES - HEADER - MAX_CONFIG;

/// What a complete stream has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts<'a> {
    pub(super) config: &'a [u8],
    pub(super) device: &'a [u8],
}

fn class_code(class: [u8; 3]) -> u32 {
    u32::from_be_bytes([0, class[0], class[1], class[2]])
}

/// The stream of a device; `None` if it is too large.
pub(super) fn encode(class: [u8; 3], config: &[u8], device: &[u8]) -> Option<Vec<u8>> {
    if config.len() > MAX_CONFIG || device.len() > MAX_DEVICE {
        return None;
    }
    let mut stream = Vec::with_capacity(HEADER + config.len() + device.len());
    stream.extend_from_slice(&MAGIC);
    let lengths = [config.len() as u32, device.len() as u32];
    for word in [VERSION, class_code(class)].into_iter().chain(lengths) {
        stream.extend_from_slice(&word.to_le_bytes());
    }
    stream.extend_from_slice(config);
    stream.extend_from_slice(device);
    Some(stream)
}

/// The bytes of the configuration space and of the state, once the header is there.
fn lengths(class: [u8; 3], stream: &[u8]) -> Result<Option<(usize, usize)>, String> {
    let Some(header) = stream.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if header[..8] != MAGIC {
        return Err("it is no state of a device".to_owned());
    }
    if word(8) != VERSION {
        return Err(format!("version is {}, this is version {VERSION}", word(8)));
    }
    if word(12) != class_code(class) {
        return Err(format!(
            "it is of a device of class {:06x}, this one is of class {:06x}",
            word(12),
            class_code(class)
        ));
    }
    let (config, device) = (word(16) as usize, word(20) as usize);
    if config > MAX_CONFIG || device > MAX_DEVICE {
        return Err(format!("it says that it has {config} and {device} bytes"));
    }
    Ok(Some((config, device)))
}

/// How many bytes the stream has in all, once enough of it is there.
///
/// # Errors
/// Why it is not for this device.
pub(super) fn total(class: [u8; 3], stream: &[u8]) -> Result<Option<usize>, String> {
    let lengths = lengths(class, stream)?;
    Ok(lengths.map(|(config, device)| HEADER + config + device))
}

/// Takes a stream apart.
///
/// # Errors
/// Why it is not a whole one for this device.
pub(super) fn decode(class: [u8; 3], stream: &[u8]) -> Result<Parts<'_>, String> {
    let lengths = lengths(class, stream)?;
    let found = lengths.and_then(|(config, device)| {
        let (config, rest) = stream[HEADER..].split_at_checked(config)?;
        (rest.len() == device).then_some(Parts {
            config,
            device: rest,
        })
    });
    found.ok_or_else(|| format!("it ends after {} bytes", stream.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: [u8; 3] = [1, 8, 2];

    #[test]
    fn what_was_put_together_is_taken_apart() {
        let stream = encode(CLASS, &[1; 256], b"{}").unwrap();
        let parts = decode(CLASS, &stream).unwrap();
        assert_eq!((parts.config, parts.device), (&[1; 256][..], &b"{}"[..]));
        assert_eq!(total(CLASS, &stream), Ok(Some(stream.len())));
        assert_eq!(total(CLASS, &stream[..HEADER - 1]), Ok(None));
    }

    #[test]
    fn anything_else_is_an_error() {
        let stream = encode(CLASS, &[1; 16], b"{}").unwrap();
        for len in 0..stream.len() {
            assert!(decode(CLASS, &stream[..len]).is_err(), "{len}");
        }
        let mut longer = stream.clone();
        longer.push(0);
        assert!(decode(CLASS, &longer).is_err());
        assert!(decode([1, 6, 1], &stream).is_err());
        for (at, value) in [(0, 0), (8, 2), (12, 0), (18, 1), (23, 255)] {
            let mut other = stream.clone();
            other[at] = value;
            assert!(decode(CLASS, &other).is_err(), "{at}");
            assert!(total(CLASS, &other).is_err(), "{at}");
        }
        assert_eq!(encode(CLASS, &[], &vec![0; MAX_BYTES]), None);
    }
}
