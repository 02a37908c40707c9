//! Engines, queues, buffers and the blocking pool: every system call of the crate.

mod aio_sys;
mod aio_worker;
mod async_io;
mod buffers;
mod engine;
mod engine_aio;
mod engine_sync;
mod engine_uring;
mod file;
mod fsinfo;
mod os_host;
pub mod sim;
mod sys;
mod uring_memory;
mod uring_setup;

pub use async_io::{AsyncIo, Completion, Request, RequestOp};
pub use buffers::{AlignedBuf, BUFFER_ALIGNMENT, Buffers, Segment, Segments};
pub use engine::{Engine, EngineFile, EngineKind, FallocateMode, HostOp, Started, Token};
pub use engine_aio::AioEngine;
pub use engine_sync::SyncEngine;
pub use engine_uring::{UringEngine, UringOptions};
pub use file::{Backend, FileOptions, Host, HostFile, IoAlignment, SimulatedFile};
pub use fsinfo::LockError;
pub use os_host::OsHost;

/// TODO
pub struct Io;
/// TODO
pub struct MapCache;
