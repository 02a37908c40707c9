//! Ways to put Platter's devices in front of a guest: a vhost-user server for any VMM, and
//! adapters for VMMs that embed them.

mod queue_thread;
mod sys;

pub mod in_process;
pub mod vhost_user;
