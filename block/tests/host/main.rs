//! Disks as futures: on any executor, and in a tokio-uring runtime.

#![allow(clippy::unwrap_used)]

mod executor;
mod rig;
mod thread;
#[cfg(feature = "tokio-uring")]
mod uring;
