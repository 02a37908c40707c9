//! Engines, queues, buffers and the blocking pool: every system call of the crate.

mod aio_sys;
mod aio_worker;
mod async_io;
mod blocking;
mod buffers;
mod busy;
mod cached;
mod context;
mod core;
mod driver;
mod engine;
mod engine_aio;
mod engine_sync;
mod engine_uring;
mod file;
mod file_options;
mod fsinfo;
mod handle;
mod loan;
mod operation;
mod os_host;

mod pace;
mod pins;
mod pool;
mod ranges;
mod regions;
pub mod sim;
mod slab;
mod spare;
mod sys;
mod uring_entry;
mod uring_lone;
mod uring_memory;
mod uring_setup;
mod uring_writer;
mod wake;

pub use async_io::{AsyncIo, Completion, Request, RequestOp};
pub use buffers::{AlignedBuf, BUFFER_ALIGNMENT, Buffers, Segment, Segments};
pub use engine::{Engine, EngineFile, EngineKind, FallocateMode, HostOp, Started, Token};
pub use engine_aio::AioEngine;
pub use engine_sync::SyncEngine;
pub use engine_uring::{UringEngine, UringOptions};
pub use file::{Backend, Host, HostFile, SimulatedFile};
pub use file_options::{FileOptions, IoAlignment};
pub use fsinfo::LockError;
pub use loan::{IoBuf, IoBufMut};
pub use os_host::OsHost;

pub use self::core::FileRole;
pub use handle::Io;
pub use pool::Pool;
pub use regions::MemoryRegions;

pub(crate) use self::core::DiskCore;
pub(crate) use buffers::{gather, part_of, scatter};
pub(crate) use busy::InFlight;
pub(crate) use context::{Contexts, borrowed, borrowed_mut, thread_driver};
pub(crate) use driver::Driver;
pub(crate) use handle::FileView;
pub(crate) use loan::{Loan, lend_source, lend_target};
#[cfg(feature = "tokio-uring")]
pub(crate) use loan::{LocalLoan, filled, lend_uring_source, lend_uring_target, watch};
pub(crate) use operation::{Eof, NewOp, OpKind, Owner, RequestSink, Transfer};
pub(crate) use pins::{Drained, Pin};
pub(crate) use ranges::RangeTable;
pub(crate) use slab::{Key, Slab};
pub(crate) use sys::{Notifier, thread_time};
