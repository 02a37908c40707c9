//! MODE SENSE (10) and MODE SELECT (10): pages 01h, 1Ah, 1Dh and 2Ah.

use super::{
    Cdb, MmcDrive, Reply, Sense, be16,
    drive::{Modes, cut},
};

const RECOVERY: u8 = 0x01;
const POWER: u8 = 0x1a;
const TIMEOUT: u8 = 0x1d;
const CAPABILITIES: u8 = 0x2a;
const ALL: u8 = 0x3f;

/// Bytes of the header of a parameter list.
const HEADER: usize = 8;

impl MmcDrive {
    /// A page: current values, what can be changed, or defaults.
    fn page(&self, code: u8, control: u8) -> Option<Vec<u8>> {
        let modes = match control {
            0 => self.state.modes,
            1 => Modes {
                recovery: 0xff,
                retries: 0xff,
            },
            _ => Modes::default(),
        };
        let mut page = match code {
            RECOVERY => {
                let mut page = vec![code, 0x0a, modes.recovery, modes.retries];
                page.resize(12, 0);
                return Some(page);
            }
            POWER => vec![code, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            TIMEOUT => vec![code, 0x08, 0, 0, 0, 0, 0, 60, 0, 60],
            CAPABILITIES => self.capabilities(),
            _ => return None,
        };
        if control == 1 {
            page[2..].fill(0);
        }
        Some(page)
    }

    /// Page 2Ah: reads CD and DVD, a tray that locks and ejects.
    fn capabilities(&self) -> Vec<u8> {
        // Kilobytes a second: 16 times the speed of a DVD.
        let speed = 21_600u16.to_be_bytes();
        let mut page = vec![CAPABILITIES, 0x14, 0x3b, 0, 0x70, 0];
        page.push(0x29 | u8::from(self.state.locked) << 1);
        page.push(0);
        page.extend_from_slice(&speed);
        page.extend_from_slice(&[0, 2]);
        // Buffer in KiB, current speed.
        page.extend_from_slice(&[2, 0]);
        page.extend_from_slice(&speed);
        page.resize(22, 0);
        page
    }

    pub(super) fn mode_sense(&mut self, cdb: &Cdb) -> Reply {
        let (control, code) = (cdb[2] >> 6, cdb[2] & 0x3f);
        if control == 3 {
            return self.check(Sense::NO_SAVING);
        }
        let mut pages = Vec::new();
        for known in [RECOVERY, POWER, TIMEOUT, CAPABILITIES] {
            if (code == known || code == ALL)
                && let Some(page) = self.page(known, control)
            {
                pages.extend_from_slice(&page);
            }
        }
        if pages.is_empty() {
            return self.check(Sense::INVALID_FIELD);
        }
        let mut data = vec![0; HEADER];
        let len = (HEADER - 2 + pages.len()) as u16;
        data[..2].copy_from_slice(&len.to_be_bytes());
        // The obsolete medium type.
        data[2] = match (self.state.open, self.blocks()) {
            (true, _) => 0x71,
            (false, None) => 0x70,
            (false, Some(_)) => 0x01,
        };
        data.extend_from_slice(&pages);
        cut(data, usize::from(be16(cdb, 7)))
    }

    pub(super) fn mode_select(&mut self, cdb: &Cdb) -> Reply {
        let len = be16(cdb, 7);
        // The page format of the standard; nothing is saved.
        if cdb[1] & 0x11 != 0x10 {
            return self.check(Sense::INVALID_FIELD);
        }
        match usize::from(len) {
            0 => Reply::Good,
            len if len < HEADER => self.check(Sense::PARAMETER_LENGTH),
            _ => Reply::Out(u32::from(len)),
        }
    }

    /// The parameter list: every page is checked before any is set.
    pub(super) fn mode_parameters(&mut self, data: &[u8]) -> Reply {
        let descriptors = usize::from(be16(data, 6));
        let Some(mut pages) = data.get(HEADER + descriptors..) else {
            return self.check(Sense::PARAMETER_LENGTH);
        };
        let mut modes = self.state.modes;
        while !pages.is_empty() {
            let &[head, len, ref rest @ ..] = pages else {
                return self.check(Sense::PARAMETER_LENGTH);
            };
            let Some(current) = self.page(head & 0x3f, 0) else {
                return self.check(Sense::INVALID_PARAMETER);
            };
            if usize::from(len) + 2 != current.len() {
                return self.check(Sense::INVALID_PARAMETER);
            }
            let Some(body) = rest.get(..usize::from(len)) else {
                return self.check(Sense::PARAMETER_LENGTH);
            };
            if head & 0x3f == RECOVERY {
                modes = Modes {
                    recovery: body[0],
                    retries: body[1],
                };
            } else if body != &current[2..] {
                return self.check(Sense::INVALID_PARAMETER);
            }
            pages = &rest[usize::from(len)..];
        }
        self.state.modes = modes;
        Reply::Good
    }
}
