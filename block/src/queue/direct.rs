//! Requests that hit the map: their host operations are in flight, and there is no task.
//!
//! This is the path of almost every request. What it keeps of one is large, so its fields are written where they
//! stay: a value that is put together on the stack, and then copied as a whole, waits for its small fields in the
//! processor's store buffer.

use std::rc::Rc;

use smallvec::SmallVec;

use super::QueueInner;
use crate::{
    ErrorKind, FileId, GuestRange,
    hooks::Mutation,
    image::{Extent, ExtentKind, Extents, Intent},
    io::{
        Buffers, Completion, EngineFile, Eof, FileView, Key, OpKind, Owner, Pin, Segment, Transfer,
    },
};

/// Ranges a write entered in the tables of its files.
type Entered = SmallVec<[(FileId, u64, u64); 2]>;

/// What an operation needs to know of its file.
struct FileUse {
    engine_file: EngineFile,
    unit: u32,
    eof: Eof,
}

impl FileUse {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the shape of `Io::with_file`'s argument"
    )]
    fn of(view: FileView<'_>) -> Self {
        Self {
            engine_file: view.engine_file,
            unit: view.alignment.offset,
            eof: view.entry.eof(),
        }
    }
}

/// A request whose host operations are in flight.
#[derive(Default)]
pub(super) struct Direct {
    id: u64,
    buffers: Option<Buffers>,
    pin: Option<Pin>,
    /// Operations in flight, and one while they are being started.
    operations: u32,
    error: Option<ErrorKind>,
    mutation: Option<Mutation>,
    entered: Entered,
}

impl Direct {
    fn begin(&mut self, id: u64, pin: Pin, mutation: Option<Mutation>, entered: Entered) {
        self.id = id;
        self.pin = Some(pin);
        self.operations = 1;
        self.error = None;
        self.mutation = mutation;
        if !entered.is_empty() {
            self.entered = entered;
        }
    }
}

/// The change that a request makes which hit the map.
fn mutation_of(intent: Intent, range: GuestRange) -> Option<Mutation> {
    (intent == Intent::WriteInPlace).then_some(Mutation::Write(range))
}

impl QueueInner {
    /// Starts a read or write whose whole range the map knows, straight on the engine, and takes its
    /// buffers. Returns whether that could be done; otherwise nothing has happened.
    pub(super) fn try_direct(
        self: &Rc<Self>,
        id: u64,
        range: GuestRange,
        buffers: &mut Buffers,
        pin: Pin,
        intent: Intent,
        dsync: bool,
    ) -> bool {
        if self.io.core.faults.any() {
            return false;
        }
        let mut extents = self.extents.borrow_mut();
        extents.clear();
        let mapped =
            self.served
                .image
                .try_map(range, intent, &mut self.io.cache.borrow_mut(), &mut extents);
        if mapped.is_err() || extents.len() != range.len || range.len == 0 {
            return false;
        }
        // Asked after the lookup: what was found then is what is durable.
        if dsync && !self.served.image.mapping_is_durable(range) {
            return false;
        }
        if let [
            Extent {
                kind: ExtentKind::Data { file, offset },
                ..
            },
        ] = extents.as_slice()
        {
            let place = (*file, offset.0);
            drop(extents);
            return self.start_single(id, range, buffers, pin, intent, dsync, place);
        }
        let mut entered = Entered::new();
        if !self.can_start(&extents, buffers, intent, &mut entered) {
            self.leave(&entered);
            return false;
        }
        let slot = {
            let mut slots = self.direct.borrow_mut();
            let (slot, direct) = slots.occupy();
            direct.begin(id, pin, mutation_of(intent, range), entered);
            slot
        };
        self.start_pieces(slot, &extents, buffers, intent, dsync);
        drop(extents);
        // The buffers stay with the request until the last operation ended.
        if let Some(direct) = self.direct.borrow_mut().get_mut(slot) {
            direct.buffers = Some(std::mem::take(buffers));
        }
        self.end_operation(slot, Ok(()));
        true
    }

    /// Starts the operations of a request in `slot` whose extents can be [started](Self::can_start).
    fn start_pieces(
        &self,
        slot: Key,
        extents: &Extents,
        buffers: &Buffers,
        intent: Intent,
        dsync: bool,
    ) {
        let mut at = 0;
        for extent in extents.as_slice() {
            if let ExtentKind::Data { file, offset } = extent.kind {
                if let Some(direct) = self.direct.borrow_mut().get_mut(slot) {
                    direct.operations += 1;
                }
                // Files were registered when `can_start` looked at them.
                match self.io.with_file(file, FileUse::of) {
                    Ok(file) => {
                        let segments = buffers.part(at, extent.len);
                        let operation =
                            self.prepare(slot, &file, intent, dsync, offset.0, &segments);
                        self.io.driver.launch(operation);
                    }
                    Err(error) => self.end_operation(slot, Err(error.kind())),
                }
            } else {
                buffers.fill_zero(at, extent.len);
            }
            at += extent.len;
        }
    }

    /// [`try_direct`](Self::try_direct) for what almost every request is: one run of a file.
    #[expect(clippy::too_many_arguments, reason = "a part of its one caller")]
    fn start_single(
        &self,
        id: u64,
        range: GuestRange,
        buffers: &mut Buffers,
        pin: Pin,
        intent: Intent,
        dsync: bool,
        (file, offset): (FileId, u64),
    ) -> bool {
        let mut entered = Entered::new();
        let usable = self.io.with_file(file, |view| {
            if !view.alignment.is_none() {
                if !view.alignment.fits(offset, buffers.segments()) {
                    return None;
                }
                if intent == Intent::WriteInPlace
                    && let Some(ranges) = &view.entry.ranges
                {
                    let end = offset.saturating_add(range.len);
                    if !ranges.try_enter(offset, end) {
                        return None;
                    }
                    entered.push((file, offset, end));
                }
            }
            Some(FileUse::of(view))
        });
        let Ok(Some(file)) = usable else {
            return false;
        };
        let mut slots = self.direct.borrow_mut();
        let (slot, direct) = slots.occupy();
        direct.begin(id, pin, mutation_of(intent, range), entered);
        let operation = self.prepare(slot, &file, intent, dsync, offset, buffers.segments());
        direct.buffers = Some(std::mem::take(buffers));
        drop(slots);
        self.io.driver.launch(operation);
        true
    }

    /// Prepares an operation of the request in `slot`, which keeps the memory of the segments.
    fn prepare(
        &self,
        slot: Key,
        file: &FileUse,
        intent: Intent,
        dsync: bool,
        offset: u64,
        segments: &[Segment],
    ) -> Key {
        let transfer = Transfer {
            kind: match intent {
                Intent::Read => OpKind::Read { eof: file.eof },
                Intent::WriteInPlace => OpKind::Write { dsync },
            },
            file: file.engine_file,
            offset,
            segments,
            unit: file.unit,
        };
        let queue = self.number.get();
        self.io
            .driver
            .prepare(&transfer, Owner::Request { queue, slot })
    }

    /// Whether every extent can be given to the engine as it is; enters the ranges of writes.
    fn can_start(
        &self,
        extents: &Extents,
        buffers: &Buffers,
        intent: Intent,
        entered: &mut Entered,
    ) -> bool {
        let mut at = 0;
        for extent in extents.as_slice() {
            match extent.kind {
                ExtentKind::Zero => {}
                // A task serves it: its data passes through a buffer of its own.
                ExtentKind::Opaque { .. } | ExtentKind::Encrypted { .. } => return false,
                ExtentKind::Data { file, offset } => {
                    let fits = self.io.with_file(file, |view| {
                        if view.alignment.is_none() {
                            return true;
                        }
                        let aligned = if extents.as_slice().len() == 1 {
                            view.alignment.fits(offset.0, buffers.segments())
                        } else {
                            view.alignment.fits(offset.0, &buffers.part(at, extent.len))
                        };
                        let end = offset.0.saturating_add(extent.len);
                        match &view.entry.ranges {
                            Some(ranges) if aligned && intent == Intent::WriteInPlace => {
                                let free = ranges.try_enter(offset.0, end);
                                if free {
                                    entered.push((file, offset.0, end));
                                }
                                free
                            }
                            _ => aligned,
                        }
                    });
                    if !matches!(fits, Ok(true)) {
                        return false;
                    }
                }
            }
            at += extent.len;
        }
        true
    }

    fn leave(&self, entered: &Entered) {
        for (file, start, end) in entered {
            let left = self.io.with_file(*file, |view| {
                if let Some(ranges) = &view.entry.ranges {
                    ranges.leave(*start, *end);
                }
            });
            debug_assert!(left.is_ok(), "a file that was entered exists");
        }
    }

    /// An operation of the request in `slot` ended.
    pub(super) fn end_operation(&self, slot: Key, result: Result<(), ErrorKind>) {
        let mut slots = self.direct.borrow_mut();
        let Some(direct) = slots.get_mut(slot) else {
            debug_assert!(false, "an operation ended after its request");
            return;
        };
        if let Err(kind) = result {
            direct.error.get_or_insert(kind);
        }
        direct.operations -= 1;
        if direct.operations > 0 {
            return;
        }
        let (pin, mutation) = (direct.pin.take(), direct.mutation.take());
        let result = direct.error.map_or(Ok(()), Err);
        let entered = if direct.entered.is_empty() {
            None
        } else {
            Some(std::mem::take(&mut direct.entered))
        };
        let mut completed = self.completed.borrow_mut();
        completed.push(Completion {
            id: 0,
            result: Ok(()),
            buffers: None,
        });
        if let Some(completion) = completed.last_mut() {
            completion.id = direct.id;
            completion.result = result;
            completion.buffers = direct.buffers.take();
        }
        drop(completed);
        self.io.driver.undelivered(1);
        slots.vacate(slot);
        drop(slots);
        if let Some(entered) = entered {
            self.leave(&entered);
        }
        if let Some(pin) = pin {
            self.io.pins.unpin(&self.io.core.pins, pin);
        }
        if let Err(kind) = result {
            tracing::warn!(disk = %self.io.core.path.display(), %kind, "host operation failed");
        }
        self.served.hooks.end(mutation, result);
    }
}
