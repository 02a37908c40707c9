//! The host's words for error numbers, and error numbers for error kinds.

use std::io;

use block::ErrorKind;

/// The host's text for an error number, without the number the standard library adds.
pub(crate) fn text(errno: i32) -> String {
    strip(io::Error::from_raw_os_error(errno).to_string())
}

/// The host's text for an I/O error.
pub(crate) fn io_text(error: &io::Error) -> String {
    strip(error.to_string())
}

fn strip(mut text: String) -> String {
    if let Some(at) = text.find(" (os error") {
        text.truncate(at);
    }
    text
}

/// The error number that QEMU's tools report for a failed request of that kind.
pub(crate) fn of_request(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::OutOfRange => libc::EIO,
        ErrorKind::ReadOnly => libc::EPERM,
        kind => kind.errno(),
    }
}

/// The text for a failed request.
pub(crate) fn request_text(kind: ErrorKind) -> String {
    text(of_request(kind))
}
