//! The reservation commands (base specification 2.0, 7.2 to 7.5).

use std::sync::Arc;

use super::{
    Namespace, Status,
    command::{Command, le64},
    opcode::io as opcode,
    queues::NvmeQueues,
    reservation::{Registrant, Told},
};
use crate::{MemorySource, memory::BatchMemory};

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn reservation(
        &mut self,
        index: u32,
        namespace: &Arc<Namespace>,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Result<(), Status> {
        if command.opcode == opcode::RESERVATION_REPORT {
            return self.report(index, namespace, command, guest);
        }
        let (host, extended) = self.core.host_id();
        if host == [0; 16] {
            // Reservations need to know who asks.
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let action = (command.cdw10() & 7) as u8;
        let ignore_key = command.cdw10() & 8 != 0;
        let kind = (command.cdw10() >> 8 & 0xff) as u8;
        let keys = if command.opcode == opcode::RESERVATION_RELEASE {
            8
        } else {
            16
        };
        let data = self.read_data(index, command, keys, guest)?;
        let (current, other) = (le64(&data, 0), le64(&data, 8));
        let by = Registrant {
            host,
            key: other,
            controller: self.core.id,
            extended,
        };
        let persistence = command.cdw10() >> 30;
        let (result, changed) = namespace.change_reservations(|it| match command.opcode {
            opcode::RESERVATION_REGISTER => {
                let persistent = match persistence {
                    0 => it.persistent,
                    2 => false,
                    3 if namespace.has_sidecar() => true,
                    _ => return Err(Status::INVALID_FIELD),
                };
                let told = it.register(action, ignore_key, current, other, by)?;
                it.persistent = persistent;
                Ok(told)
            }
            opcode::RESERVATION_ACQUIRE => {
                it.acquire(action, ignore_key, kind, current, other, host)
            }
            opcode::RESERVATION_RELEASE => it.release(action, ignore_key, kind, current, host),
            _ => Err(Status::INVALID_OPCODE),
        });
        self.tell(namespace.nsid(), result?);
        if changed {
            self.persist(index, namespace);
        } else {
            self.end(index, Status::SUCCESS);
        }
        Ok(())
    }

    /// Notices for hosts, through whichever controllers they use.
    fn tell(&self, nsid: u32, told: Told) {
        for (host, notice) in told {
            self.core
                .subsystem
                .tell(|_, listener| listener.reservation_notice(nsid, host, notice));
        }
    }

    fn report(
        &mut self,
        index: u32,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Result<(), Status> {
        let extended = command.cdw11() & 1 != 0;
        let (host, is_extended) = self.core.host_id();
        if is_extended && !extended && host != [0; 16] {
            return Err(Status::HOST_ID_INCONSISTENT);
        }
        let report = namespace.reservations().report(extended);
        let len = (u64::from(command.cdw10()) + 1) * 4;
        if len > self.core.config.max_transfer() {
            return Err(Status::INVALID_FIELD);
        }
        let mut bytes = vec![0; len as usize];
        let take = report.len().min(bytes.len());
        bytes[..take].copy_from_slice(&report[..take]);
        self.write_data(index, command, len, &bytes, guest)?;
        self.end(index, Status::SUCCESS);
        Ok(())
    }
}
