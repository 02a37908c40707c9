//! Get Log Page (base specification 2.0, 5.16).

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
use crate::{MemorySource, memory::BatchMemory};

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
        self.counters().show(&mut page);
        let errors = self.with_events_quietly(|events| events.error_count);
        put(&mut page, 176, &u128::from(errors).to_le_bytes());
        put(&mut page, 200, &TEMPERATURE.to_le_bytes());
        page
    }

    /// Commands supported and effects.
    fn effects(&self) -> Vec<u8> {
        use effect::{
            ALONE, ALONE_HERE, BLOCKS, CAPABILITIES, CONTROLLER, INVENTORY, NAMESPACE, SUBSYSTEM,
            SUPPORTED,
        };
        let mut page = vec![0; 4096];
        let mut admin_command = |code: u8, effects: u32| {
            let effects = SUPPORTED | effects;
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
            admin::GET_FEATURES,
            admin::ASYNC_EVENT_REQUEST,
            admin::DOORBELL_BUFFER_CONFIG,
        ] {
            admin_command(code, CONTROLLER);
        }
        // Some features are the controller's, some a namespace's.
        admin_command(admin::SET_FEATURES, CONTROLLER | NAMESPACE);
        if self.manages() {
            let manage = INVENTORY | SUBSYSTEM | NAMESPACE;
            admin_command(admin::NAMESPACE_MANAGEMENT, manage);
            admin_command(admin::NAMESPACE_ATTACHMENT, manage | CONTROLLER);
        }
        if self.all_remember() {
            let format = BLOCKS | CAPABILITIES | ALONE_HERE | NAMESPACE;
            admin_command(admin::FORMAT_NVM, format);
        }
        if self.can_sanitize() {
            let sanitize = BLOCKS | ALONE | SUBSYSTEM | NAMESPACE;
            admin_command(admin::SANITIZE, sanitize);
        }
        let mut io_command = |code: u8, effects: u32| {
            let effects = SUPPORTED | NAMESPACE | effects;
            let at = 1024 + usize::from(code) * 4;
            put(&mut page, at, &effects.to_le_bytes());
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
            io_command(code, 0);
        }
        for code in [
            io::WRITE,
            io::WRITE_ZEROES,
            io::DATASET_MANAGEMENT,
            io::COPY,
        ] {
            io_command(code, BLOCKS);
        }
        if self.all_remember() {
            io_command(io::WRITE_UNCORRECTABLE, BLOCKS);
        }
        page
    }
}

/// What log page 05h says of a command (base specification 2.0, 5.16.1.6).
mod effect {
    /// CSUPP.
    pub(super) const SUPPORTED: u32 = 1;
    /// LBCC: logical blocks may change.
    pub(super) const BLOCKS: u32 = 1 << 1;
    /// NCC: capabilities of a namespace may change.
    pub(super) const CAPABILITIES: u32 = 1 << 2;
    /// NIC: the inventory of namespaces may change.
    pub(super) const INVENTORY: u32 = 1 << 3;
    /// CSE: no other command to the same namespace.
    pub(super) const ALONE_HERE: u32 = 1 << 16;
    /// CSE: no other command to any namespace.
    pub(super) const ALONE: u32 = 2 << 16;
    /// CSP: what it may have an effect on, all of it.
    pub(super) const NAMESPACE: u32 = 1 << 20;
    pub(super) const CONTROLLER: u32 = 1 << 21;
    pub(super) const SUBSYSTEM: u32 = 1 << 25;
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
