//! The general purpose logs (ACS-3, annex A; SATA 3.2, 13.7).

use super::{
    AtaDisk, Payload, Protocol, Step, TaskFile,
    kept::{HOST_PAGES, HostLogs, sum},
    opcode, sanitize,
};

const DIRECTORY: u8 = 0x00;
const STATISTICS: u8 = 0x04;
const NCQ_ERROR: u8 = 0x10;
const PHY_EVENTS: u8 = 0x11;
const NCQ_SEND_RECEIVE: u8 = 0x13;
const IDENTIFY_DATA: u8 = 0x30;

/// A page that says something: the other fields of it are not there.
const VALID: u64 = 1 << 63;

impl AtaDisk {
    /// READ LOG EXT and READ LOG DMA EXT.
    pub(super) fn read_log_command(&mut self, task: &TaskFile) -> Step {
        let protocol = if task.command == opcode::READ_LOG_EXT {
            Protocol::Pio { block: 512 }
        } else {
            Protocol::Dma
        };
        self.read_log(task, protocol, task.count)
    }

    /// Pages of a log: address in LBA 7:0, page in LBA 39:32 and 15:8.
    pub(super) fn read_log(&mut self, task: &TaskFile, protocol: Protocol, count: u16) -> Step {
        let (address, page) = log_address(task);
        match self.log_pages(address, page, count) {
            Some(data) => {
                if address == NCQ_ERROR {
                    self.state.ncq_error = None;
                }
                if address == PHY_EVENTS && task.features & 1 != 0 {
                    self.state.counters.comresets = 0;
                }
                Step::In { protocol, data }
            }
            None => self.abort(task),
        }
    }

    /// WRITE LOG EXT and WRITE LOG DMA EXT.
    pub(super) fn write_log_command(&mut self, task: &TaskFile) -> Step {
        let (address, page) = log_address(task);
        if !HostLogs::has(address, page, task.count) {
            return self.abort(task);
        }
        let protocol = if task.command == opcode::WRITE_LOG_EXT {
            Protocol::Pio { block: 512 }
        } else {
            Protocol::Dma
        };
        Step::Out {
            protocol,
            len: u32::from(task.count) * 512,
            payload: Payload::Log { address, page },
        }
    }

    fn log_pages(&self, address: u8, page: u16, count: u16) -> Option<Vec<u8>> {
        if count == 0 {
            return None;
        }
        if (0x80..=0x9f).contains(&address) {
            return self.state.host_logs.read(address, page, count);
        }
        let end = page.checked_add(count)?;
        if end > self.log_size(address) {
            return None;
        }
        let mut data = Vec::with_capacity(usize::from(count) * 512);
        for page in page..end {
            data.extend_from_slice(&self.log_page(address, page));
        }
        Some(data)
    }

    /// Pages of a log; 0 if there is no such log.
    fn log_size(&self, address: u8) -> u16 {
        match address {
            DIRECTORY | NCQ_ERROR | PHY_EVENTS | NCQ_SEND_RECEIVE => 1,
            STATISTICS => 8,
            IDENTIFY_DATA => 6 + u16::from(self.protection.is_some()),
            0x80..=0x9f => HOST_PAGES,
            _ => 0,
        }
    }

    fn log_page(&self, address: u8, page: u16) -> [u8; 512] {
        match address {
            DIRECTORY => self.directory(),
            STATISTICS => self.statistics(page),
            NCQ_ERROR => self.ncq_error_page(),
            PHY_EVENTS => self.phy_events(),
            NCQ_SEND_RECEIVE => self.send_receive(),
            IDENTIFY_DATA => self.identify_log(page),
            _ => [0; 512],
        }
    }

    fn directory(&self) -> [u8; 512] {
        let mut data = [0; 512];
        data[0] = 1;
        for address in 1..=0xff {
            let size = self.log_size(address);
            let at = usize::from(address) * 2;
            data[at..at + 2].copy_from_slice(&size.to_le_bytes());
        }
        data
    }

    /// Device statistics: pages 0 (list), 1 (general), 4 (errors), 6 (transport), 7 (solid state).
    fn statistics(&self, page: u16) -> [u8; 512] {
        // Supported, valid.
        const VALUE: u64 = 0xc0 << 56;
        let counters = &self.state.counters;
        let mask = |value: u64| value & ((1 << 56) - 1);
        let mut log = Qwords::new(page);
        match page {
            0 => log.list(&[0, 1, 4, 6, 7]),
            1 => {
                log.set(1, VALUE | counters.power_cycles & 0xffff_ffff);
                log.set(2, VALUE | (self.seconds() / 3600) & 0xffff_ffff);
                log.set(3, VALUE | mask(counters.sectors_written));
                log.set(4, VALUE | mask(counters.writes));
                log.set(5, VALUE | mask(counters.sectors_read));
                log.set(6, VALUE | mask(counters.reads));
            }
            4 => {
                log.set(1, VALUE | counters.media_errors & 0xffff_ffff);
                log.set(2, VALUE | counters.soft_resets & 0xffff_ffff);
            }
            6 => log.set(2, VALUE | counters.comresets & 0xffff_ffff),
            7 => log.set(1, VALUE),
            _ => return [0; 512],
        }
        log.0
    }

    fn ncq_error_page(&self) -> [u8; 512] {
        let mut data = [0; 512];
        let Some(error) = &self.state.ncq_error else {
            // No queued command failed.
            data[0] = 0x80;
            return sum(data);
        };
        let end = &error.registers;
        let lba = end.lba.to_le_bytes();
        data[0] = error.tag.unwrap_or(0x80);
        data[2] = end.status;
        data[3] = end.error;
        data[4..7].copy_from_slice(&lba[..3]);
        data[7] = end.device;
        data[8..11].copy_from_slice(&lba[3..6]);
        data[12..14].copy_from_slice(&end.count.to_le_bytes());
        sum(data)
    }

    /// Phy event counters: 16 bits each.
    fn phy_events(&self) -> [u8; 512] {
        let mut data = [0; 512];
        let comresets = self.state.counters.comresets.min(0xffff) as u16;
        // Failed with an interface CRC error: never. Signatures sent because of a COMRESET.
        let counters = [(0x1001u16, 0), (0x100a, comresets)];
        for (at, (id, value)) in counters.into_iter().enumerate() {
            data[4 + at * 4..6 + at * 4].copy_from_slice(&id.to_le_bytes());
            data[6 + at * 4..8 + at * 4].copy_from_slice(&u16::to_le_bytes(value));
        }
        sum(data)
    }

    /// Which subcommands SEND and RECEIVE FPDMA QUEUED have.
    fn send_receive(&self) -> [u8; 512] {
        let mut data = [0; 512];
        let trim = u8::from(self.offers_trim());
        data[0] = trim;
        data[4] = trim;
        // READ LOG DMA EXT.
        data[8] = 1;
        data
    }

    /// The IDENTIFY DEVICE data log.
    fn identify_log(&self, page: u16) -> [u8; 512] {
        let id = self.identify();
        let word = |at: usize| u64::from(id[at * 2]) | u64::from(id[at * 2 + 1]) << 8;
        let mut log = Qwords::new(page);
        match page {
            0 if self.protection.is_some() => log.list(&[0, 1, 2, 5, 6]),
            0 => log.list(&[0, 1, 2, 5]),
            1 => return id,
            2 => {
                log.set(1, VALID | self.sectors());
                // Sizes: physical exponent, physical and logical size valid.
                let exponent = word(106) & 0xf;
                let sizes = word(106) & 0x3000;
                log.set(2, VALID | sizes << 49 | exponent << 16);
                log.set(3, VALID | u64::from(self.config.logical_sector / 2));
                log.set(4, VALID | self.sectors());
            }
            5 => log.text(&id),
            6 if self.protection.is_some() => {
                let state = word(128);
                log.set(1, VALID | word(92));
                // Supported, master password capability, expired, frozen, locked, enabled.
                let bits = (state & 1) << 6 | (state >> 8 & 1) << 5 | state >> 1 & 15;
                log.set(2, VALID | bits);
                log.set(6, VALID | sanitize::CAPABILITIES);
            }
            _ => return [0; 512],
        }
        log.0
    }
}

/// A page of quadwords with a header.
struct Qwords([u8; 512]);

impl Qwords {
    fn new(page: u16) -> Self {
        let mut log = Self([0; 512]);
        log.set(0, VALID | u64::from(page) << 16 | 1);
        log
    }

    fn set(&mut self, at: usize, value: u64) {
        self.0[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The pages that there are.
    fn list(&mut self, pages: &[u8]) {
        self.0[8] = pages.len() as u8;
        self.0[9..9 + pages.len()].copy_from_slice(pages);
    }

    /// Serial number, firmware, model: as in IDENTIFY DEVICE.
    fn text(&mut self, id: &[u8; 512]) {
        for (from, to, len) in [(20, 8, 20), (46, 32, 8), (54, 48, 40)] {
            self.0[to..to + len].copy_from_slice(&id[from..from + len]);
        }
    }
}

/// Address and page of a log command.
fn log_address(task: &TaskFile) -> (u8, u16) {
    let page = (task.lba >> 8 & 0xff) | (task.lba >> 32 & 0xff) << 8;
    (task.lba as u8, page as u16)
}
