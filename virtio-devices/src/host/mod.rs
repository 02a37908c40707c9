//! What device models do on the host beside reading and writing a disk: files of their own, work that may
//! block, erasing a whole disk.

mod erase;
mod jobs;
mod sidecar;

pub(crate) use erase::{Action, erase};
pub(crate) use jobs::Jobs;
pub(crate) use sidecar::{Content, Sidecar};
