//! Looking at bytes quickly.

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    all_equal(bytes, 0)
}

/// Whether all bytes have that value.
pub(crate) fn all_equal(bytes: &[u8], value: u8) -> bool {
    // Blocks without a branch inside are what the compiler turns into vector code.
    let mut blocks = bytes.chunks_exact(128);
    blocks.all(|block| block.iter().fold(0, |seen, byte| seen | (byte ^ value)) == 0)
        && bytes
            .chunks_exact(128)
            .remainder()
            .iter()
            .all(|byte| *byte == value)
}

/// The length of the run at the start of `bytes` that is, in units of `unit` bytes, zero
/// throughout or not, and which of the two it is. The last unit may be short.
pub(crate) fn zero_run(bytes: &[u8], unit: usize) -> (usize, bool) {
    let mut units = bytes.chunks(unit.max(1));
    let Some(first) = units.next() else {
        return (0, true);
    };
    let zero = is_zero(first);
    let mut len = first.len();
    for next in units {
        if is_zero(next) != zero {
            break;
        }
        len += next.len();
    }
    (len, zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_odd_byte() {
        for len in [0, 1, 127, 128, 129, 300] {
            assert!(all_equal(&vec![7; len], 7));
            for at in 0..len {
                let mut bytes = vec![0; len];
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
            }
        }
    }

    #[test]
    fn runs_follow_units() {
        let mut bytes = vec![0u8; 40];
        bytes[17] = 1;
        assert_eq!(zero_run(&bytes, 8), (16, true));
        assert_eq!(zero_run(&bytes[16..], 8), (8, false));
        assert_eq!(zero_run(&bytes[24..], 64), (16, true));
        assert_eq!(zero_run(&[], 8), (0, true));
    }
}
