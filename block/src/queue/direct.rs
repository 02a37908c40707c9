//! Requests that hit the map: their host operations are in flight, and there is no task.
//!
//! This is the path of almost every request. What it keeps of one is large, so its fields are written where they
//! stay: a value that is put together on the stack, and then copied as a whole, waits for its small fields in the
//! processor's store buffer.

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

/// A read or write of guest data, but for its memory.
#[derive(Clone, Copy)]
pub(super) struct Access {
    pub(super) id: u64,
    pub(super) range: GuestRange,
    pub(super) pin: Pin,
    pub(super) intent: Intent,
    /// It is durable when it ends.
    pub(super) dsync: bool,
}

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
    fn begin(&mut self, access: &Access, entered: Entered) {
        self.id = access.id;
        self.pin = Some(access.pin);
        self.operations = 1;
        self.error = None;
        self.mutation =
            (access.intent == Intent::WriteInPlace).then_some(Mutation::Write(access.range));
        if !entered.is_empty() {
            self.entered = entered;
        }
    }
}

impl QueueInner {
    /// Starts a read or write whose whole range the map knows, straight on the engine, and takes its
    /// buffers. Returns whether that could be done; otherwise nothing has happened.
    pub(super) fn try_direct(&self, access: &Access, buffers: &mut Buffers) -> bool {
        let range = access.range;
        if self.io.core.faults.any() {
            return false;
        }
        let mut extents = self.extents.borrow_mut();
        extents.clear();
        let mapped = self.served.image.try_map(
            range,
            access.intent,
            &mut self.io.cache.borrow_mut(),
            &mut extents,
        );
        if mapped.is_err() || extents.len() != range.len || range.len == 0 {
            return false;
        }
        // Asked after the lookup: what was found then is what is durable.
        if access.dsync && !self.served.image.mapping_is_durable(range) {
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
            return self.start_single(access, buffers, place);
        }
        let mut entered = Entered::new();
        if !self.can_start(&extents, buffers, access.intent, &mut entered) {
            self.leave(&entered);
            return false;
        }
        let slot = {
            let mut slots = self.direct.borrow_mut();
            let (slot, direct) = slots.occupy();
            direct.begin(access, entered);
            slot
        };
        self.start_pieces(slot, &extents, buffers, access);
        drop(extents);
        // The buffers stay with the request until the last operation ended.
        if let Some(direct) = self.direct.borrow_mut().get_mut(slot) {
            direct.buffers = Some(std::mem::take(buffers));
        }
        self.end_operation(slot, Ok(()));
        true
    }

    /// Starts the operations of a request in `slot` whose extents can be [started](Self::can_start).
    fn start_pieces(&self, slot: Key, extents: &Extents, buffers: &Buffers, access: &Access) {
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
                        let operation = self.prepare(slot, &file, access, offset.0, &segments);
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
    fn start_single(
        &self,
        access: &Access,
        buffers: &mut Buffers,
        (file, offset): (FileId, u64),
    ) -> bool {
        let mut entered = Entered::new();
        let usable = self.io.with_file(file, |view| {
            if !view.alignment.is_none() {
                if !view.alignment.fits(offset, buffers.segments()) {
                    return None;
                }
                if access.intent == Intent::WriteInPlace
                    && let Some(ranges) = &view.entry.ranges
                {
                    let end = offset.saturating_add(access.range.len);
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
        direct.begin(access, entered);
        let operation = self.prepare(slot, &file, access, offset, buffers.segments());
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
        access: &Access,
        offset: u64,
        segments: &[Segment],
    ) -> Key {
        let transfer = Transfer {
            kind: match access.intent {
                Intent::Read => OpKind::Read { eof: file.eof },
                Intent::WriteInPlace => OpKind::Write {
                    dsync: access.dsync,
                },
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
