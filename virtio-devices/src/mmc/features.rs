//! GET CONFIGURATION (MMC-6, 6.4 and 5): profiles and features.

use super::{BLOCK, Cdb, MmcDrive, Reply, Sense, be16, drive::cut};

const CD_ROM: u16 = 0x0008;
const DVD_ROM: u16 = 0x0010;

/// A feature: number, version and whether it is persistent, current, and data.
struct Feature {
    code: u16,
    version: u8,
    persistent: bool,
    current: bool,
    data: Vec<u8>,
}

impl MmcDrive {
    pub(super) fn get_configuration(&mut self, cdb: &Cdb) -> Reply {
        let (kind, start) = (cdb[1] & 3, be16(cdb, 2));
        if kind == 3 {
            return self.check(Sense::INVALID_FIELD);
        }
        let mut data = vec![0; 6];
        data.extend_from_slice(&self.profile().to_be_bytes());
        for feature in self.features() {
            let wanted = match kind {
                0 => feature.code >= start,
                1 => feature.code >= start && feature.current,
                _ => feature.code == start,
            };
            if !wanted {
                continue;
            }
            data.extend_from_slice(&feature.code.to_be_bytes());
            data.push(
                feature.version << 2
                    | u8::from(feature.persistent) << 1
                    | u8::from(feature.current),
            );
            data.push(feature.data.len() as u8);
            data.extend_from_slice(&feature.data);
        }
        let len = (data.len() - 4) as u32;
        data[..4].copy_from_slice(&len.to_be_bytes());
        cut(data, usize::from(be16(cdb, 7)))
    }

    /// The current profile; 0 without a medium.
    pub(super) fn profile(&self) -> u16 {
        match self.blocks() {
            None => 0,
            Some(_) if self.is_cd() => CD_ROM,
            Some(_) => DVD_ROM,
        }
    }

    fn features(&self) -> Vec<Feature> {
        let profile = self.profile();
        let (cd, dvd) = (profile == CD_ROM, profile == DVD_ROM);
        let feature = |code, version, persistent, current, data: &[u8]| Feature {
            code,
            version,
            persistent,
            current: persistent || current,
            data: data.to_vec(),
        };
        let mut profiles = Vec::new();
        for (code, current) in [(DVD_ROM, dvd), (CD_ROM, cd)] {
            profiles.extend_from_slice(&code.to_be_bytes());
            profiles.extend_from_slice(&[u8::from(current), 0]);
        }
        let mut core = self.config.interface.to_be_bytes().to_vec();
        core.extend_from_slice(&[1, 0, 0, 0]);
        let mut readable = (BLOCK as u32).to_be_bytes().to_vec();
        readable.extend_from_slice(&[0, if dvd { 16 } else { 1 }, 0, 0]);
        vec![
            feature(0x0000, 0, true, true, &profiles),
            feature(0x0001, 2, true, true, &core),
            // Morphing: events are polled, operational changes are not reported.
            feature(0x0002, 1, true, true, &[2, 0, 0, 0]),
            // Removable medium: a tray that can be ejected, loaded and locked.
            feature(0x0003, 1, true, true, &[0x39, 0, 0, 0]),
            feature(0x0010, 0, false, cd || dvd, &readable),
            feature(0x001d, 0, false, cd, &[]),
            feature(0x001e, 2, false, cd, &[0, 0, 0, 0]),
            feature(0x001f, 1, false, dvd, &[0, 0, 0, 0]),
            // Power management, time-out.
            feature(0x0100, 0, true, true, &[]),
            feature(0x0105, 1, true, true, &[0, 0, 0, 0]),
            // Real-time streaming: SET CD SPEED, GET PERFORMANCE.
            feature(0x0107, 4, false, cd || dvd, &[0x08, 0, 0, 0]),
            feature(0x0108, 0, true, true, &self.serial_field()),
        ]
    }

    /// The serial number, padded to a multiple of four bytes.
    fn serial_field(&self) -> Vec<u8> {
        let mut data = self.config.serial.clone().into_bytes();
        data.resize(data.len().next_multiple_of(4), b' ');
        data
    }
}
