//! Get Features and Set Features (base specification 2.0, 5.15 and 5.27).

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    Namespace, Status,
    command::{Command, le64, put},
    events,
    features::{Features, capability, id},
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
};
use crate::{MemorySource, memory::BatchMemory};

/// SV of Set Features.
const SAVE: u32 = 1 << 31;

fn milliseconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn get_features(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let feature = command.cdw10() as u8;
        let select = command.cdw10() >> 8 & 7;
        let capabilities = Features::capabilities(feature)?;
        let features = match select {
            0 => self.core.features().clone(),
            // Default and saved are the same: nothing can be saved.
            1 | 2 => {
                let mut fresh = Features::new(self.core.config.vectors);
                fresh.queues = self.granted();
                fresh
            }
            3 => return Ok(Outcome::Done(capabilities)),
            _ => return Err(Status::INVALID_FIELD),
        };
        if capabilities & capability::NAMESPACE != 0 {
            let namespace = self.feature_namespace(feature, command.nsid)?;
            let of = features.of(namespace.nsid());
            return Ok(Outcome::Done(match feature {
                id::ERROR_RECOVERY => u32::from(of.error_recovery),
                id::RESERVATION_MASK => of.reservation_mask,
                _ => u32::from(select == 0 && namespace.reservations().persistent),
            }));
        }
        match feature {
            id::TIMESTAMP => {
                let data = timestamp(&features);
                self.write_data(index, command, 8, &data, guest)?;
            }
            id::HOST_BEHAVIOUR => {
                let mut data = [0; 512];
                data[..4].copy_from_slice(&features.host_behaviour);
                self.write_data(index, command, 512, &data, guest)?;
            }
            id::HOST_ID => {
                let (host, _) = features.host_id.unwrap_or_default();
                let len = if command.cdw11() & 1 != 0 { 16 } else { 8 };
                self.write_data(index, command, len, &host, guest)?;
            }
            id::QUEUES => return Ok(Outcome::Done(self.granted())),
            _ => return Ok(Outcome::Done(features.dword(feature, command.cdw11())?)),
        }
        Ok(Outcome::Done(0))
    }

    /// I/O queues, 0's based, submission and completion.
    fn granted(&self) -> u32 {
        let most = u32::from(self.core.config.io_queues) - 1;
        most | most << 16
    }

    /// The namespace whose feature is asked for. All of them together have no value: the reservation
    /// features call that an invalid field, others an invalid namespace.
    fn feature_namespace(&self, feature: u8, nsid: u32) -> Result<Arc<Namespace>, Status> {
        match (nsid, feature) {
            (u32::MAX, id::RESERVATION_MASK | id::RESERVATION_PERSISTENCE) => {
                Err(Status::INVALID_FIELD)
            }
            _ => self.attached(nsid),
        }
    }

    /// A namespace that is attached here.
    fn attached(&self, nsid: u32) -> Result<Arc<Namespace>, Status> {
        if nsid == 0 || nsid > super::subsystem::MAX_NAMESPACES {
            return Err(Status::INVALID_NAMESPACE);
        }
        let namespace = self.core.subsystem.namespace(nsid);
        namespace
            .filter(|it| it.attached().contains(&self.core.id))
            .ok_or(Status::INVALID_FIELD)
    }

    pub(super) fn set_features(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let feature = command.cdw10() as u8;
        let value = command.cdw11();
        let capabilities = Features::capabilities(feature)?;
        if command.cdw10() & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        if capabilities & capability::NAMESPACE != 0 {
            return self.set_of_namespaces(index, feature, command);
        }
        if command.nsid != 0 && command.nsid != u32::MAX {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
        }
        match feature {
            id::QUEUES => return self.set_queues(value),
            id::TIMESTAMP => {
                let data = self.read_data(index, command, 8, guest)?;
                let set = le64(&data, 0) & 0xffff_ffff_ffff;
                self.core.features().timestamp = Some((set, milliseconds()));
            }
            id::HOST_BEHAVIOUR => {
                let data = self.read_data(index, command, 512, guest)?;
                let mut kept = [0; 4];
                // Advanced command retry is the host's to enable; nothing here asks to retry.
                kept[0] = data[0] & 1;
                self.core.features().host_behaviour = kept;
            }
            id::HOST_ID => self.set_host_id(index, command, guest)?,
            _ => self.core.features().set_dword(feature, value)?,
        }
        self.core.apply_features();
        let hot = {
            let features = self.core.features();
            feature == id::TEMPERATURE && features.is_hot() && features.tells_temperature()
        };
        if hot {
            self.core.add_event(events::TEMPERATURE);
        }
        Ok(Outcome::Done(0))
    }

    fn set_queues(&mut self, value: u32) -> Answer {
        if value & 0xffff == 0xffff || value >> 16 == 0xffff {
            return Err(Status::INVALID_FIELD);
        }
        {
            let queues = self.core.queues();
            if queues.sqs.iter().chain([]).flatten().next().is_some()
                || queues.cqs.iter().flatten().next().is_some()
            {
                return Err(Status::COMMAND_SEQUENCE_ERROR);
            }
        }
        // All there are, whatever was asked for.
        let granted = self.granted();
        self.core.features().queues = granted;
        Ok(Outcome::Done(granted))
    }

    fn set_host_id(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Result<(), Status> {
        let extended = command.cdw11() & 1 != 0;
        let len = if extended { 16 } else { 8 };
        let data = self.read_data(index, command, len, guest)?;
        let mut host = [0; 16];
        put(&mut host, 0, &data);
        let mut features = self.core.features();
        if host == [0; 16] {
            // A host that takes its identifier back may not hold anything.
            features.host_id = None;
            return Ok(());
        }
        match features.host_id {
            Some((old, _)) if old != host => Err(Status::COMMAND_SEQUENCE_ERROR),
            _ => {
                features.host_id = Some((host, extended));
                Ok(())
            }
        }
    }

    /// A feature of one namespace, or of all that are attached here.
    fn set_of_namespaces(&self, index: u32, feature: u8, command: &Command) -> Answer {
        let targets = if command.nsid == u32::MAX {
            self.core.subsystem.attached_to(self.core.id)
        } else {
            vec![self.attached(command.nsid)?]
        };
        if feature == id::RESERVATION_PERSISTENCE {
            return self.set_persistence(index, targets, command.cdw11() & 1 != 0);
        }
        let mut features = self.core.features();
        for namespace in &targets {
            features.set_of(namespace.nsid(), feature, command.cdw11())?;
        }
        Ok(Outcome::Done(0))
    }

    /// Of several namespaces, those that can remember reservations are meant.
    fn set_persistence(&self, index: u32, mut targets: Vec<Arc<Namespace>>, on: bool) -> Answer {
        if on {
            targets.retain(|namespace| namespace.has_sidecar());
            if targets.is_empty() {
                return Err(Status::INVALID_FIELD);
            }
        }
        targets.retain(|namespace| namespace.change_reservations(|it| it.persistent = on).1);
        if targets.is_empty() {
            return Ok(Outcome::Done(0));
        }
        self.persist_admin(index, targets);
        Ok(Outcome::Later)
    }
}

/// The data of the timestamp feature: the time, and that the host set it or nobody did.
fn timestamp(features: &Features) -> [u8; 8] {
    let (now, origin) = match features.timestamp {
        Some((set, at)) => (set.wrapping_add(milliseconds().saturating_sub(at)), 1),
        None => (0, 0),
    };
    let mut data = (now & 0xffff_ffff_ffff).to_le_bytes();
    data[6] = origin << 1;
    data
}
