//! Counts of 1 to 64 bits in the bytes of a block.

/// Reads a count of `1 << order` bits.
pub(in crate::formats::qcow2) fn read_count(bytes: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    if order < 3 {
        let width = 1usize << order;
        let bit = index * width;
        let mask = (1u16 << width) - 1;
        return u64::from(u16::from(bytes[bit / 8]) >> (bit % 8) & mask);
    }
    let width = 1usize << (order - 3);
    bytes[index * width..(index + 1) * width]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes a count of `1 << order` bits.
pub(in crate::formats::qcow2) fn write_count(bytes: &mut [u8], order: u32, index: u64, count: u64) {
    let index = index as usize;
    if order < 3 {
        let width = 1usize << order;
        let bit = index * width;
        let mask = ((1u16 << width) - 1) as u8;
        let byte = &mut bytes[bit / 8];
        *byte = *byte & !(mask << (bit % 8)) | (count as u8 & mask) << (bit % 8);
        return;
    }
    let width = 1usize << (order - 3);
    let value = count.to_be_bytes();
    bytes[index * width..(index + 1) * width].copy_from_slice(&value[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_round_trip() {
        for order in 0..=6 {
            let bits = 1u32 << order;
            let max = if bits == 64 {
                u64::MAX
            } else {
                (1 << bits) - 1
            };
            let mut bytes = vec![0; 64];
            let places = 512 / u64::from(bits);
            for index in 0..places {
                write_count(&mut bytes, order, index, max);
                assert_eq!(read_count(&bytes, order, index), max, "{order} {index}");
                write_count(&mut bytes, order, index, index & max);
            }
            for index in 0..places {
                assert_eq!(
                    read_count(&bytes, order, index),
                    index & max,
                    "{order} {index}"
                );
            }
        }
    }
}
