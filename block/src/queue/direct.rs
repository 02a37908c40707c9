//! Requests that hit the map: their host operations are in flight, and there is no task.

use super::Entered;
use crate::{
    ErrorKind,
    hooks::Mutation,
    io::{Buffers, EngineFile, Eof, FileView, Pin},
};

/// What an operation needs to know of its file.
pub(super) struct FileUse {
    pub(super) engine_file: EngineFile,
    pub(super) unit: u32,
    pub(super) eof: Eof,
}

impl FileUse {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the shape of `Io::with_file`'s argument"
    )]
    pub(super) fn of(view: FileView<'_>) -> Self {
        Self {
            engine_file: view.engine_file,
            unit: view.entry.file.alignment().offset,
            eof: view.entry.eof(),
        }
    }
}

/// A request whose host operations are in flight.
pub(super) struct Direct {
    pub(super) id: u64,
    pub(super) buffers: Option<Buffers>,
    pub(super) pin: Pin,
    /// Operations in flight, and one while they are being started.
    pub(super) operations: u32,
    pub(super) error: Option<ErrorKind>,
    pub(super) mutation: Option<Mutation>,
    pub(super) entered: Entered,
}
