//! What a command wants of the host that may block: a thread for it does that.

use std::fmt;

use block::{AsyncDiskFile, ErrorKind};

use super::{
    protection::Protection,
    security::{self, Given},
};
use crate::host::Action;

/// Work that a command waits for; see [`Step::Work`](super::Step::Work).
pub struct Work(Kind);

enum Kind {
    Password { command: u8, given: Given },
    Sanitize { action: Action, failure_mode: bool },
    LeaveFailure,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without passwords.
        f.write_str(match self.0 {
            Kind::Password { .. } => "Password",
            Kind::Sanitize { .. } => "Sanitize",
            Kind::LeaveFailure => "LeaveFailure",
        })
    }
}

impl Work {
    pub(super) fn password(command: u8, given: Given) -> Self {
        Self(Kind::Password { command, given })
    }

    pub(super) fn sanitize(action: Action, failure_mode: bool) -> Self {
        Self(Kind::Sanitize {
            action,
            failure_mode,
        })
    }

    pub(super) fn leave_failure() -> Self {
        Self(Kind::LeaveFailure)
    }

    /// Does it, and tells the command when that can end. A sanitize operation then goes on.
    pub(crate) fn run(
        self,
        protection: &Protection,
        disk: &dyn AsyncDiskFile,
        answer: impl FnOnce(Result<(), ErrorKind>),
    ) {
        match self.0 {
            Kind::Password { command, given } => {
                answer(security::execute(protection, command, &given, disk));
            }
            Kind::Sanitize {
                action,
                failure_mode,
            } => {
                let begun = protection.begin_sanitize(action, failure_mode);
                answer(begun);
                if begun.is_ok() {
                    protection.sanitize(disk);
                }
            }
            Kind::LeaveFailure => answer(protection.keep(|kept| kept.sanitize = None)),
        }
    }
}
