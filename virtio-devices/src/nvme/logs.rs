//! Get Log Page (base specification 2.0, 5.16).

use std::sync::atomic::Ordering;

use super::{
    Status,
    command::{Command, put, put_text},
    core::Core,
    features::TEMPERATURE,
    identify::FIRMWARE,
    opcode::{admin, io},
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
};
use crate::{MemorySource, memory::BatchMemory, stats::Op};

const SUPPORTED: u8 = 0x00;
const ERRORS: u8 = 0x01;
const SMART: u8 = 0x02;
const SLOTS: u8 = 0x03;
const CHANGED: u8 = 0x04;
const EFFECTS: u8 = 0x05;
const FEATURES: u8 = 0x12;
const MANAGEMENT: u8 = 0x13;
const RESERVATIONS: u8 = 0x80;
const SANITIZE: u8 = 0x81;

/// RAE, in dword 10.
const RETAIN: u32 = 1 << 15;
/// The most bytes of a log page.
const LARGEST: u64 = 4096;

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn get_log_page(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let log = command.cdw10() as u8;
        let retain = command.cdw10() & RETAIN != 0;
        let dwords = u64::from(command.cdw10() >> 16) | u64::from(command.cdw11() & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(command.cdw12()) | u64::from(command.cdw13()) << 32;
        if command.cdw14() & 1 << 23 != 0 || !offset.is_multiple_of(4) {
            // No index offsets.
            return Err(Status::INVALID_FIELD);
        }
        let page = self.core.log_page(log, command, offset == 0 && !retain)?;
        if offset > page.len() as u64 {
            return Err(Status::INVALID_FIELD);
        }
        let rest = &page[offset as usize..];
        // Beyond the end of a page there is nothing to see: zeroes.
        let len = len.min(LARGEST);
        let mut bytes = vec![0; len as usize];
        let take = rest.len().min(bytes.len());
        bytes[..take].copy_from_slice(&rest[..take]);
        self.write_data(index, command, len, &bytes, guest)?;
        if !retain {
            self.core.with_events(|events| {
                events.log_read(log);
                if log == RESERVATIONS && events.has_notices() {
                    events.add(super::events::RESERVATION);
                }
            });
        }
        Ok(Outcome::Done(0))
    }
}

impl Core {
    /// Log page 00h: the pages there are.
    fn supported(&self) -> Vec<u8> {
        let mut page = vec![0; 1024];
        for log in [
            SUPPORTED,
            ERRORS,
            SMART,
            SLOTS,
            CHANGED,
            EFFECTS,
            FEATURES,
            MANAGEMENT,
            RESERVATIONS,
        ] {
            page[usize::from(log) * 4] = 1;
        }
        page[usize::from(SANITIZE) * 4] = u8::from(self.can_sanitize());
        page
    }

    fn log_page(&self, log: u8, command: &Command, clear: bool) -> Result<Vec<u8>, Status> {
        let of_controller = matches!(command.nsid, 0 | u32::MAX);
        Ok(match log {
            SUPPORTED => self.supported(),
            ERRORS => self.with_events_quietly(|events| events.error_log()),
            // LPA has no SMART a namespace.
            SMART if of_controller => self.smart(),
            SLOTS => {
                let mut page = vec![0; 512];
                page[0] = 1;
                put_text(&mut page, 8, 8, FIRMWARE);
                page
            }
            CHANGED => self.with_events_quietly(|events| events.changed_log(clear)),
            EFFECTS if command.cdw14() >> 24 == 0 => self.effects(),
            SMART | EFFECTS => return Err(Status::INVALID_FIELD),
            FEATURES => feature_effects(),
            // No command of NVMe-MI is there; but LPA says that this page is.
            MANAGEMENT => vec![0; 4096],
            RESERVATIONS => self.with_events_quietly(|events| events.notice_log(clear)),
            SANITIZE if self.can_sanitize() => self.subsystem.sanitize.log().to_vec(),
            _ => return Err(Status::INVALID_LOG_PAGE),
        })
    }

    fn smart(&self) -> Vec<u8> {
        let mut page = vec![0; 512];
        let namespaces = self.subsystem.attached_to(self.id);
        let read_only = !namespaces.is_empty() && namespaces.iter().all(|it| it.is_read_only());
        let hot = self.features().is_hot();
        // Critical warning: temperature, read-only media.
        page[0] = u8::from(hot) << 1 | u8::from(read_only) << 3;
        put(&mut page, 1, &TEMPERATURE.to_le_bytes());
        // Spare: all of it, threshold 10 %.
        page[3] = 100;
        page[4] = 10;
        let sum = |get: &dyn Fn(&crate::stats::QueueStats) -> u64| -> u64 {
            self.ports.iter().map(|port| get(&port.stats)).sum()
        };
        // Units of 1000 sectors of 512 bytes, rounded up.
        let units = |op| sum(&|stats| stats.op(op).bytes()).div_ceil(512_000);
        let count = |op| sum(&|stats| stats.op(op).completed());
        put(&mut page, 32, &u128::from(units(Op::Read)).to_le_bytes());
        put(&mut page, 48, &u128::from(units(Op::Write)).to_le_bytes());
        put(&mut page, 64, &u128::from(count(Op::Read)).to_le_bytes());
        put(&mut page, 80, &u128::from(count(Op::Write)).to_le_bytes());
        let busy: u64 = self
            .ports
            .iter()
            .map(|port| port.busy.load(Ordering::Relaxed))
            .sum();
        put(
            &mut page,
            96,
            &u128::from(busy / 60_000_000_000).to_le_bytes(),
        );
        let cycles = self.power_cycles.load(Ordering::Relaxed);
        put(&mut page, 112, &u128::from(cycles).to_le_bytes());
        let hours = self.started.elapsed().as_secs() / 3600;
        put(&mut page, 128, &u128::from(hours).to_le_bytes());
        let failed: u64 = [Op::Read, Op::Write]
            .iter()
            .map(|op| sum(&|stats| stats.op(*op).failed()))
            .sum();
        put(&mut page, 160, &u128::from(failed).to_le_bytes());
        let errors = self.with_events_quietly(|events| events.error_count);
        put(&mut page, 176, &u128::from(errors).to_le_bytes());
        put(&mut page, 200, &TEMPERATURE.to_le_bytes());
        page
    }

    /// Commands supported and effects: bit 0 supported, 1 logical blocks may change, 2 capabilities
    /// of a namespace may change, 3 the inventory of namespaces may change.
    fn effects(&self) -> Vec<u8> {
        let mut page = vec![0; 4096];
        let mut admin_command = |code: u8, effects: u32| {
            put(&mut page, usize::from(code) * 4, &effects.to_le_bytes());
        };
        for code in [
            admin::DELETE_SQ,
            admin::CREATE_SQ,
            admin::GET_LOG_PAGE,
            admin::DELETE_CQ,
            admin::CREATE_CQ,
            admin::IDENTIFY,
            admin::ABORT,
            admin::SET_FEATURES,
            admin::GET_FEATURES,
            admin::ASYNC_EVENT_REQUEST,
            admin::DOORBELL_BUFFER_CONFIG,
        ] {
            admin_command(code, 1);
        }
        // CSE in bits 18:16: no other command to the same namespace, or to any.
        if self.manages() {
            admin_command(admin::NAMESPACE_MANAGEMENT, 1 | 1 << 3);
            admin_command(admin::NAMESPACE_ATTACHMENT, 1 | 1 << 3);
        }
        if self.all_remember() {
            admin_command(admin::FORMAT_NVM, 1 | 1 << 1 | 1 << 2 | 1 << 16);
        }
        if self.can_sanitize() {
            admin_command(admin::SANITIZE, 1 | 1 << 1 | 2 << 16);
        }
        let mut io_command = |code: u8, effects: u32| {
            put(
                &mut page,
                1024 + usize::from(code) * 4,
                &effects.to_le_bytes(),
            );
        };
        for code in [
            io::READ,
            io::COMPARE,
            io::VERIFY,
            io::FLUSH,
            io::RESERVATION_REGISTER,
            io::RESERVATION_REPORT,
            io::RESERVATION_ACQUIRE,
            io::RESERVATION_RELEASE,
        ] {
            io_command(code, 1);
        }
        for code in [
            io::WRITE,
            io::WRITE_ZEROES,
            io::DATASET_MANAGEMENT,
            io::COPY,
        ] {
            io_command(code, 1 | 1 << 1);
        }
        if self.all_remember() {
            io_command(io::WRITE_UNCORRECTABLE, 1 | 1 << 1);
        }
        page
    }
}

/// Log page 12h: which features there are, and that a set changes nothing but the feature. Bits
/// 31:20 are the scope: 0 namespace, 1 controller.
fn feature_effects() -> Vec<u8> {
    use super::features::{Features, capability};
    let mut page = vec![0; 1024];
    for feature in 0..=u8::MAX {
        if let Ok(capabilities) = Features::capabilities(feature) {
            let scope = if capabilities & capability::NAMESPACE != 0 {
                1_u32 << 20
            } else {
                1 << 21
            };
            put(
                &mut page,
                usize::from(feature) * 4,
                &(1 | scope).to_le_bytes(),
            );
        }
    }
    page
}
