//! Sizes in and out: `4k`, `1.5G`, `0x1000` in; `4 KiB` out, in the two ways QEMU's tools print.

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// Not a number, or followed by something that is no suffix.
    NotANumber,
    /// A number that does not fit.
    TooLarge,
}

/// What a number without a suffix counts.
const SUFFIXES: &[(char, u32)] = &[
    ('b', 0),
    ('k', 10),
    ('m', 20),
    ('g', 30),
    ('t', 40),
    ('p', 50),
    ('e', 60),
];

/// Reads a size: decimal, with a fraction where a suffix follows, or hexadecimal; with an optional
/// suffix k, M, G, T, P or E (powers of 1024; case does not matter), or `b` for bytes.
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let digits = hex.trim_end_matches(|c: char| !c.is_ascii_hexdigit());
        return scale(parse_digits(digits, 16)?, None, &hex[digits.len()..]);
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (whole, rest) = text.split_at(end);
    if let Some(after) = rest.strip_prefix('.') {
        let end = after
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(after.len());
        let (fraction, suffix) = after.split_at(end);
        if whole.is_empty() && fraction.is_empty() {
            return Err(SizeError::NotANumber);
        }
        let whole = if whole.is_empty() {
            0
        } else {
            parse_digits(whole, 10)?
        };
        return scale(whole, Some(fraction), suffix);
    }
    scale(parse_digits(whole, 10)?, None, rest)
}

fn parse_digits(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() {
        return Err(SizeError::NotANumber);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::TooLarge)
}

fn scale(whole: u64, fraction: Option<&str>, suffix: &str) -> Result<u64, SizeError> {
    let mut chars = suffix.chars();
    let shift = match chars.next() {
        None => 0,
        Some(c) => {
            SUFFIXES
                .iter()
                .find(|(name, _)| *name == c.to_ascii_lowercase())
                .ok_or(SizeError::NotANumber)?
                .1
        }
    };
    if chars.next().is_some() {
        return Err(SizeError::NotANumber);
    }
    let unit = 1u64 << shift;
    let mut part = 0;
    if let Some(digits) = fraction.filter(|digits| digits.chars().any(|c| c != '0')) {
        if shift == 0 {
            return Err(SizeError::NotANumber);
        }
        // More digits than a double holds do not matter.
        let value: f64 = format!("0.{digits}")
            .parse()
            .map_err(|_| SizeError::NotANumber)?;
        part = (value * unit as f64) as u64;
    }
    whole
        .checked_mul(unit)
        .and_then(|bytes| bytes.checked_add(part))
        .ok_or(SizeError::TooLarge)
}

/// A size as `qemu-img` prints it: three significant digits, `1.5 KiB`, `196 KiB`, `512 B`.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// A number below 1000 with three significant digits and no trailing zeroes.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 || v == 0.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A size as `qemu-io` prints it: three decimals unless they are zero, `64 KiB`, `1.001 MiB`,
/// `512 bytes`.
pub(crate) fn io_human(value: f64) -> String {
    const UNITS: [(&str, u32); 6] = [
        ("EiB", 60),
        ("PiB", 50),
        ("TiB", 40),
        ("GiB", 30),
        ("MiB", 20),
        ("KiB", 10),
    ];
    for (name, shift) in UNITS {
        let unit = (1u64 << shift) as f64;
        if value >= unit {
            let text = format!("{:.3}", value / unit);
            return format!("{} {name}", text.strip_suffix(".000").unwrap_or(&text));
        }
    }
    let text = format!("{value:.6}");
    format!("{} bytes", text.strip_suffix(".000000").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("1.5k", 1536),
            ("1.25M", 1_310_720),
            (".5G", 512 << 20),
            ("64b", 64),
            ("0x1000", 4096),
            ("2E", 2 << 60),
            ("1.0", 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "k", "x", "10X", "1kk", "1.5", "-1", "1 k", ".", "0x", "4kB",
        ] {
            assert_eq!(parse(text), Err(SizeError::NotANumber), "{text}");
        }
        for text in ["16E", "18446744073709551616", "99999999999E"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_as_qemu_img_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (200_704, "196 KiB"),
            (1_085_440, "1.04 MiB"),
            (1023 << 10, "0.999 MiB"),
            (5 << 40, "5 TiB"),
            (1 << 60, "1 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn sizes_are_printed_as_qemu_io_prints_them() {
        for (value, text) in [
            (0.0, "0 bytes"),
            (512.0, "512 bytes"),
            (65536.0, "64 KiB"),
            (1_049_600.0, "1.001 MiB"),
            (64000.0, "62.500 KiB"),
            (38.651_666, "38.651666 bytes"),
        ] {
            assert_eq!(io_human(value), text);
        }
    }
}
