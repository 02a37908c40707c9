//! Printing that a closed pipe does not turn into a panic: what a command does to images goes on
//! when nobody reads what it says.

use std::{fmt::Arguments, io::Write};

/// Prints to standard output.
pub(crate) fn print(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_fmt(text);
}

/// Prints a line to standard error.
pub(crate) fn complain(text: Arguments<'_>) {
    // What was printed before comes first, also when both end up in one file.
    let _ = std::io::stdout().flush();
    let mut err = std::io::stderr().lock();
    let _ = err.write_fmt(text);
    let _ = err.write_all(b"\n");
}

/// Prints a line to standard output.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {
        $crate::util::out::print(format_args!("{}\n", format_args!($($text)*)))
    };
}

/// Prints a line to standard error.
#[macro_export]
macro_rules! grumble {
    ($($text:tt)*) => {
        $crate::util::out::complain(format_args!($($text)*))
    };
}
