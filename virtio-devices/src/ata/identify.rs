//! The data of IDENTIFY DEVICE (ACS-3, 7.12).

use super::{
    AtaDisk,
    disk::{MAX_MULTIPLE, Trim},
    io::MAX_TRIM_BLOCKS,
    sanitize,
};

/// The words of an IDENTIFY.
pub(super) struct Words(pub(super) [u8; 512]);

impl Words {
    pub(super) fn new() -> Self {
        Self([0; 512])
    }

    pub(super) fn set(&mut self, word: usize, value: u16) {
        self.0[word * 2..word * 2 + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn set32(&mut self, word: usize, value: u32) {
        self.0[word * 2..word * 2 + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn set64(&mut self, word: usize, value: u64) {
        self.0[word * 2..word * 2 + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A text, padded with spaces: the first character of each pair is in the upper byte.
    pub(super) fn text(&mut self, word: usize, words: usize, text: &str) {
        let field = &mut self.0[word * 2..(word + words) * 2];
        field.fill(b' ');
        for (at, byte) in text.bytes().take(words * 2).enumerate() {
            field[at ^ 1] = byte;
        }
    }

    /// The signature and the checksum of word 255.
    pub(super) fn seal(mut self) -> [u8; 512] {
        self.0[510] = 0xa5;
        let sum = self.0[..511]
            .iter()
            .fold(0u8, |sum, &b| sum.wrapping_add(b));
        self.0[511] = sum.wrapping_neg();
        self.0
    }
}

impl AtaDisk {
    /// The data of IDENTIFY DEVICE.
    #[must_use]
    pub fn identify(&self) -> [u8; 512] {
        let mut id = Words::new();
        self.identify_old(&mut id);
        self.identify_features(&mut id);
        self.identify_sectors(&mut id);
        id.seal()
    }

    /// Names, geometry, transfer modes.
    fn identify_old(&self, id: &mut Words) {
        let config = &self.config;
        let (cylinders, heads, sectors) = self.default_chs();
        id.set(0, 0x0040);
        id.set(1, cylinders);
        id.set(2, 0xc837);
        id.set(3, u16::from(heads));
        id.set(5, 512);
        id.set(6, u16::from(sectors));
        id.text(10, 10, &config.serial);
        id.text(23, 4, &config.firmware);
        id.text(27, 20, &config.model);
        id.set(47, 0x8000 | u16::from(MAX_MULTIPLE));
        id.set(48, 0x4000);
        // LBA, DMA, IORDY, standby timers as in the standard.
        id.set(49, 0x2f00);
        id.set(50, 0x4000);
        id.set(51, 0x0200);
        id.set(53, 0x0007);
        let (heads, sectors) = self.state.geometry;
        let track = u64::from(heads) * u64::from(sectors);
        let cylinders = (self.sectors() / track).min(16383);
        id.set(54, cylinders as u16);
        id.set(55, u16::from(heads));
        id.set(56, u16::from(sectors));
        id.set32(57, (cylinders * track) as u32);
        let multiple = u16::from(self.state.multiple);
        let multiple = if multiple == 0 { 0 } else { 0x100 | multiple };
        let sanitize = self.protection.as_ref().map_or(0, |_| sanitize::WORD_59);
        id.set(59, sanitize | multiple);
        id.set32(60, self.sectors().min(0xfff_ffff) as u32);
        let mode = self.state.transfer_mode;
        let selected = 1u16 << (mode & 7) << 8;
        id.set(63, 0x0007 | if mode & 0xf8 == 0x20 { selected } else { 0 });
        id.set(64, 0x0003);
        for word in 65..=68 {
            id.set(word, 120);
        }
        id.set(88, 0x007f | if mode & 0xf8 == 0x40 { selected } else { 0 });
    }

    /// Feature sets: offered, and on.
    fn identify_features(&self, id: &mut Words) {
        let (state, trim) = (&self.state, self.offers_trim());
        // Thirty-two tags.
        id.set(75, 31);
        // NCQ, three speeds, phy event counters, READ LOG DMA EXT for READ LOG EXT.
        id.set(76, 0x850e);
        // Connected at 6 Gb/s; SEND and RECEIVE FPDMA QUEUED.
        id.set(77, 0x0046);
        // Software settings preservation.
        id.set(78, 0x0040);
        id.set(79, if state.preserve_settings { 0x0040 } else { 0 });
        // ATA-5 to ACS-3.
        id.set(80, 0x07e0);
        let security = self.security_words();
        // SMART, security, power management, write cache, look-ahead, NOP.
        id.set(82, 0x4069 | u16::from(security.is_some()) << 1);
        // 48-bit addresses, FLUSH CACHE and FLUSH CACHE EXT.
        id.set(83, 0x7400);
        // SMART error log, general purpose logs, FUA, world wide name.
        let wwn = if self.config.wwn == 0 { 0 } else { 0x100 };
        id.set(84, 0x4061 | wwn);
        let on = u16::from(state.smart)
            | u16::from(state.write_cache) << 5
            | u16::from(state.look_ahead) << 6;
        let enabled = security.is_some_and(|(enabled, ..)| enabled);
        id.set(85, 0x4008 | on | u16::from(enabled) << 1);
        if let Some((_, master, state)) = security {
            // How long an erase takes is not known: words 89 and 90 are 0.
            id.set(92, master);
            id.set(128, state);
        }
        id.set(86, 0xb400);
        id.set(87, 0x4061 | wwn);
        if self.config.wwn != 0 {
            for (at, shift) in [48, 32, 16, 0].into_iter().enumerate() {
                id.set(108 + at, (self.config.wwn >> shift) as u16);
            }
        }
        // READ LOG DMA EXT and WRITE LOG DMA EXT.
        id.set(119, 0x4008);
        id.set(120, 0x4008);
        if trim {
            id.set(105, MAX_TRIM_BLOCKS);
            id.set(169, 1);
            if self.config.trim == Trim::Zero {
                // DRAT and RZAT.
                id.set(69, 0x4020);
            }
        }
        // No rotating medium; Serial ATA 3.2.
        id.set(217, 1);
        id.set(222, 0x107f);
    }

    /// The number of sectors, and their sizes.
    fn identify_sectors(&self, id: &mut Words) {
        let (logical, physical) = (self.config.logical_sector, self.config.physical_sector);
        id.set64(100, self.sectors());
        let mut sizes = 0x4000;
        if physical > logical {
            sizes |= 0x2000 | (physical / logical).trailing_zeros() as u16;
        }
        if logical > 512 {
            sizes |= 0x1000;
            id.set32(117, logical / 2);
        }
        id.set(106, sizes);
        id.set(209, 0x4000);
    }
}
