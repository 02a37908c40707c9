//! READ TOC/PMA/ATIP (MMC-6, 6.25): one session with one data track.

use super::{Cdb, MmcDrive, Reply, Sense, be16, drive::cut, raw::minutes};

/// Data track, Q sub-channel with position.
const DATA_TRACK: u8 = 0x14;
const LEAD_OUT: u8 = 0xaa;

impl MmcDrive {
    pub(super) fn read_toc(&mut self, cdb: &Cdb) -> Reply {
        let Some(blocks) = self.blocks() else {
            return self.no_medium();
        };
        let msf = cdb[1] & 2 != 0;
        // Older drivers have the format in the upper bits of the last byte.
        let format = match cdb[2] & 0xf {
            0 => cdb[9] >> 6,
            format => format,
        };
        let address = |lba: u32| if msf { minutes(lba) } else { lba.to_be_bytes() };
        let data = match format {
            0 if cdb[6] <= 1 || cdb[6] == LEAD_OUT => {
                let mut data = vec![0, 0, 1, 1];
                if cdb[6] <= 1 {
                    data.extend_from_slice(&[0, DATA_TRACK, 1, 0]);
                    data.extend_from_slice(&address(0));
                }
                data.extend_from_slice(&[0, DATA_TRACK, LEAD_OUT, 0]);
                data.extend_from_slice(&address(blocks));
                data
            }
            1 => {
                let mut data = vec![0, 0, 1, 1, 0, DATA_TRACK, 1, 0];
                data.extend_from_slice(&address(0));
                data
            }
            2 if cdb[6] <= 1 => full(blocks),
            _ => return self.check(Sense::INVALID_FIELD),
        };
        let mut data = data;
        let len = (data.len() - 2) as u16;
        data[..2].copy_from_slice(&len.to_be_bytes());
        cut(data, usize::from(be16(cdb, 7)))
    }
}

/// The whole TOC, as it lies in the lead-in: first track, last track, lead-out, the track.
fn full(blocks: u32) -> Vec<u8> {
    let mut data = vec![0, 0, 1, 1];
    let [_, m, s, f] = minutes(blocks);
    let [_, m1, s1, f1] = minutes(0);
    for (point, at) in [
        (0xa0, [1, 0, 0]),
        (0xa1, [1, 0, 0]),
        (0xa2, [m, s, f]),
        (1, [m1, s1, f1]),
    ] {
        data.extend_from_slice(&[1, DATA_TRACK, 0, point, 0, 0, 0, 0]);
        data.extend_from_slice(&at);
    }
    data
}
