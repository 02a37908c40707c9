//! Namespace Management and Attachment, Format NVM, Sanitize.

use std::sync::Arc;

use super::{
    Namespace, NamespaceConfig, Status,
    command::{Command, le32, le64},
    core::{Core, Mail},
    namespace::flag,
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
};
use crate::{
    MemorySource,
    host::{Action, erase},
    memory::BatchMemory,
};

impl<S: MemorySource> NvmeQueues<S> {
    /// Does host work on the thread for it; the command ends when it is done.
    fn later(
        &self,
        index: u32,
        work: impl FnOnce(&Arc<Core>) -> Result<u32, Status> + Send + 'static,
    ) {
        let token = self.slots.id(index);
        let core = Arc::clone(&self.core);
        self.core.subsystem.jobs.run(move || {
            let (status, dw0) = match work(&core) {
                Ok(dw0) => (Status::SUCCESS, dw0),
                Err(status) => (status, 0),
            };
            core.ports[0].send(Mail::Ended { token, status, dw0 });
        });
    }

    /// Writes sidecars; the command ends when they are durable.
    pub(super) fn persist_admin(&self, index: u32, namespaces: Vec<Arc<Namespace>>) {
        self.later(index, move |_| {
            namespaces.iter().try_for_each(|it| persist(it))?;
            Ok(0)
        });
    }

    pub(super) fn namespace_management(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        match command.cdw10() & 15 {
            0 => {
                if command.cdw11() >> 24 != 0 {
                    return Err(Status::IO_COMMAND_SET_NOT_SUPPORTED);
                }
                let data = self.read_data(index, command, 4096, guest)?;
                let blocks = le64(&data, 0);
                let format = data[26] & 15;
                if format > 1 {
                    return Err(Status::INVALID_FORMAT);
                }
                if le64(&data, 8) != blocks {
                    return Err(Status::THIN_PROVISIONING_NOT_SUPPORTED);
                }
                if data[29] != 0 || blocks == 0 || le32(&data, 92) != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                let lba = if format == 1 { 4096 } else { 512 };
                let bytes = blocks
                    .checked_mul(u64::from(lba))
                    .ok_or(Status::NAMESPACE_INSUFFICIENT_CAPACITY)?;
                self.later(index, move |core| create(core, bytes, lba));
            }
            1 => {
                let nsid = command.nsid;
                let targets: Vec<u32> = if nsid == u32::MAX {
                    let all = self.core.subsystem.namespaces();
                    let pooled = all.iter().filter(|it| it.pooled().is_some());
                    pooled.map(|it| it.nsid()).collect()
                } else {
                    self.deletable(nsid)?;
                    vec![nsid]
                };
                self.later(index, move |core| {
                    for nsid in targets {
                        delete(core, nsid);
                    }
                    Ok(0)
                });
            }
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(Outcome::Later)
    }

    /// A namespace that was configured can be detached, not deleted.
    fn deletable(&self, nsid: u32) -> Result<(), Status> {
        let namespace = self.core.subsystem.namespace(nsid);
        let namespace =
            namespace.ok_or(if nsid == 0 || nsid > super::subsystem::MAX_NAMESPACES {
                Status::INVALID_NAMESPACE
            } else {
                Status::INVALID_FIELD
            })?;
        if namespace.pooled().is_none() {
            return Err(Status::INVALID_FIELD);
        }
        Ok(())
    }

    pub(super) fn namespace_attachment(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let nsid = command.nsid;
        let select = command.cdw10() & 15;
        let data = self.read_data(index, command, 4096, guest)?;
        let namespace = self
            .core
            .subsystem
            .namespace(nsid)
            .ok_or(Status::INVALID_FIELD)?;
        let count = usize::from(data[0]) | usize::from(data[1]) << 8;
        let list = data[2..].chunks_exact(2).take(count.min(2047));
        let ids: Vec<u16> = list.map(|id| u16::from_le_bytes([id[0], id[1]])).collect();
        let known = self.core.subsystem.controller_ids();
        if count == 0
            || count > 2047
            || !ids.iter().all(|id| known.contains(id))
            || !ids.is_sorted_by(|a, b| a < b)
        {
            return Err(Status::CONTROLLER_LIST_INVALID);
        }
        {
            let mut attached = namespace.attached();
            match select {
                0 if ids.iter().any(|id| attached.contains(id)) => {
                    return Err(Status::NAMESPACE_ALREADY_ATTACHED);
                }
                0 => attached.extend(ids.iter().copied()),
                1 if !ids.iter().all(|id| attached.contains(id)) => {
                    return Err(Status::NAMESPACE_NOT_ATTACHED);
                }
                1 => attached.retain(|id| !ids.contains(id)),
                _ => return Err(Status::INVALID_FIELD),
            }
        }
        // The controllers it is about are told; the one that was asked knows already.
        let ours = self.core.id;
        self.core.subsystem.tell(|id, listener| {
            if ids.contains(&id) {
                listener.namespaces_changed(if id == ours {
                    &[]
                } else {
                    std::slice::from_ref(&nsid)
                });
            }
        });
        if namespace.choose(&ids, select == 0) {
            self.persist_admin(index, vec![namespace]);
            return Ok(Outcome::Later);
        }
        Ok(Outcome::Done(0))
    }

    pub(super) fn format_nvm(&mut self, index: u32, command: &Command) -> Answer {
        if !self.core.all_remember() {
            return Err(Status::INVALID_OPCODE);
        }
        let value = command.cdw10();
        let format = value & 15 | (value >> 12 & 3) << 4;
        let erase = value >> 9 & 7;
        if format > 1 {
            return Err(Status::INVALID_FORMAT);
        }
        // No protection information; without metadata its place means nothing.
        if value & 7 << 5 != 0 {
            return Err(Status::INVALID_FORMAT);
        }
        if erase > 1 {
            return Err(Status::INVALID_FIELD);
        }
        let lba = if format == 1 { 4096 } else { 512 };
        let targets = if command.nsid == u32::MAX {
            self.core.subsystem.attached_to(self.core.id)
        } else {
            if command.nsid == 0 || command.nsid > super::subsystem::MAX_NAMESPACES {
                return Err(Status::INVALID_NAMESPACE);
            }
            let namespace = self.core.subsystem.namespace(command.nsid);
            vec![namespace.ok_or(Status::INVALID_FIELD)?]
        };
        let host = self.core.host_id().0;
        for namespace in &targets {
            if namespace.is_read_only() {
                return Err(Status::NAMESPACE_WRITE_PROTECTED);
            }
            if Self::is_formatting(namespace) {
                return Err(Status::FORMAT_IN_PROGRESS);
            }
            if !namespace
                .reservations()
                .allows(host, super::reservation::Access::Write)
            {
                return Err(Status::RESERVATION_CONFLICT);
            }
            if erase == 1 && !namespace.can_erase() {
                return Err(Status::INVALID_FIELD);
            }
            if !namespace.disk().size().is_multiple_of(u64::from(lba)) && lba == 4096 {
                // The last block would be cut off; that is allowed, but an empty disk is not.
                if namespace.disk().size() < u64::from(lba) {
                    return Err(Status::INVALID_FORMAT);
                }
            }
        }
        for namespace in &targets {
            namespace.set_flag(flag::FORMATTING, true);
        }
        self.later(index, move |core| {
            let mut result = Ok(0);
            for namespace in &targets {
                if result.is_ok() {
                    result = format_one(namespace, lba, erase == 1).map(|()| 0);
                }
                namespace.set_flag(flag::FORMATTING, false);
            }
            let nsids: Vec<u32> = targets.iter().map(|it| it.nsid()).collect();
            core.subsystem.changed(&nsids);
            result
        });
        Ok(Outcome::Later)
    }

    pub(super) fn sanitize(&mut self, index: u32, command: &Command) -> Answer {
        if !self.core.can_sanitize() {
            return Err(Status::INVALID_OPCODE);
        }
        let value = command.cdw10();
        let subsystem = &self.core.subsystem;
        let restricted = subsystem.sanitize.has_failed_restricted();
        let action = match value & 7 {
            1 if restricted => return Err(Status::SANITIZE_FAILED),
            1 => {
                if !subsystem.sanitize.leave_failure() {
                    return Ok(Outcome::Done(0));
                }
                self.later(index, |core| remember_sanitize(core).map(|()| 0));
                return Ok(Outcome::Later);
            }
            2 => Action::BlockErase,
            3 => Action::Overwrite {
                pattern: command.cdw11(),
                passes: (value >> 4 & 15) as u8,
                invert: value & 1 << 8 != 0,
            },
            _ => return Err(Status::INVALID_FIELD),
        };
        if restricted && value & 8 != 0 {
            return Err(Status::SANITIZE_FAILED);
        }
        if subsystem
            .namespaces()
            .iter()
            .any(|it| Self::is_formatting(it))
        {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if !subsystem.start_sanitize(action, value) {
            return Err(Status::SANITIZE_IN_PROGRESS);
        }
        Ok(Outcome::Done(0))
    }
}

fn persist(namespace: &Namespace) -> Result<(), Status> {
    namespace.persist().map_err(|error| {
        tracing::error!(nsid = namespace.nsid(), %error, "not remembered");
        Status::INTERNAL_ERROR
    })
}

/// What log page 81h says is still there after a restart.
fn remember_sanitize(core: &Core) -> Result<(), Status> {
    for namespace in core.subsystem.namespaces() {
        namespace.set_sanitized(core.subsystem.sanitize.saved());
        persist(&namespace)?;
    }
    Ok(())
}

/// Creates a namespace in the pool; returns its identifier.
fn create(core: &Core, bytes: u64, lba_size: u32) -> Result<u32, Status> {
    let subsystem = &core.subsystem;
    let Some(pool) = subsystem.config().pool.clone() else {
        return Err(Status::INVALID_OPCODE);
    };
    let _pool = subsystem.pool.lock();
    let free = pool.capacity.saturating_sub(subsystem.pool_used());
    if bytes > free {
        return Err(Status::NAMESPACE_INSUFFICIENT_CAPACITY);
    }
    let nsid = (1..=super::subsystem::MAX_NAMESPACES)
        .find(|nsid| subsystem.namespace(*nsid).is_none() && pool.is_free(*nsid))
        .ok_or(Status::NAMESPACE_ID_UNAVAILABLE)?;
    let path = pool.image(nsid);
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(path = %path.display(), %error, "no namespace was created");
        Status::INTERNAL_ERROR
    };
    let disk = (pool.create)(&path, bytes).map_err(|error| failed(&error))?;
    let config = NamespaceConfig {
        nsid: Some(nsid),
        lba_size,
        sidecar: Some(pool.sidecar(nsid)),
        ..NamespaceConfig::default()
    };
    subsystem
        .insert(disk, &config, Some(path.clone()))
        .map_err(|error| failed(&error))?;
    // What names it and how large its blocks are is there before a host can use it.
    if let Some(namespace) = subsystem.namespace(nsid)
        && let Err(status) = persist(&namespace)
    {
        delete(core, nsid);
        return Err(status);
    }
    Ok(nsid)
}

/// Deletes a namespace of the pool. That it is gone already is what was asked for.
fn delete(core: &Core, nsid: u32) {
    if let Err(error) = core.subsystem.delete_namespace(nsid) {
        tracing::error!(nsid, %error, "deleting a namespace");
    }
}

/// Formats a namespace: nothing of what it held can be read afterwards.
fn format_one(namespace: &Namespace, lba: u32, secure: bool) -> Result<(), Status> {
    // What was in flight ends first; nothing new begins, because of the flag.
    while !namespace.gate.claim() {
        std::thread::yield_now();
    }
    while !namespace.gate.is_quiet() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let disk = namespace.disk();
    let size = disk.size();
    let done = if secure {
        erase(disk, Action::BlockErase, &|| false, &mut |_| ()).map(|_| ())
    } else {
        disk.write_zeroes(0, size, true)
    };
    let done = done.and_then(|()| disk.flush());
    namespace.gate.release();
    if let Err(error) = done {
        tracing::error!(nsid = namespace.nsid(), %error, "format");
        return Err(Status::of_disk(error.kind(), true));
    }
    namespace.mark(|marks| *marks = super::uncorrectable::Uncorrectable::default());
    namespace.set_lba_size(lba);
    persist(namespace)
}
