//! Storage devices for virtual machine monitors: rings and registers in, block requests out.
//!
//! ```text
//!  guest driver                 device model: FrontEnd            block::io
//!  descriptors, doorbell  ──►   drain: what was posted  ─┐
//!                                                        ├─ Worker ──►  AsyncIo::submit (one batch)
//!  used ring, interrupt   ◄──   post: what has ended    ─┘        ◄──  AsyncIo::reap
//! ```
//!
//! [`worker`] is the one loop that every device model shares. [`virtio_blk`] is the first of them.
//! A device sees a disk only through [`block::AsyncDiskFile`] and [`block::io::AsyncIo`]; it knows
//! neither the image format nor the engine.

pub mod ahci;
pub mod ata;
mod error;
pub mod histogram;
mod host;
mod identity;
mod interrupt;
mod memory;
pub mod mmc;
pub mod nvme;
pub mod stats;
mod sync;
pub mod testing;
pub mod virtio;
pub mod virtio_blk;
pub mod worker;

pub use error::{Error, Result};
pub use interrupt::{Interrupt, VectorInterrupt};
pub use memory::MemorySource;
