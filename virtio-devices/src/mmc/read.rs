//! READ (10), READ (12), READ CD, SEEK (10).

use super::{Cdb, Fields, MmcDrive, Reply, Sense, be16, be32, opcode};

impl MmcDrive {
    /// READ (10) and READ (12).
    pub(super) fn read(&mut self, cdb: &Cdb) -> Reply {
        let blocks = if cdb[0] == opcode::READ_10 {
            u32::from(be16(cdb, 7))
        } else {
            be32(cdb, 6)
        };
        let lba = be32(cdb, 2);
        self.sectors(lba, blocks, || Reply::Read { lba, blocks })
    }

    /// Checks a run of sectors. None at all is no error.
    fn sectors(&mut self, lba: u32, blocks: u32, reply: impl FnOnce() -> Reply) -> Reply {
        let Some(size) = self.blocks() else {
            return self.no_medium();
        };
        match lba.checked_add(blocks) {
            Some(end) if end <= size => {
                if blocks == 0 {
                    Reply::Good
                } else {
                    reply()
                }
            }
            _ => self.check(Sense::OUT_OF_RANGE),
        }
    }

    /// READ CD: the fields of the packet's byte 9, of sectors in mode 1.
    pub(super) fn read_cd(&mut self, cdb: &Cdb) -> Reply {
        let (lba, blocks) = (be32(cdb, 2), be32(cdb, 5) & 0xff_ffff);
        if blocks > 0 && !matches!(cdb[1] >> 2 & 7, 0 | 2) {
            return self.check(Sense::ILLEGAL_MODE);
        }
        // Sub-channel data and error flags are not offered.
        if cdb[10] & 7 != 0 || cdb[9] & 6 != 0 {
            return self.check(Sense::INVALID_FIELD);
        }
        let Some(fields) = Fields::from_byte(cdb[9]) else {
            return self.check(Sense::INVALID_FIELD);
        };
        self.sectors(lba, blocks, || {
            if fields.len() == 0 {
                Reply::Good
            } else if fields.is_user_data() {
                Reply::Read { lba, blocks }
            } else {
                Reply::ReadRaw {
                    lba,
                    blocks,
                    fields,
                }
            }
        })
    }

    /// SEEK (10): only the address is looked at.
    pub(super) fn seek(&mut self, cdb: &Cdb) -> Reply {
        self.sectors(be32(cdb, 2), 1, || Reply::Good)
    }
}
