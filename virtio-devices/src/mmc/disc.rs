//! What drive and disc are: INQUIRY, capacities, disc and track information, structures of a DVD,
//! mechanism and performance.

use super::{BLOCK, Cdb, MmcDrive, Reply, Sense, be16, be32, drive::cut};

impl MmcDrive {
    /// INQUIRY (SPC-3, 6.4): standard data, and pages 00h, 80h and 83h.
    pub(super) fn inquiry(&mut self, cdb: &Cdb) -> Reply {
        const CD_DEVICE: u8 = 5;
        let limit = usize::from(be16(cdb, 3));
        let serial = self.config.serial.as_bytes();
        let data = match (cdb[1] & 1 != 0, cdb[2]) {
            (false, 0) => {
                let mut data = vec![CD_DEVICE, 0x80, 0x05, 0x02, 31, 0, 0, 0];
                data.extend(padded(&self.config.vendor, 8));
                data.extend(padded(&self.config.product, 16));
                data.extend(padded(&self.config.revision, 4));
                data
            }
            (true, 0x00) => vec![CD_DEVICE, 0, 0, 3, 0x00, 0x80, 0x83],
            (true, 0x80) => {
                let mut data = vec![CD_DEVICE, 0x80, 0, serial.len() as u8];
                data.extend_from_slice(serial);
                data
            }
            (true, 0x83) => {
                // ASCII, T10 vendor identification of the unit.
                let mut name: Vec<u8> = padded(&self.config.vendor, 8).collect();
                name.extend(padded(&self.config.product, 16));
                name.extend_from_slice(serial);
                let mut data = vec![CD_DEVICE, 0x83, 0, name.len() as u8 + 4];
                data.extend_from_slice(&[2, 1, 0, name.len() as u8]);
                data.extend(name);
                data
            }
            _ => return self.check(Sense::INVALID_FIELD),
        };
        cut(data, limit)
    }

    /// READ CAPACITY: the last sector.
    pub(super) fn read_capacity(&mut self) -> Reply {
        let Some(blocks) = self.blocks() else {
            return self.no_medium();
        };
        let mut data = blocks.saturating_sub(1).to_be_bytes().to_vec();
        data.extend_from_slice(&(BLOCK as u32).to_be_bytes());
        Reply::Data(data)
    }

    /// READ FORMAT CAPACITIES.
    pub(super) fn format_capacities(&mut self, cdb: &Cdb) -> Reply {
        let mut data = vec![0, 0, 0, 8];
        let (blocks, kind) = match self.blocks() {
            Some(blocks) => (blocks, 2),
            // The largest medium that would fit.
            None => (u32::MAX, 3),
        };
        data.extend_from_slice(&blocks.to_be_bytes());
        data.extend_from_slice(&[kind, 0, (BLOCK >> 8) as u8, 0]);
        cut(data, usize::from(be16(cdb, 7)))
    }

    /// READ DISC INFORMATION: one complete session with one track.
    pub(super) fn disc_information(&mut self, cdb: &Cdb) -> Reply {
        if cdb[1] & 7 != 0 {
            return self.check(Sense::INVALID_FIELD);
        }
        if self.blocks().is_none() {
            return self.no_medium();
        }
        let mut data = vec![0; 34];
        data[1] = 32;
        data[2] = 0x0e;
        data[3..7].copy_from_slice(&[1, 1, 1, 1]);
        // Unrestricted use.
        data[7] = 0x20;
        // Nothing can be added.
        data[16..24].fill(0xff);
        cut(data, usize::from(be16(cdb, 7)))
    }

    /// READ TRACK INFORMATION.
    pub(super) fn track_information(&mut self, cdb: &Cdb) -> Reply {
        let Some(blocks) = self.blocks() else {
            return self.no_medium();
        };
        let address = be32(cdb, 2);
        let known = match cdb[1] & 3 {
            0 => address < blocks,
            1 | 2 => address == 1,
            _ => false,
        };
        if !known {
            return self.check(Sense::INVALID_FIELD);
        }
        let mut data = vec![0; 36];
        data[1] = 34;
        data[2] = 1;
        data[3] = 1;
        // A data track, mode 1.
        data[5] = 0x04;
        data[6] = 0x01;
        // The last recorded address is valid.
        data[7] = 0x02;
        data[24..28].copy_from_slice(&blocks.to_be_bytes());
        data[28..32].copy_from_slice(&blocks.saturating_sub(1).to_be_bytes());
        cut(data, usize::from(be16(cdb, 7)))
    }

    /// READ DVD STRUCTURE: physical format, copyright, manufacturer, and the list of them.
    pub(super) fn dvd_structure(&mut self, cdb: &Cdb) -> Reply {
        let Some(blocks) = self.blocks() else {
            return self.no_medium();
        };
        if cdb[1] & 0xf != 0 {
            return self.check(Sense::INVALID_FIELD);
        }
        if self.is_cd() {
            return self.check(Sense::INCOMPATIBLE_MEDIUM);
        }
        let body = match cdb[7] {
            0x00 if cdb[6] == 0 => {
                // The data area starts at 30000h.
                let last = 0x3_0000u32.saturating_add(blocks).saturating_sub(1);
                let mut body = vec![0; 2048];
                // DVD-ROM, part version 1; 120 mm, speed not given; one layer, embossed.
                body[0] = 0x01;
                body[1] = 0x0f;
                body[2] = 0x01;
                body[4..8].copy_from_slice(&0x3_0000u32.to_be_bytes());
                body[8..12].copy_from_slice(&last.to_be_bytes());
                body
            }
            // Not protected.
            0x01 if cdb[6] == 0 => vec![0; 4],
            0x04 if cdb[6] == 0 => vec![0; 2048],
            0xff => {
                let mut body = Vec::new();
                for (code, len) in [(0x00, 2052u16), (0x01, 8), (0x04, 2052), (0xff, 20)] {
                    // Readable.
                    body.extend_from_slice(&[code, 0x40]);
                    body.extend_from_slice(&len.to_be_bytes());
                }
                body
            }
            _ => return self.check(Sense::INVALID_FIELD),
        };
        let mut data = (body.len() as u16 + 2).to_be_bytes().to_vec();
        data.extend_from_slice(&[0, 0]);
        data.extend(body);
        cut(data, usize::from(be16(cdb, 8)))
    }

    /// MECHANISM STATUS: no changer.
    pub(super) fn mechanism_status(&mut self, cdb: &Cdb) -> Reply {
        let door = u8::from(self.state.open) << 4;
        cut(vec![0, door, 0, 0, 0, 0, 0, 0], usize::from(be16(cdb, 8)))
    }

    /// GET PERFORMANCE: the nominal read speed, the same everywhere.
    pub(super) fn get_performance(&mut self, cdb: &Cdb) -> Reply {
        const SPEED: u32 = 21_600;
        let Some(blocks) = self.blocks() else {
            return self.no_medium();
        };
        // Nominal read performance, or exceptions, of which there are none.
        let (nominal, write, kind) = (cdb[1] & 3 == 0, cdb[1] & 4 != 0, cdb[10]);
        if kind != 0 || write {
            return self.check(Sense::INVALID_FIELD);
        }
        let mut data = vec![0; 8];
        if !nominal {
            data[4] = 1;
        } else if be16(cdb, 8) > 0 {
            data.extend_from_slice(&0u32.to_be_bytes());
            data.extend_from_slice(&SPEED.to_be_bytes());
            data.extend_from_slice(&blocks.saturating_sub(1).to_be_bytes());
            data.extend_from_slice(&SPEED.to_be_bytes());
        }
        let len = (data.len() - 4) as u32;
        data[..4].copy_from_slice(&len.to_be_bytes());
        Reply::Data(data)
    }
}

fn padded(text: &str, len: usize) -> impl Iterator<Item = u8> {
    text.bytes().chain(std::iter::repeat(b' ')).take(len)
}
