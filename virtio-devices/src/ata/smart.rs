//! SMART (ACS-3, 7.48): attributes from real counters, thresholds, the error log. There are no
//! self-tests: a virtual disk has nothing to test that a read would not show.

use super::{
    AtaDisk, Payload, Protocol, Registers, Step, TaskFile,
    kept::{HOST_PAGES, HostLogs, sum},
};

const READ_DATA: u8 = 0xd0;
const READ_THRESHOLDS: u8 = 0xd1;
const AUTOSAVE: u8 = 0xd2;
const SAVE: u8 = 0xd3;
const OFFLINE: u8 = 0xd4;
const READ_LOG: u8 = 0xd5;
const WRITE_LOG: u8 = 0xd6;
const ENABLE: u8 = 0xd8;
const DISABLE: u8 = 0xd9;
const RETURN_STATUS: u8 = 0xda;

/// What LBA 23:8 has to say.
const KEY: u64 = 0xc24f;

impl AtaDisk {
    /// The SMART command.
    pub(super) fn smart(&mut self, task: &TaskFile) -> Step {
        let function = task.features as u8;
        if task.lba >> 8 & 0xffff != KEY || (!self.state.smart && function != ENABLE) {
            return self.abort(task);
        }
        let pio = Protocol::Pio { block: 512 };
        let page = |data: [u8; 512]| Step::In {
            protocol: pio,
            data: data.to_vec(),
        };
        match function {
            READ_DATA => page(self.smart_data()),
            READ_THRESHOLDS => page(thresholds()),
            AUTOSAVE if matches!(task.count & 0xff, 0 | 0xf1) => {
                self.state.smart_autosave = task.count & 0xff == 0xf1;
                Step::End(Registers::ready(task))
            }
            // Collecting offline data takes no time: it is always there.
            OFFLINE if task.lba & 0xff != 0 => self.abort(task),
            // For a status the key comes back unchanged: no threshold was exceeded.
            SAVE | OFFLINE | RETURN_STATUS => Step::End(Registers::ready(task)),
            READ_LOG => self.smart_read_log(task, pio),
            WRITE_LOG => self.smart_write_log(task, pio),
            ENABLE | DISABLE => {
                self.state.smart = function == ENABLE;
                Step::End(Registers::ready(task))
            }
            _ => self.abort(task),
        }
    }

    fn smart_read_log(&mut self, task: &TaskFile, protocol: Protocol) -> Step {
        let (address, count) = (task.lba as u8, task.count & 0xff);
        if count == 0 {
            return self.abort(task);
        }
        let data = match address {
            0x00 if count == 1 => Some(smart_directory()),
            0x01 if count == 1 => Some(self.summary_error_log().to_vec()),
            0x80..=0x9f => self.state.host_logs.read(address, 0, count),
            _ => None,
        };
        match data {
            Some(data) => Step::In { protocol, data },
            None => self.abort(task),
        }
    }

    fn smart_write_log(&mut self, task: &TaskFile, protocol: Protocol) -> Step {
        let (address, count) = (task.lba as u8, task.count & 0xff);
        if !HostLogs::has(address, 0, count) {
            return self.abort(task);
        }
        Step::Out {
            protocol,
            len: u32::from(count) * 512,
            payload: Payload::Log { address, page: 0 },
        }
    }

    /// Attributes and abilities.
    fn smart_data(&self) -> [u8; 512] {
        let counters = &self.state.counters;
        let attributes = [
            (5, 0x0033, 0),
            (9, 0x0032, self.seconds() / 3600),
            (12, 0x0032, counters.power_cycles),
            (187, 0x0032, counters.media_errors),
            (241, 0x0032, counters.sectors_written),
            (242, 0x0032, counters.sectors_read),
        ];
        let mut data = [0; 512];
        data[0] = 0x10;
        for (at, (id, flags, raw)) in attributes.into_iter().enumerate() {
            let entry = &mut data[2 + at * 12..][..12];
            entry[0] = id;
            entry[1..3].copy_from_slice(&u16::to_le_bytes(flags));
            entry[3] = 100;
            entry[4] = 100;
            entry[5..11].copy_from_slice(&raw.to_le_bytes()[..6]);
        }
        // SMART attributes survive by themselves; the error log is there.
        data[368] = 0x03;
        data[370] = 0x01;
        sum(data)
    }

    /// The newest five errors (log 01h).
    fn summary_error_log(&self) -> [u8; 512] {
        let errors = &self.state.errors;
        let mut data = [0; 512];
        data[0] = 1;
        data[1] = errors.len() as u8;
        for (at, error) in errors.iter().enumerate() {
            let entry = &mut data[2 + at * 90..][..90];
            let (task, end) = (&error.task, &error.registers);
            // The fifth command is the one that failed; those before it are not kept.
            let command = &mut entry[48..60];
            command[1] = task.features as u8;
            command[2] = task.count as u8;
            command[3..6].copy_from_slice(&task.lba.to_le_bytes()[..3]);
            command[6] = task.device;
            command[7] = task.command;
            let result = &mut entry[60..90];
            result[1] = end.error;
            result[2] = end.count as u8;
            result[3..6].copy_from_slice(&end.lba.to_le_bytes()[..3]);
            result[6] = end.device;
            result[7] = end.status;
            // Active.
            result[27] = 0x03;
            result[28..30].copy_from_slice(&error.hours.to_le_bytes());
        }
        let count = self.state.counters.errors.min(0xffff) as u16;
        data[452..454].copy_from_slice(&count.to_le_bytes());
        sum(data)
    }
}

/// No attribute has a threshold that could be exceeded.
fn thresholds() -> [u8; 512] {
    let mut data = [0; 512];
    data[0] = 0x10;
    for (at, id) in [5, 9, 12, 187, 241, 242].into_iter().enumerate() {
        data[2 + at * 12] = id;
    }
    sum(data)
}

/// The logs that SMART READ LOG has.
fn smart_directory() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1;
    data[2] = 1;
    for address in 0x80..=0x9f {
        data[address * 2] = HOST_PAGES as u8;
    }
    data
}
