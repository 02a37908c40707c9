//! What an admin command comes to.

use super::Status;

/// What an admin command comes to.
pub(super) enum Outcome {
    /// It ends, with dword 0 of its completion.
    Done(u32),
    /// It ends when mail comes, or an event.
    Later,
}

pub(super) type Answer = Result<Outcome, Status>;
