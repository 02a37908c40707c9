//! Reservations of a namespace (base specification 2.0, 8.19): who is registered, who holds it.

use serde::{Deserialize, Serialize};

use super::Status;

/// A host, by its identifier; one of 8 bytes is extended with zeroes.
pub(super) type HostId = [u8; 16];

/// The most registrants of a namespace.
const MAX_REGISTRANTS: usize = 128;

/// What a notice in the log of a controller says happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// A host's registration was removed by another.
    RegistrationPreempted,
    /// The holder released it.
    Released,
    /// The reservation was taken from its holder.
    ReservationPreempted,
}

/// A registered host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registrant {
    pub(super) host: HostId,
    pub(super) key: u64,
    /// The controller through which it registered last.
    pub(super) controller: u16,
    /// Its identifier has 16 bytes.
    pub(super) extended: bool,
}

/// What survives a power cycle, if the host asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedReservations {
    pub(super) generation: u32,
    pub(super) kind: u8,
    pub(super) holder: Option<HostId>,
    pub(super) registrants: Vec<Registrant>,
}

/// Kinds of reservation.
const WRITE_EXCLUSIVE: u8 = 1;
const EXCLUSIVE_ACCESS: u8 = 2;
const WRITE_EXCLUSIVE_REGISTRANTS: u8 = 3;
const EXCLUSIVE_ACCESS_REGISTRANTS: u8 = 4;
const WRITE_EXCLUSIVE_ALL: u8 = 5;
const EXCLUSIVE_ACCESS_ALL: u8 = 6;

/// What a command wants to do, as far as reservations care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// The reservation state of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reservations {
    generation: u32,
    kind: u8,
    holder: Option<HostId>,
    registrants: Vec<Registrant>,
    /// Persist through power loss.
    pub(super) persistent: bool,
}

/// A host that is told, with what.
pub(super) type Told = Vec<(HostId, Notice)>;

impl Reservations {
    pub(super) fn restored(saved: &SavedReservations) -> Self {
        let mut registrants = saved.registrants.clone();
        registrants.truncate(MAX_REGISTRANTS);
        let kind = if saved.kind <= EXCLUSIVE_ACCESS_ALL {
            saved.kind
        } else {
            0
        };
        Self {
            generation: saved.generation,
            kind,
            holder: saved.holder,
            registrants,
            persistent: true,
        }
    }

    pub(super) fn saved(&self) -> Option<SavedReservations> {
        self.persistent.then(|| self.state())
    }

    pub(super) fn state(&self) -> SavedReservations {
        SavedReservations {
            generation: self.generation,
            kind: self.kind,
            holder: self.holder,
            registrants: self.registrants.clone(),
        }
    }

    /// Whether any command has to be checked at all.
    pub(super) fn is_held(&self) -> bool {
        self.kind != 0
    }

    fn find(&self, host: HostId) -> Option<usize> {
        self.registrants.iter().position(|it| it.host == host)
    }

    fn is_registrants_kind(&self) -> bool {
        self.kind >= WRITE_EXCLUSIVE_REGISTRANTS
    }

    fn is_all_kind(&self) -> bool {
        matches!(self.kind, WRITE_EXCLUSIVE_ALL | EXCLUSIVE_ACCESS_ALL)
    }

    fn is_holder(&self, host: HostId) -> bool {
        if self.is_all_kind() {
            return self.find(host).is_some();
        }
        self.kind != 0 && self.holder == Some(host)
    }

    /// Whether `host` may do that now.
    pub(super) fn allows(&self, host: HostId, access: Access) -> bool {
        let registered = || self.find(host).is_some();
        match self.kind {
            0 => true,
            WRITE_EXCLUSIVE => access == Access::Read || self.is_holder(host),
            EXCLUSIVE_ACCESS => self.is_holder(host),
            WRITE_EXCLUSIVE_REGISTRANTS | WRITE_EXCLUSIVE_ALL => {
                access == Access::Read || registered()
            }
            EXCLUSIVE_ACCESS_REGISTRANTS | EXCLUSIVE_ACCESS_ALL => registered(),
            _ => false,
        }
    }

    /// Reservation Register.
    pub(super) fn register(
        &mut self,
        action: u8,
        ignore_key: bool,
        current: u64,
        new: u64,
        by: Registrant,
    ) -> Result<Told, Status> {
        let at = self.find(by.host);
        let mut told = Told::new();
        match action {
            0 => match at {
                Some(at) if self.registrants[at].key == new => {
                    self.registrants[at].controller = by.controller;
                }
                Some(_) => return Err(Status::RESERVATION_CONFLICT),
                None => self.add(Registrant { key: new, ..by })?,
            },
            1 => {
                let at = at.ok_or(Status::RESERVATION_CONFLICT)?;
                if !ignore_key && self.registrants[at].key != current {
                    return Err(Status::RESERVATION_CONFLICT);
                }
                self.remove(at, &mut told);
            }
            2 => match at {
                Some(at) if ignore_key || self.registrants[at].key == current => {
                    self.registrants[at].key = new;
                }
                None if ignore_key => self.add(Registrant { key: new, ..by })?,
                _ => return Err(Status::RESERVATION_CONFLICT),
            },
            _ => return Err(Status::INVALID_FIELD),
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(told)
    }

    fn add(&mut self, registrant: Registrant) -> Result<(), Status> {
        if self.registrants.len() >= MAX_REGISTRANTS {
            return Err(Status::RESERVATION_CONFLICT);
        }
        self.registrants.push(registrant);
        Ok(())
    }

    /// Removes a registration, and the reservation with it if it was its last holder.
    fn remove(&mut self, at: usize, told: &mut Told) {
        let gone = self.registrants.remove(at);
        let was_holder = self.kind != 0
            && if self.is_all_kind() {
                self.registrants.is_empty()
            } else {
                self.holder == Some(gone.host)
            };
        if was_holder {
            self.release_now(gone.host, told);
        }
    }

    fn release_now(&mut self, by: HostId, told: &mut Told) {
        if self.is_registrants_kind() {
            let others = self.registrants.iter().filter(|it| it.host != by);
            told.extend(others.map(|it| (it.host, Notice::Released)));
        }
        self.kind = 0;
        self.holder = None;
    }

    /// Reservation Acquire.
    pub(super) fn acquire(
        &mut self,
        action: u8,
        ignore_key: bool,
        kind: u8,
        current: u64,
        preempted: u64,
        by: HostId,
    ) -> Result<Told, Status> {
        let at = self.find(by).ok_or(Status::RESERVATION_CONFLICT)?;
        if !ignore_key && self.registrants[at].key != current {
            return Err(Status::RESERVATION_CONFLICT);
        }
        if !(WRITE_EXCLUSIVE..=EXCLUSIVE_ACCESS_ALL).contains(&kind) {
            return Err(Status::INVALID_FIELD);
        }
        match action {
            0 if self.kind == 0 => {
                self.take(kind, by);
                Ok(Told::new())
            }
            0 if self.is_holder(by) && self.kind == kind => Ok(Told::new()),
            0 => Err(Status::RESERVATION_CONFLICT),
            // Nothing is in flight on behalf of another host that could be aborted: what was taken
            // before is finished.
            1 | 2 => self.preempt(kind, preempted, by),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn take(&mut self, kind: u8, by: HostId) {
        self.kind = kind;
        self.holder = Some(by);
    }

    fn preempt(&mut self, kind: u8, key: u64, by: HostId) -> Result<Told, Status> {
        let mut told = Told::new();
        if self.is_all_kind() && key == 0 {
            self.unregister_others(|_| true, by, &mut told);
            self.take(kind, by);
        } else {
            if key == 0 {
                return Err(Status::INVALID_FIELD);
            }
            let holder_key = self.holder.and_then(|holder| {
                let at = self.find(holder)?;
                Some(self.registrants[at].key)
            });
            let takes = self.kind != 0 && !self.is_all_kind() && holder_key == Some(key);
            if !self.registrants.iter().any(|it| it.key == key) {
                return Err(Status::RESERVATION_CONFLICT);
            }
            let old_kind = self.kind;
            self.unregister_others(|it| it.key == key, by, &mut told);
            if takes {
                if old_kind != kind && old_kind >= WRITE_EXCLUSIVE_REGISTRANTS {
                    let others = self.registrants.iter().filter(|it| it.host != by);
                    told.extend(others.map(|it| (it.host, Notice::Released)));
                }
                self.take(kind, by);
            } else if self.is_all_kind() && self.registrants.is_empty() {
                self.kind = 0;
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(told)
    }

    fn unregister_others(
        &mut self,
        matches: impl Fn(&Registrant) -> bool,
        by: HostId,
        told: &mut Told,
    ) {
        let holder = self.holder.filter(|_| self.kind != 0);
        self.registrants.retain(|it| {
            if it.host == by || !matches(it) {
                return true;
            }
            told.push((it.host, Notice::RegistrationPreempted));
            if holder == Some(it.host) {
                told.push((it.host, Notice::ReservationPreempted));
            }
            false
        });
    }

    /// Reservation Release.
    pub(super) fn release(
        &mut self,
        action: u8,
        ignore_key: bool,
        kind: u8,
        current: u64,
        by: HostId,
    ) -> Result<Told, Status> {
        let at = self.find(by).ok_or(Status::RESERVATION_CONFLICT)?;
        if !ignore_key && self.registrants[at].key != current {
            return Err(Status::RESERVATION_CONFLICT);
        }
        let mut told = Told::new();
        match action {
            0 => {
                if !self.is_holder(by) {
                    return Ok(told);
                }
                if kind != self.kind {
                    return Err(Status::INVALID_FIELD);
                }
                self.release_now(by, &mut told);
            }
            1 => {
                let others = self.registrants.iter().filter(|it| it.host != by);
                told.extend(others.map(|it| (it.host, Notice::RegistrationPreempted)));
                self.registrants.clear();
                self.kind = 0;
                self.holder = None;
                self.generation = self.generation.wrapping_add(1);
            }
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(told)
    }

    /// The data of Reservation Report: the extended form, or the one with identifiers of 8 bytes.
    pub(super) fn report(&self, extended: bool) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.push(self.kind);
        out.extend_from_slice(&(self.registrants.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.push(u8::from(self.persistent));
        out.resize(if extended { 64 } else { 24 }, 0);
        for registrant in &self.registrants {
            let start = out.len();
            out.extend_from_slice(&registrant.controller.to_le_bytes());
            out.push(u8::from(self.is_holder(registrant.host)));
            out.resize(start + 8, 0);
            if extended {
                out.extend_from_slice(&registrant.key.to_le_bytes());
                out.extend_from_slice(&registrant.host);
                out.resize(start + 64, 0);
            } else {
                out.extend_from_slice(&registrant.host[..8]);
                out.extend_from_slice(&registrant.key.to_le_bytes());
            }
        }
        out
    }
}
