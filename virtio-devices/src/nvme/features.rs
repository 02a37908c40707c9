//! The values of features (base specification 2.0, 5.27.1), and who may change them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Status;

pub(super) mod id {
    pub(in crate::nvme) const ARBITRATION: u8 = 0x01;
    pub(in crate::nvme) const POWER: u8 = 0x02;
    pub(in crate::nvme) const TEMPERATURE: u8 = 0x04;
    pub(in crate::nvme) const ERROR_RECOVERY: u8 = 0x05;
    pub(in crate::nvme) const WRITE_CACHE: u8 = 0x06;
    pub(in crate::nvme) const QUEUES: u8 = 0x07;
    pub(in crate::nvme) const COALESCING: u8 = 0x08;
    pub(in crate::nvme) const VECTOR: u8 = 0x09;
    pub(in crate::nvme) const ATOMICITY: u8 = 0x0a;
    pub(in crate::nvme) const EVENTS: u8 = 0x0b;
    pub(in crate::nvme) const TIMESTAMP: u8 = 0x0e;
    pub(in crate::nvme) const HOST_BEHAVIOUR: u8 = 0x16;
    pub(in crate::nvme) const HOST_ID: u8 = 0x81;
    pub(in crate::nvme) const RESERVATION_MASK: u8 = 0x82;
    pub(in crate::nvme) const RESERVATION_PERSISTENCE: u8 = 0x83;
}

/// What a feature is like: bits of the "supported capabilities" of Get Features.
pub(super) mod capability {
    pub(in crate::nvme) const NAMESPACE: u32 = 1 << 1;
    pub(in crate::nvme) const CHANGEABLE: u32 = 1 << 2;
}

/// The temperature that is reported, in kelvin.
pub(super) const TEMPERATURE: u16 = 273 + 25;
/// The thresholds of a fresh controller.
const OVER: u16 = 273 + 70;
const UNDER: u16 = 0;

/// Bits of the asynchronous event configuration that can be set: SMART, namespace attributes.
const EVENT_BITS: u32 = 0x1f | 1 << 8;

/// The features that a controller has once for each namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamespaceFeatures {
    pub(super) error_recovery: u16,
    pub(super) reservation_mask: u32,
}

/// The features of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Features {
    pub(super) arbitration: u32,
    /// The workload hint, which changes nothing; the power state is always 0.
    power: u32,
    pub(super) over: u16,
    pub(super) under: u16,
    pub(super) write_cache: bool,
    /// I/O queues granted, 0's based, both kinds; 0: not asked yet.
    pub(super) queues: u32,
    pub(super) coalescing: u16,
    /// Vectors without coalescing.
    pub(super) uncoalesced: Vec<bool>,
    pub(super) disable_normal: bool,
    pub(super) events: u32,
    /// Milliseconds since the epoch that the host set, and what our clock showed then.
    pub(super) timestamp: Option<(u64, u64)>,
    pub(super) host_behaviour: [u8; 4],
    pub(super) host_id: Option<([u8; 16], bool)>,
    /// By namespace identifier; one that is not here has the defaults.
    pub(super) namespaces: BTreeMap<u32, NamespaceFeatures>,
}

impl Features {
    pub(super) fn new(vectors: u16) -> Self {
        Self {
            // No limit on the burst.
            arbitration: 7,
            power: 0,
            over: OVER,
            under: UNDER,
            write_cache: true,
            queues: 0,
            coalescing: 0,
            uncoalesced: vec![false; usize::from(vectors)],
            disable_normal: false,
            events: 0,
            timestamp: None,
            host_behaviour: [0; 4],
            host_id: None,
            namespaces: BTreeMap::new(),
        }
    }

    /// Capabilities of a feature.
    pub(super) fn capabilities(feature: u8) -> Result<u32, Status> {
        Ok(match feature {
            id::ERROR_RECOVERY | id::RESERVATION_MASK | id::RESERVATION_PERSISTENCE => {
                capability::CHANGEABLE | capability::NAMESPACE
            }
            id::ARBITRATION
            | id::POWER
            | id::TEMPERATURE
            | id::WRITE_CACHE
            | id::QUEUES
            | id::COALESCING
            | id::VECTOR
            | id::ATOMICITY
            | id::EVENTS
            | id::TIMESTAMP
            | id::HOST_BEHAVIOUR
            | id::HOST_ID => capability::CHANGEABLE,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// The features of one namespace.
    pub(super) fn of(&self, nsid: u32) -> NamespaceFeatures {
        self.namespaces.get(&nsid).copied().unwrap_or_default()
    }

    /// Sets a feature of a namespace whose value is dword 11.
    pub(super) fn set_of(&mut self, nsid: u32, feature: u8, value: u32) -> Result<(), Status> {
        let mut of = self.of(nsid);
        match feature {
            // DULBE needs a namespace that reports deallocated blocks; none does.
            id::ERROR_RECOVERY if value & 1 << 16 != 0 => return Err(Status::INVALID_FIELD),
            id::ERROR_RECOVERY => of.error_recovery = value as u16,
            id::RESERVATION_MASK => of.reservation_mask = value & 0b1110,
            _ => return Err(Status::INVALID_FIELD),
        }
        self.namespaces.insert(nsid, of);
        Ok(())
    }

    /// The value of a feature that fits a dword; `of` is dword 11 of the command.
    pub(super) fn dword(&self, feature: u8, of: u32) -> Result<u32, Status> {
        Ok(match feature {
            id::ARBITRATION => self.arbitration,
            id::TEMPERATURE => match (of >> 20 & 3, of >> 16 & 15) {
                (0, 0) => u32::from(self.over),
                (1, 0) => u32::from(self.under),
                // Other sensors do not exist.
                _ => return Err(Status::INVALID_FIELD),
            },
            id::WRITE_CACHE => u32::from(self.write_cache),
            id::QUEUES => self.queues,
            id::COALESCING => u32::from(self.coalescing),
            id::VECTOR => {
                let vector = of & 0xffff;
                let place = self.uncoalesced.get(vector as usize);
                let uncoalesced = *place.ok_or(Status::INVALID_FIELD)?;
                // Coalescing never applies to the admin completion queue.
                vector | u32::from(uncoalesced || vector == 0) << 16
            }
            id::ATOMICITY => u32::from(self.disable_normal),
            id::EVENTS => self.events,
            id::POWER => self.power,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Sets a feature whose value is dword 11.
    pub(super) fn set_dword(&mut self, feature: u8, value: u32) -> Result<(), Status> {
        match feature {
            id::ARBITRATION => self.arbitration = value,
            // There is power state 0 alone.
            id::POWER if value & 31 != 0 => return Err(Status::INVALID_FIELD),
            id::POWER => self.power = value & 7 << 5,
            id::TEMPERATURE => {
                let place = match (value >> 20 & 3, value >> 16 & 15) {
                    (0, 0 | 15) => &mut self.over,
                    (1, 0 | 15) => &mut self.under,
                    _ => return Err(Status::INVALID_FIELD),
                };
                *place = value as u16;
            }
            id::WRITE_CACHE => self.write_cache = value & 1 != 0,
            id::COALESCING => self.coalescing = value as u16,
            id::VECTOR => {
                let place = self.uncoalesced.get_mut((value & 0xffff) as usize);
                *place.ok_or(Status::INVALID_FIELD)? = value & 1 << 16 != 0;
            }
            id::ATOMICITY => self.disable_normal = value & 1 != 0,
            id::EVENTS => self.events = value & EVENT_BITS,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }

    /// Whether the temperature is beyond a threshold, as SMART's critical warning says it.
    pub(super) fn is_hot(&self) -> bool {
        TEMPERATURE >= self.over || TEMPERATURE <= self.under
    }

    /// Whether the host wants to be told of changes to namespaces.
    pub(super) fn tells_namespaces(&self) -> bool {
        self.events & 1 << 8 != 0
    }

    /// Whether the host wants to be told of temperatures.
    pub(super) fn tells_temperature(&self) -> bool {
        self.events & 2 != 0
    }

    /// What a controller reset does: everything is as it was at the start.
    pub(super) fn reset(&mut self) {
        let vectors = self.uncoalesced.len() as u16;
        // The timestamp goes on (its origin says that the host set it), and so does the host.
        *self = Self {
            timestamp: self.timestamp,
            ..Self::new(vectors)
        };
    }
}
