//! An NVMe controller (base specification 2.0, NVM command set 1.0).
//!
//! ```text
//! Subsystem            namespaces, shared by controllers; sanitize; the pool of images
//!    ▲
//! NvmeController       registers and doorbells: any thread
//!    │ worker(n, memory), on the thread that drives it; 0 is the admin queue's
//!    ▼
//! NvmeWorker = Worker<NvmeQueues>      some queue pairs, and a data plane for each namespace
//! ```
//!
//! It knows no transport: the owner gives it register accesses, guest memory, and a
//! [`VectorInterrupt`](crate::VectorInterrupt).

mod abort;
mod admin;
mod command;
mod config;
mod controller;
mod copy;
mod core;
mod counted;
mod data;
mod doorbell;
pub mod driver;
mod events;
mod features;
mod front;
mod fused;
mod gate;
mod identify;
mod identity;
mod interrupt;
mod io;
mod io_reservation;
mod logs;
mod manage;
mod namespace;
mod opcode;
mod outcome;
mod pieces;
mod pool;
mod post;
mod prp;
mod queues;
mod registers;
mod request;
mod reservation;
mod ring;
mod sanitize;
mod set_features;
mod sgl;
mod shadow;
mod sidecar;
mod slot;
mod smart;
mod state;
mod status;
mod stream;
mod subsystem;
mod take;
mod uncorrectable;

pub use config::NvmeConfig;
pub use controller::NvmeController;
pub use doorbell::DoorbellPage;
pub use front::NvmeWorker;
pub use namespace::{Namespace, NamespaceConfig};
pub use pool::{CreateImage, OpenImage, Opened, PoolConfig};
pub use queues::NvmeQueues;
pub use state::{NvmeState, NvmeWorkerState, STATE_VERSION};
pub use status::Status;
pub use subsystem::{Subsystem, SubsystemConfig};
