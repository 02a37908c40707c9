//! Ways to put Platter's devices in front of a guest: a vhost-user server for any VMM, and
//! adapters for VMMs that embed them.

pub mod control;
mod framed;
mod queue_thread;
mod sigbus;
mod socket;
mod sys;
mod virtio_transport;

pub mod in_process;
pub mod pci;
pub mod vfio_user;
pub mod vhost_user;

/// The examples of the embedding guide and of the read-me, which are run as tests.
#[cfg(doctest)]
mod guide {
    #[doc = include_str!("../../docs/embedding.md")]
    pub struct Embedding;
    #[doc = include_str!("../../README.md")]
    pub struct ReadMe;
}
