//! Identify (base specification 2.0, 5.17; NVM command set 1.0, 4.1.5).

use std::sync::Arc;

use super::{
    Namespace, Status,
    command::{Command, put, put_text},
    copy::{MAX_BLOCKS, MAX_RANGE_BLOCKS, MAX_RANGES},
    core::Core,
    events::{ERROR_ENTRIES, MAX_REQUESTS},
    features::TEMPERATURE,
    outcome::{Answer, Outcome},
    queues::NvmeQueues,
    registers::VS,
    subsystem::MAX_NAMESPACES,
};
use crate::{MemorySource, memory::BatchMemory};

/// Bytes of every structure.
const PAGE: usize = 4096;
/// The NVM command set.
const NVM: u32 = 0;

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn identify(
        &mut self,
        index: u32,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Answer {
        let page = self.core.identify(command)?;
        self.write_data(index, command, PAGE as u64, &page, guest)?;
        Ok(Outcome::Done(0))
    }
}

impl Core {
    fn identify(&self, command: &Command) -> Result<Vec<u8>, Status> {
        let cns = command.cdw10() & 0xff;
        let cntid = (command.cdw10() >> 16) as u16;
        let csi = command.cdw11() >> 24;
        let nsid = command.nsid;
        let of_nvm = |page: Vec<u8>| {
            if csi == NVM {
                Ok(page)
            } else {
                Err(Status::INVALID_FIELD)
            }
        };
        let empty = || vec![0; PAGE];
        match cns {
            // What is common to all matters to whoever creates some.
            0x00 if nsid == u32::MAX && self.subsystem.config().pool.is_some() => {
                Ok(self.common_namespace())
            }
            0x00 => Ok(self
                .active(nsid)?
                .map_or_else(empty, |namespace| self.namespace_page(&namespace))),
            0x01 => Ok(self.controller_page()),
            0x02 => self.list(nsid, true),
            0x03 => Ok(descriptors(
                &*self.active(nsid)?.ok_or(Status::INVALID_FIELD)?,
            )),
            // Of the NVM command set: no protection information, so there is nothing to say.
            0x05 => {
                if nsid != u32::MAX {
                    self.active(nsid)?;
                }
                of_nvm(empty())
            }
            0x06 => of_nvm(nvm_controller_page()),
            0x07 => of_nvm(self.list(nsid, true)?),
            0x08 => {
                let namespace = self.active(nsid)?;
                Ok(namespace.map_or_else(empty, |it| self.independent_page(&it)))
            }
            0x10 if self.manages() => self.list(nsid, false),
            0x11 if self.manages() => {
                check(nsid)?;
                let namespace = self.subsystem.namespace(nsid);
                Ok(namespace.map_or_else(empty, |it| self.namespace_page(&it)))
            }
            0x12 if self.manages() => {
                check(nsid)?;
                let namespace = self.subsystem.namespace(nsid);
                let ids = namespace.map(|it| it.attached().iter().copied().collect());
                Ok(controller_list(ids.unwrap_or_default(), cntid))
            }
            0x13 if self.manages() => Ok(controller_list(self.subsystem.controller_ids(), cntid)),
            // One pair of granularities for every format: a block, and nothing is rounded up.
            0x16 if self.manages() => {
                let mut page = empty();
                put(&mut page, 32, &512_u64.to_le_bytes());
                put(&mut page, 40, &512_u64.to_le_bytes());
                Ok(page)
            }
            0x1a if self.manages() => of_nvm(self.list(nsid, false)?),
            0x1b if self.manages() => {
                check(nsid)?;
                of_nvm(empty())
            }
            0x1c => {
                let mut page = empty();
                // The one combination: the NVM command set.
                page[0] = 1;
                Ok(page)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    pub(super) fn manages(&self) -> bool {
        self.subsystem.config().pool.is_some()
    }

    /// An attached namespace; `None` for an identifier that is valid but not active.
    fn active(&self, nsid: u32) -> Result<Option<Arc<Namespace>>, Status> {
        check(nsid)?;
        let namespace = self.subsystem.namespace(nsid);
        Ok(namespace.filter(|it| it.attached().contains(&self.id)))
    }

    /// Identifiers above `after`, attached to this controller or all.
    fn list(&self, after: u32, attached: bool) -> Result<Vec<u8>, Status> {
        if after >= u32::MAX - 1 {
            return Err(Status::INVALID_NAMESPACE);
        }
        let namespaces = if attached {
            self.subsystem.attached_to(self.id)
        } else {
            self.subsystem.namespaces()
        };
        let mut page = vec![0; PAGE];
        let ids = namespaces.iter().map(|it| it.nsid());
        for (at, id) in ids.filter(|id| *id > after).take(PAGE / 4).enumerate() {
            put(&mut page, at * 4, &id.to_le_bytes());
        }
        Ok(page)
    }

    fn controller_page(&self) -> Vec<u8> {
        let config = self.subsystem.config();
        let mut page = vec![0; PAGE];
        put(&mut page, 0, &self.config.vendor.to_le_bytes());
        put(&mut page, 2, &self.config.vendor.to_le_bytes());
        put_text(&mut page, 4, 20, &config.serial);
        put_text(&mut page, 24, 40, &config.model);
        put_text(&mut page, 64, 8, FIRMWARE);
        // RAB: no preferred burst. CMIC: whether there are other controllers.
        page[72] = 6;
        page[76] = u8::from(self.subsystem.has_several_controllers()) << 1;
        page[77] = self.config.mdts;
        put(&mut page, 78, &self.id.to_le_bytes());
        put(&mut page, 80, &VS.to_le_bytes());
        // OAES: namespace attributes. CTRATT: identifiers of 16 bytes.
        put(&mut page, 92, &(1_u32 << 8).to_le_bytes());
        put(&mut page, 96, &1_u32.to_le_bytes());
        // CNTRLTYPE: an I/O controller.
        page[111] = 1;
        put(&mut page, 256, &self.admin_commands().to_le_bytes());
        // ACL, AERL, FRMW (slot 1, read-only), LPA (commands and effects, offsets), ELPE.
        page[258] = 3;
        page[259] = (MAX_REQUESTS - 1) as u8;
        page[260] = 1 << 1 | 1;
        page[261] = 1 << 1 | 1 << 2 | 1 << 5;
        page[262] = (ERROR_ENTRIES - 1) as u8;
        // Temperatures at which a drive would warn: nothing here gets warm.
        put(&mut page, 266, &(TEMPERATURE + 45).to_le_bytes());
        put(&mut page, 268, &(TEMPERATURE + 60).to_le_bytes());
        if let Some(pool) = &config.pool {
            let free = pool.capacity.saturating_sub(self.subsystem.pool_used());
            put(&mut page, 280, &u128::from(pool.capacity).to_le_bytes());
            put(&mut page, 296, &u128::from(free).to_le_bytes());
        }
        put(&mut page, 328, &self.sanitize_capabilities().to_le_bytes());
        // NSETIDMAX and such do not exist. SQES, CQES: 64 and 16 bytes, no others.
        page[512] = 0x66;
        page[513] = 0x44;
        put(&mut page, 516, &MAX_NAMESPACES.to_le_bytes());
        put(&mut page, 520, &self.nvm_commands().to_le_bytes());
        // FUSES: compare and write.
        put(&mut page, 522, &1_u16.to_le_bytes());
        // FNA: a format is of one namespace, and there is no cryptographic erase.
        // VWC: there is a cache, and a flush of all namespaces is understood.
        page[525] = 1 | 3 << 1;
        // AWUN, AWUPF, ACWU: one block. NVSCC, NWPC: nothing. OCFS: descriptor format 0.
        put(&mut page, 534, &1_u16.to_le_bytes());
        // SGLS: byte aligned, bit buckets.
        put(&mut page, 536, &(1_u32 | 1 << 16).to_le_bytes());
        put(&mut page, 540, &MAX_NAMESPACES.to_le_bytes());
        let nqn = config.nqn.as_bytes();
        put(&mut page, 768, nqn);
        // Power state 0: 25 W, as if it were a drive.
        put(&mut page, 2048, &2500_u16.to_le_bytes());
        page
    }

    /// OACS.
    fn admin_commands(&self) -> u16 {
        let format = u16::from(self.all_remember()) << 1;
        let manage = u16::from(self.manages()) << 3;
        let shadow = 1 << 8;
        format | manage | shadow
    }

    /// Whether every namespace's sidecar can remember something.
    pub(super) fn all_remember(&self) -> bool {
        let namespaces = self.subsystem.namespaces();
        !namespaces.is_empty() && namespaces.iter().all(|it| it.has_sidecar())
    }

    /// ONCS.
    fn nvm_commands(&self) -> u16 {
        let compare = 1;
        let uncorrectable = u16::from(self.all_remember()) << 1;
        let dsm = 1 << 2;
        let zeroes = 1 << 3;
        let reservations = 1 << 5;
        let timestamp = 1 << 6;
        let verify = 1 << 7;
        let copy = 1 << 8;
        compare | uncorrectable | dsm | zeroes | reservations | timestamp | verify | copy
    }

    /// Whether the data of every namespace can really be removed, and that be remembered.
    pub(super) fn can_sanitize(&self) -> bool {
        self.all_remember() && self.subsystem.namespaces().iter().all(|it| it.can_erase())
    }

    /// SANICAP: block erase and overwrite; no-deallocate changes nothing afterwards.
    fn sanitize_capabilities(&self) -> u32 {
        if self.can_sanitize() {
            1 << 1 | 1 << 2 | 1 << 30
        } else {
            0
        }
    }

    /// Identify Namespace for the identifier that means all: what they have in common.
    fn common_namespace(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        formats(&mut page);
        page
    }

    fn namespace_page(&self, namespace: &Namespace) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        let blocks = namespace.blocks();
        // NSZE, NCAP, NUSE: the disk is as large as it says.
        put(&mut page, 0, &blocks.to_le_bytes());
        put(&mut page, 8, &blocks.to_le_bytes());
        put(&mut page, 16, &blocks.to_le_bytes());
        // NSFEAT: identifiers are never used again; preferred sizes are given below.
        page[24] = 1 << 3 | 1 << 4;
        formats(&mut page);
        page[26] = u8::from(namespace.lba_size() == 4096);
        // NMIC: may be shared, if there is somebody to share it with.
        page[30] = u8::from(self.subsystem.has_several_controllers());
        page[31] = reservation_capabilities(namespace);
        // FPI: no progress indicator.
        // DLFEAT: deallocated blocks read as zeroes; write zeroes may deallocate.
        page[33] = 1 | 1 << 3;
        let topology = namespace.disk().topology();
        let lba = u64::from(namespace.lba_size());
        let in_blocks = |bytes: u32| {
            let blocks = (u64::from(bytes) / lba).clamp(1, 1 << 16) - 1;
            (blocks as u16).to_le_bytes()
        };
        put(&mut page, 64, &in_blocks(topology.physical_block_size));
        put(&mut page, 66, &in_blocks(topology.physical_block_size));
        let granularity = namespace.disk().capabilities().discard_granularity;
        put(&mut page, 68, &in_blocks(granularity));
        put(&mut page, 70, &in_blocks(granularity));
        put(&mut page, 72, &in_blocks(topology.optimal_io_size));
        // MSSRL, MCL, MSRC.
        put(&mut page, 74, &MAX_RANGE_BLOCKS.to_le_bytes());
        put(&mut page, 76, &MAX_BLOCKS.to_le_bytes());
        page[80] = (MAX_RANGES - 1) as u8;
        page[99] = u8::from(namespace.is_read_only());
        put(&mut page, 104, &namespace.identity().nguid);
        put(&mut page, 120, &namespace.identity().eui64);
        page
    }

    /// CNS 08h.
    fn independent_page(&self, namespace: &Namespace) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[0] = 1 << 3;
        page[1] = u8::from(self.subsystem.has_several_controllers());
        page[2] = reservation_capabilities(namespace);
        // NSATTR: write protected. NSTAT: ready.
        page[8] = u8::from(namespace.is_read_only());
        page[14] = 1;
        page
    }
}

/// FR: the one firmware revision.
pub(super) const FIRMWARE: &str = "1";

/// An identifier that a namespace could have.
fn check(nsid: u32) -> Result<(), Status> {
    if nsid == 0 || nsid > MAX_NAMESPACES {
        return Err(Status::INVALID_NAMESPACE);
    }
    Ok(())
}

/// NLBAF and the formats: 512 and 4096 bytes, without metadata.
fn formats(page: &mut [u8]) {
    page[25] = 1;
    put(page, 128, &(9_u32 << 16).to_le_bytes());
    put(page, 132, &(12_u32 << 16).to_le_bytes());
}

/// RESCAP: every kind; persistence through power loss where there is a sidecar; the newer meaning
/// of "ignore existing key".
fn reservation_capabilities(namespace: &Namespace) -> u8 {
    u8::from(namespace.has_sidecar()) | 0b1111_1110
}

/// CNS 03h: what identifies the namespace, and its command set.
fn descriptors(namespace: &Namespace) -> Vec<u8> {
    let identity = namespace.identity();
    let mut list = Vec::new();
    let mut add = |kind: u8, id: &[u8]| {
        if id.iter().any(|byte| *byte != 0) {
            list.extend_from_slice(&[kind, id.len() as u8, 0, 0]);
            list.extend_from_slice(id);
        }
    };
    add(1, &identity.eui64);
    add(2, &identity.nguid);
    add(3, &identity.uuid);
    list.extend_from_slice(&[4, 1, 0, 0, NVM as u8]);
    list.resize(PAGE, 0);
    list
}

/// CNS 06h: limits of the NVM commands.
fn nvm_controller_page() -> Vec<u8> {
    let mut page = vec![0; PAGE];
    // VSL, WZSL, WUSL: no limit but the field. DMRL; DMRSL and DMSL: no limit.
    page[3] = 255;
    page
}

/// Identifiers of controllers from `from` on.
fn controller_list(mut ids: Vec<u16>, from: u16) -> Vec<u8> {
    ids.retain(|id| *id >= from);
    ids.sort_unstable();
    ids.truncate(2047);
    let mut page = vec![0; PAGE];
    put(&mut page, 0, &(ids.len() as u16).to_le_bytes());
    for (at, id) in ids.iter().enumerate() {
        put(&mut page, 2 + at * 2, &id.to_le_bytes());
    }
    page
}
