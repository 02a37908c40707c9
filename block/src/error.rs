//! The one error of the crate.
//!
//! On the request path an error is a small `Copy` [`ErrorKind`], which a front end translates into
//! its own status. Everywhere else it is an [`Error`]: the kind, what was being done, the file, the
//! offset and the cause.

use std::{
    error::Error as StdError,
    fmt, io,
    path::{Path, PathBuf},
};

/// A [`std::result::Result`] with the error of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in a form that each front end can translate into its own status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host reported this `errno` for an operation.
    Io(i32),
    /// A transfer ended early: the file is shorter than the disk says.
    ShortTransfer,
    /// The host has no space left.
    NoSpace,
    /// The disk was opened read-only, or refuses this write.
    ReadOnly,
    /// The request reaches beyond the end of the disk.
    OutOfRange,
    /// Offset or length is not a multiple of what the disk needs.
    Misaligned,
    /// The image or the engine cannot do this.
    Unsupported,
    /// The image is not of the expected format, or a field of it is invalid.
    InvalidImage,
    /// The image contradicts itself; it was not written to.
    Corrupt,
    /// The image is in use by another process.
    Locked,
    /// The file an image names may not be opened: the file gate refuses it.
    Denied,
    /// A file does not exist.
    NotFound,
    /// An argument of the caller is wrong.
    InvalidArgument,
    /// The blocking call would wait for the thread that makes it.
    WouldDeadlock,
    /// An earlier sync failed; what it should have covered may be lost.
    SyncFailed,
    /// The operation was cancelled.
    Cancelled,
}

impl ErrorKind {
    /// The kind for an `errno` of the host.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::EOPNOTSUPP => ErrorKind::Unsupported,
            libc::ENOENT => ErrorKind::NotFound,
            errno => ErrorKind::Io(errno),
        }
    }

    /// The `errno` that says most nearly the same.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::Io(errno) => errno,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::OutOfRange | ErrorKind::Misaligned | ErrorKind::InvalidArgument => {
                libc::EINVAL
            }
            ErrorKind::Unsupported => libc::ENOTSUP,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::Denied => libc::EACCES,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::WouldDeadlock => libc::EDEADLK,
            ErrorKind::Cancelled => libc::ECANCELED,
            ErrorKind::InvalidImage => libc::EINVAL,
            ErrorKind::Corrupt | ErrorKind::ShortTransfer | ErrorKind::SyncFailed => libc::EIO,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ErrorKind::Io(errno) => write!(f, "{}", errno_text(*errno)),
            ErrorKind::ShortTransfer => f.write_str("transfer ended early"),
            ErrorKind::NoSpace => f.write_str("no space left on device"),
            ErrorKind::ReadOnly => f.write_str("disk is read-only"),
            ErrorKind::OutOfRange => f.write_str("beyond the end of the disk"),
            ErrorKind::Misaligned => f.write_str("offset or length not aligned"),
            ErrorKind::Unsupported => f.write_str("not supported"),
            ErrorKind::InvalidImage => f.write_str("invalid image"),
            ErrorKind::Corrupt => f.write_str("image is corrupt"),
            ErrorKind::Locked => f.write_str("image is in use by another process"),
            ErrorKind::Denied => f.write_str("file not permitted"),
            ErrorKind::NotFound => f.write_str("no such file"),
            ErrorKind::InvalidArgument => f.write_str("invalid argument"),
            ErrorKind::WouldDeadlock => {
                f.write_str("blocking call on a thread with requests in flight on the same disk")
            }
            ErrorKind::SyncFailed => f.write_str("an earlier sync failed"),
            ErrorKind::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// The host's text for an `errno`, without the number that the standard library adds.
fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// An error with everything known about it: kind, operation, file, offset, details and cause.
#[derive(Debug, thiserror::Error)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    operation: Option<&'static str>,
    path: Option<PathBuf>,
    offset: Option<u64>,
    message: Option<String>,
    /// Which field, its value and what was expected, where the message does not say so itself.
    field: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of that kind, with nothing else known yet.
    #[must_use]
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: None,
            path: None,
            offset: None,
            message: None,
            field: None,
            source: None,
        }))
    }

    /// An error of that kind with a message that names the field, the value and what was expected.
    #[must_use]
    pub fn with_message(kind: ErrorKind, message: impl Into<String>) -> Self {
        let mut error = Self::new(kind);
        error.0.message = Some(message.into());
        error
    }

    /// An error about the image's content.
    #[must_use]
    pub fn invalid_image(message: impl Into<String>) -> Self {
        Self::with_message(ErrorKind::InvalidImage, message)
    }

    /// An error about something that the image or the caller asks for and this crate does not do.
    #[must_use]
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::with_message(ErrorKind::Unsupported, message)
    }

    /// An error about an argument of the caller.
    #[must_use]
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::with_message(ErrorKind::InvalidArgument, message)
    }

    /// An error about an image that contradicts itself.
    #[must_use]
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::with_message(ErrorKind::Corrupt, message)
    }

    /// The same error, naming the operation that failed.
    #[must_use]
    pub fn operation(mut self, operation: &'static str) -> Self {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// The same error, naming the file unless one is named already.
    #[must_use]
    pub fn path(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// The same error, naming the offset in bytes unless one is named already.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// The same error, naming the field, its value and what was expected. For messages whose words are
    /// settled: they stay as [`message`](Self::message) gives them.
    #[must_use]
    pub fn field(mut self, field: &str, value: impl fmt::Display, expected: &str) -> Self {
        let text = format!("field {field}: value {value}, expected {expected}");
        self.0.field.get_or_insert(text);
        self
    }

    /// The failure to read a table. One that the file ends before is corrupt; one that the host did
    /// not read may be as good as ever.
    pub(crate) fn of_table(message: String, cause: Self) -> Self {
        let kind = match cause.kind() {
            ErrorKind::ShortTransfer => ErrorKind::Corrupt,
            kind => kind,
        };
        Self::with_message(kind, message).source(cause)
    }

    /// The same error with its cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The message alone, without operation, file, offset and field.
    #[must_use]
    pub fn message(&self) -> String {
        match (&self.0.message, &self.0.source) {
            (Some(message), _) => message.clone(),
            (None, Some(source)) => source.to_string(),
            (None, None) => self.0.kind.to_string(),
        }
    }

    /// The offset that the error is about, in bytes.
    #[must_use]
    pub fn position(&self) -> Option<u64> {
        self.0.offset
    }

    /// The file that the error is about.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(path) = &inner.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(operation) = inner.operation {
            write!(f, "{operation}")?;
            if let Some(offset) = inner.offset {
                write!(f, " at offset {offset:#x}")?;
            }
            f.write_str(": ")?;
        } else if let Some(offset) = inner.offset {
            write!(f, "at offset {offset:#x}: ")?;
        }
        f.write_str(&self.message())?;
        match &inner.field {
            Some(field) => write!(f, " ({field})"),
            None => Ok(()),
        }
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self::new(kind)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(errno) => ErrorKind::from_errno(errno),
            None if error.kind() == io::ErrorKind::UnexpectedEof => ErrorKind::ShortTransfer,
            None => ErrorKind::Io(libc::EIO),
        };
        match error.raw_os_error() {
            // The host's own text, without the number: the kind has it.
            Some(errno) => Self::with_message(kind, errno_text(errno)).source(error),
            None => Self::new(kind).source(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_file_operation_offset_and_cause() {
        let error = Error::from(io::Error::from_raw_os_error(libc::EIO))
            .operation("read")
            .offset(0x1000)
            .path(Path::new("a.qcow2"));
        assert_eq!(
            error.to_string(),
            "a.qcow2: read at offset 0x1000: Input/output error"
        );
        assert_eq!(error.kind(), ErrorKind::Io(libc::EIO));
    }

    #[test]
    fn a_field_is_shown_and_is_no_part_of_the_message() {
        let error = Error::unsupported("no").field("version", 2, "3");
        assert_eq!(error.to_string(), "no (field version: value 2, expected 3)");
        assert_eq!(error.message(), "no");
    }

    #[test]
    fn the_first_path_stays() {
        let error = Error::corrupt("x")
            .path(Path::new("inner"))
            .path(Path::new("outer"));
        assert_eq!(error.file(), Some(Path::new("inner")));
    }
}
