//! Disk image formats and I/O engines for virtual machine monitors.
//!
//! **A format is a map, an engine does I/O, a queue drives maps over an engine.** A format is
//! written once; its synchronous and asynchronous variants are the same code over two engines.
//!
//! ```no_run
//! use block::{DiskFile, OpenOptions, open_disk_file};
//!
//! # fn main() -> block::Result<()> {
//! let disk = open_disk_file("disk.qcow2")?;
//! let mut sector = [0; 512];
//! disk.read_at(&mut sector, 0)?;
//!
//! let read_only = OpenOptions::new().read_only(true).open("other.raw")?;
//! println!("{} bytes", read_only.size());
//! # Ok(())
//! # }
//! ```

pub mod codec;
pub mod crypto;
mod detect;
pub mod dirty;
pub mod disk;
mod disk_extras;
pub mod disk_file;
mod encryption;
pub mod error;
pub mod extras;
mod factory;
pub mod faults;
pub mod formats;
pub mod gate;
pub mod hooks;
pub mod host;
pub mod image;
pub mod io;
mod locking;
pub mod maintenance;
pub mod offline;
pub mod options;
mod queue;
mod serve;
mod sync;
mod table;
pub mod types;

pub use dirty::DirtyBits;
pub use disk::{Disk, DrainGuard, LuksAsync, LuksSync, Qcow2Async, Qcow2Sync, RawAsync, RawSync};
pub use disk_file::{AsyncDiskFile, Capabilities, DiskFile, DiskTopology};
pub use error::{Error, ErrorKind, Result};
pub use extras::{BitmapChange, BitmapInfo, DiskExtras, NewSnapshot};
pub use factory::open_disk_file;
pub use gate::FileGate;
pub use host::HostDisk;
pub use options::{
    CacheMode, DetectZeroes, DiscardPolicy, Locking, OpenOptions, OverlapChecks, PassDiscards,
};
pub use sync::LocalFuture;
pub use types::{FileId, Format, GuestOffset, GuestRange, HostOffset};
