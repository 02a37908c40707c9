//! How a command ends when it does not end well.

use std::fmt;

/// The end of a command: an exit status, or what went wrong.
pub(crate) type Outcome<T = u8> = Result<T, Failure>;

/// A failed command: what to print after the program's name, and the exit status.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Printed to standard error after the program's name; nothing when it was printed already.
    pub(crate) message: Option<String>,
    /// The command whose `--help` would have told.
    pub(crate) see_help_of: Option<&'static str>,
    /// The exit status.
    pub(crate) status: u8,
}

impl Failure {
    /// A failure with exit status 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: Some(message.into()),
            see_help_of: None,
            status: 1,
        }
    }

    /// A mistake in the arguments of `command`.
    pub(crate) fn usage(command: &'static str, message: impl Into<String>) -> Self {
        Self {
            see_help_of: Some(command),
            ..Self::new(message)
        }
    }

    /// The same failure with another exit status.
    pub(crate) fn status(mut self, status: u8) -> Self {
        self.status = status;
        self
    }

    /// The same failure, its message preceded by `context` and a colon.
    pub(crate) fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = self.message.map(|message| format!("{context}: {message}"));
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message.as_deref().unwrap_or_default())
    }
}
