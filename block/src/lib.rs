//! Disk image formats and I/O engines for virtual machine monitors.
//!
//! A format is a map, an engine does I/O, a queue drives maps over an engine.

pub mod disk_file;
pub mod error;
pub mod image;
pub mod io;
pub mod types;

pub use disk_file::{AsyncDiskFile, Capabilities, DiskFile, DiskTopology};
pub use error::{Error, ErrorKind, Result};
pub use types::{FileId, Format, GuestOffset, GuestRange, HostOffset};
