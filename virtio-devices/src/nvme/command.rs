//! Submission and completion entries.

/// Bytes of a submission queue entry.
pub(super) const SQE: u64 = 64;
/// Bytes of a completion queue entry.
pub(super) const CQE: u64 = 16;

/// A submission queue entry, copied from guest memory once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Command {
    pub(super) opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub(super) flags: u8,
    pub(super) cid: u16,
    pub(super) nsid: u32,
    /// The data pointer: PRP 1 and 2, or one SGL descriptor.
    pub(super) dptr: [u64; 2],
    /// Command dwords 10 to 15.
    pub(super) cdw: [u32; 6],
}

impl Command {
    /// Of an entry as it is in memory.
    pub(super) fn parse(entry: [u64; SQE as usize / 8]) -> Self {
        let entry = entry.map(u64::from_le);
        let first = entry[0];
        let (low, high) = (
            |at: usize| entry[at] as u32,
            |at: usize| (entry[at] >> 32) as u32,
        );
        Self {
            opcode: first as u8,
            flags: (first >> 8) as u8,
            cid: (first >> 16) as u16,
            nsid: high(0),
            dptr: [entry[3], entry[4]],
            cdw: [low(5), high(5), low(6), high(6), low(7), high(7)],
        }
    }

    pub(super) fn cdw10(&self) -> u32 {
        self.cdw[0]
    }

    pub(super) fn cdw11(&self) -> u32 {
        self.cdw[1]
    }

    pub(super) fn cdw12(&self) -> u32 {
        self.cdw[2]
    }

    pub(super) fn cdw13(&self) -> u32 {
        self.cdw[3]
    }

    pub(super) fn cdw14(&self) -> u32 {
        self.cdw[4]
    }

    /// FUSE: 0 normal, 1 first, 2 second.
    pub(super) fn fuse(&self) -> u8 {
        self.flags & 3
    }

    /// PSDT: 0 PRPs, 1 and 2 SGLs.
    pub(super) fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// SLBA of the NVM commands that have one.
    pub(super) fn slba(&self) -> u64 {
        u64::from(self.cdw[1]) << 32 | u64::from(self.cdw[0])
    }

    /// NLB of the NVM commands that have one, as a count.
    pub(super) fn blocks(&self) -> u64 {
        u64::from(self.cdw[2] & 0xffff) + 1
    }
}

/// The dword at byte `at`; 0 beyond the end.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(from) = bytes.get(at..).and_then(|rest| rest.get(..4)) {
        value.copy_from_slice(from);
    }
    u32::from_le_bytes(value)
}

/// The quadword at byte `at`; 0 beyond the end.
pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// Sets `bytes` at `at`, as far as they fit.
pub(super) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = page
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..bytes.len()))
    {
        to.copy_from_slice(bytes);
    }
}

/// Sets an ASCII field, padded with spaces.
pub(super) fn put_text(page: &mut [u8], at: usize, len: usize, text: &str) {
    let mut field = vec![b' '; len];
    let take = text.len().min(len);
    field[..take].copy_from_slice(&text.as_bytes()[..take]);
    put(page, at, &field);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = |from: u8| u64::from_ne_bytes(std::array::from_fn(|at| from + at as u8));
        let command = Command::parse(std::array::from_fn(|at| bytes(at as u8 * 8)));
        assert_eq!((command.opcode, command.flags, command.cid), (0, 1, 0x0302));
        assert_eq!(command.nsid, 0x0706_0504);
        assert_eq!(command.dptr[1], 0x2726_2524_2322_2120);
        assert_eq!(command.cdw14(), 0x3b3a_3938);
        assert_eq!(command.slba(), 0x2f2e_2d2c_2b2a_2928);
        assert_eq!(command.blocks(), 0x3130 + 1);
    }

    #[test]
    fn reading_beyond_the_end_gives_zero() {
        assert_eq!(le32(&[1, 2, 3], 0), 0);
        assert_eq!(le64(&[0xff; 8], 4), 0xffff_ffff);
        assert_eq!(le32(&[], usize::MAX - 8), 0);
    }
}
