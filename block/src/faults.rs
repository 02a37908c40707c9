//! Faults on purpose, as QEMU's filter `blkdebug` makes them: for tests of what an image, and the
//! program above it, does when the host fails.
//!
//! Rules wait for an event, which the code between image and host announces; then they make operations
//! fail, change the state that other rules ask for, or suspend whoever announced the event until it is
//! resumed. Events and operations carry QEMU's names.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{Arc, Mutex, OnceLock},
    task::{Poll, Waker},
};

use crate::{
    Error, ErrorKind, FileId, Result,
    io::{Io, RequestOp},
    sync::lock,
};

/// Something that happens between an image and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The disk is opened.
    None,
    /// Guest data is read from the image's file.
    ReadAio,
    /// Guest data is written to the image's file.
    WriteAio,
    /// What surrounds a write is copied: the data before.
    CowRead,
    /// What surrounds a write is copied: the data after.
    CowWrite,
    /// Changed parts of L2 tables are written.
    L2Update,
    /// Changed parts of the L1 table are written.
    L1Update,
    /// Changed reference counts are written.
    RefblockUpdate,
    /// The reference count table is written.
    ReftableUpdate,
    /// A sync starts.
    FlushToOs,
    /// A sync reaches the host's disk.
    FlushToDisk,
    /// An overlay is about to be emptied.
    EmptyImagePrepare,
}

impl Event {
    /// The event of that name. `Ok(None)` for an event that QEMU knows and nothing here announces.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a name that QEMU does not know either.
    pub fn from_name(name: &str) -> Result<Option<Self>> {
        Ok(Some(match name {
            "none" => Event::None,
            "read_aio" => Event::ReadAio,
            "write_aio" => Event::WriteAio,
            "cow_read" => Event::CowRead,
            "cow_write" => Event::CowWrite,
            "l2_update" => Event::L2Update,
            "l1_update" => Event::L1Update,
            "refblock_update" => Event::RefblockUpdate,
            "reftable_update" => Event::ReftableUpdate,
            "flush_to_os" => Event::FlushToOs,
            "flush_to_disk" => Event::FlushToDisk,
            "empty_image_prepare" => Event::EmptyImagePrepare,
            other if KNOWN_ELSEWHERE.contains(&other) => return Ok(None),
            other => {
                return Err(Error::invalid_argument(format!(
                    "Parameter 'event' does not accept value '{other}'"
                )));
            }
        }))
    }
}

/// Events of QEMU that belong to how it does things.
const KNOWN_ELSEWHERE: &[&str] = &[
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "cluster_free",
    "cor_write",
    "l1_grow_activate_table",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_shrink_free_l2_clusters",
    "l1_shrink_write_table",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "l2_load",
    "l2_update_compressed",
    "pwritev",
    "pwritev_done",
    "pwritev_rmw_after_head",
    "pwritev_rmw_after_tail",
    "pwritev_rmw_head",
    "pwritev_rmw_tail",
    "pwritev_zero",
    "read_backing_aio",
    "read_compressed",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_switch_table",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_load",
    "refblock_update_part",
    "reftable_grow",
    "reftable_load",
    "vmstate_load",
    "vmstate_save",
    "write_compressed",
];

/// A kind of host operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making a range zero without writing it.
    WriteZeroes,
    /// Giving the space of a range back.
    Discard,
    /// Making writes durable.
    Flush,
    /// Asking where there is data.
    BlockStatus,
}

impl Operation {
    /// The operation of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Operation::Read,
            "write" => Operation::Write,
            "write-zeroes" => Operation::WriteZeroes,
            "discard" => Operation::Discard,
            "flush" => Operation::Flush,
            "block-status" => Operation::BlockStatus,
            _ => return None,
        })
    }
}

/// Makes operations fail once its event has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// The event that it waits for.
    pub event: Event,
    /// The state that it applies in; 0 for any.
    pub state: u64,
    /// The kind of operation; any but [`Operation::BlockStatus`] otherwise.
    pub operation: Option<Operation>,
    /// The offset in the file, in bytes, that an operation must touch.
    pub offset: Option<u64>,
    /// The host's error number.
    pub errno: i32,
    /// Only one operation fails.
    pub once: bool,
}

/// Changes the state when its event comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetState {
    /// The event.
    pub event: Event,
    /// The state that it applies in; 0 for any.
    pub state: u64,
    /// The state afterwards.
    pub new_state: u64,
}

/// Suspends whoever announces an event, once.
#[derive(Debug)]
struct Break {
    event: Event,
    tag: String,
}

#[derive(Debug, Default)]
struct State {
    state: u64,
    errors: Vec<(u64, InjectError)>,
    changes: Vec<SetState>,
    /// Numbers of the rules whose event has come.
    active: Vec<u64>,
    breaks: Vec<Break>,
    /// Who is suspended, by tag; `true` once resumed.
    suspended: HashMap<String, (bool, Vec<Waker>)>,
    /// Who waits for somebody to be suspended.
    watchers: Vec<Waker>,
    /// Tags suspended and resumed since it was asked last.
    told: Vec<String>,
}

/// The rules for one place: the file of an image, its data file, or the disk itself.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<State>,
}

impl Faults {
    /// Rules; the state is 1 at first, and the event [`Event::None`] has come.
    #[must_use]
    pub fn new(errors: Vec<InjectError>, changes: Vec<SetState>) -> Self {
        let faults = Self {
            state: Mutex::new(State {
                state: 1,
                errors: (0..).zip(errors).collect(),
                changes,
                ..State::default()
            }),
        };
        faults.apply(&mut lock(&faults.state), Event::None);
        faults
    }

    fn apply(&self, state: &mut State, event: Event) {
        let now = state.state;
        let applies = |rule: Event, wanted: u64| rule == event && (wanted == 0 || wanted == now);
        let active: Vec<u64> = state
            .errors
            .iter()
            .filter(|(_, rule)| applies(rule.event, rule.state))
            .map(|(number, _)| *number)
            .collect();
        if !active.is_empty() {
            state.active = active;
        }
        for change in &state.changes {
            if applies(change.event, change.state) {
                state.state = change.new_state;
            }
        }
    }

    /// An event has come. Returns when it is not suspended any more.
    async fn come(&self, event: Event) {
        let tag = {
            let mut state = lock(&self.state);
            self.apply(&mut state, event);
            let Some(at) = state.breaks.iter().position(|rule| rule.event == event) else {
                return;
            };
            let tag = state.breaks.remove(at).tag;
            state.told.push(format!("Suspended request '{tag}'"));
            state.suspended.insert(tag.clone(), (false, Vec::new()));
            state.watchers.drain(..).for_each(Waker::wake);
            tag
        };
        poll_fn(|context| {
            let mut state = lock(&self.state);
            match state.suspended.get_mut(&tag) {
                Some((false, wakers)) => {
                    wakers.push(context.waker().clone());
                    Poll::Pending
                }
                _ => {
                    state.suspended.remove(&tag);
                    Poll::Ready(())
                }
            }
        })
        .await;
    }

    /// The error that an operation has to end with.
    fn check(&self, operation: Operation, offset: u64, len: u64) -> Option<ErrorKind> {
        let mut state = lock(&self.state);
        let hits = |rule: &InjectError| {
            let kind = match rule.operation {
                Some(wanted) => wanted == operation,
                None => operation != Operation::BlockStatus,
            };
            let place = rule
                .offset
                .is_none_or(|at| at >= offset && at - offset < len);
            kind && place
        };
        let (number, rule) = state
            .errors
            .iter()
            .find(|(number, rule)| state.active.contains(number) && hits(rule))
            .cloned()?;
        if rule.once {
            state.errors.retain(|(other, _)| *other != number);
            state.active.retain(|other| *other != number);
        }
        (rule.errno != 0).then(|| ErrorKind::from_errno(rule.errno))
    }

    /// Suspends whoever announces `event` next, under a name.
    pub fn suspend_at(&self, event: Event, tag: &str) {
        lock(&self.state).breaks.push(Break {
            event,
            tag: tag.to_owned(),
        });
    }

    /// Lets a suspended one go on; whether there was one of that name.
    pub fn resume(&self, tag: &str) -> bool {
        let mut state = lock(&self.state);
        let Some((resumed, wakers)) = state.suspended.get_mut(tag) else {
            return false;
        };
        *resumed = true;
        wakers.drain(..).for_each(Waker::wake);
        state.told.push(format!("Resuming request '{tag}'"));
        true
    }

    /// Takes back a suspension that nobody met.
    pub fn remove_break(&self, tag: &str) {
        lock(&self.state).breaks.retain(|rule| rule.tag != tag);
    }

    /// Whether somebody is suspended under that name.
    #[must_use]
    pub fn is_suspended(&self, tag: &str) -> bool {
        lock(&self.state)
            .suspended
            .get(tag)
            .is_some_and(|(resumed, _)| !resumed)
    }

    /// What was suspended and resumed since this was asked last, as QEMU tells it.
    #[must_use]
    pub fn take_told(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.state).told)
    }
}

/// Where a disk has faults.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultPlaces {
    /// Between the image and its file.
    pub(crate) file: Option<Arc<Faults>>,
    /// Between the image and its data file.
    pub(crate) data_file: Option<Arc<Faults>>,
    /// Above the image: what is asked of the disk fails.
    pub(crate) requests: Option<Arc<Faults>>,
    /// The data file, once it is open.
    pub(crate) data_file_id: OnceLock<FileId>,
}

impl FaultPlaces {
    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.file.is_some() || self.data_file.is_some() || self.requests.is_some()
    }
}

impl Io {
    /// Fails where a rule says that a request does.
    pub(crate) fn inject_request(&self, op: &RequestOp) -> Result<(), ErrorKind> {
        let Some(faults) = &self.core.faults.requests else {
            return Ok(());
        };
        let (operation, offset, len) = match op {
            RequestOp::Read { offset, buffers } => (Operation::Read, *offset, buffers.len()),
            RequestOp::Write {
                offset, buffers, ..
            } => (Operation::Write, *offset, buffers.len()),
            RequestOp::Discard { offset, len } => (Operation::Discard, *offset, *len),
            RequestOp::WriteZeroes { offset, len, .. } => (Operation::WriteZeroes, *offset, *len),
            RequestOp::Flush => (Operation::Flush, 0, 0),
        };
        faults.check(operation, offset, len).map_or(Ok(()), Err)
    }

    /// Fails where a rule says that asking for the state of a range does.
    pub(crate) fn inject_status(&self, offset: u64, len: u64) -> Result<(), ErrorKind> {
        let faults = self.core.faults.requests.as_ref();
        let error = faults.and_then(|rules| rules.check(Operation::BlockStatus, offset, len));
        error.map_or(Ok(()), Err)
    }

    /// Says that something happens on a file of the disk.
    pub(crate) async fn event(&self, file: FileId, event: Event) {
        if let Some(faults) = self.faults_of(file) {
            faults.come(event).await;
        }
    }

    /// Fails where a rule says that an operation does.
    pub(crate) fn inject(
        &self,
        file: FileId,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Result<(), ErrorKind> {
        let error = self
            .faults_of(file)
            .and_then(|faults| faults.check(operation, offset, len));
        error.map_or(Ok(()), Err)
    }

    /// Whether there are rules for a file.
    pub(crate) fn has_faults(&self, file: FileId) -> bool {
        self.faults_of(file).is_some()
    }

    /// The rules for a file: only the image's own, which is the first, and its data file have any.
    fn faults_of(&self, file: FileId) -> Option<&Faults> {
        let places = &self.core.faults;
        if file == FileId(0) {
            places.file.as_deref()
        } else if places.data_file_id.get() == Some(&file) {
            places.data_file.as_deref()
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(event: Event, once: bool) -> InjectError {
        InjectError {
            event,
            state: 0,
            operation: None,
            offset: None,
            errno: libc::EIO,
            once,
        }
    }

    fn come(faults: &Faults, event: Event) {
        faults.apply(&mut lock(&faults.state), event);
    }

    #[test]
    fn rules_wait_for_their_event() {
        let faults = Faults::new(vec![error(Event::WriteAio, true)], Vec::new());
        assert_eq!(faults.check(Operation::Write, 0, 512), None);
        come(&faults, Event::WriteAio);
        assert_eq!(faults.check(Operation::BlockStatus, 0, 512), None);
        assert!(faults.check(Operation::Write, 0, 512).is_some());
        come(&faults, Event::WriteAio);
        assert_eq!(faults.check(Operation::Write, 0, 512), None);
    }

    #[test]
    fn states_and_places_select_rules() {
        let rule = InjectError {
            state: 2,
            offset: Some(1024),
            ..error(Event::WriteAio, false)
        };
        let change = SetState {
            event: Event::WriteAio,
            state: 1,
            new_state: 2,
        };
        let faults = Faults::new(vec![rule], vec![change]);
        come(&faults, Event::WriteAio);
        assert_eq!(faults.check(Operation::Write, 1024, 512), None);
        come(&faults, Event::WriteAio);
        assert!(faults.check(Operation::Write, 1024, 512).is_some());
        assert!(faults.check(Operation::Read, 1000, 512).is_some());
        assert_eq!(faults.check(Operation::Write, 1536, 512), None);
    }

    #[test]
    fn names_are_qemus() {
        assert_eq!(
            Event::from_name("write_aio").unwrap(),
            Some(Event::WriteAio)
        );
        assert_eq!(Event::from_name("cluster_free").unwrap(), None);
        assert!(Event::from_name("zork").is_err());
    }
}
