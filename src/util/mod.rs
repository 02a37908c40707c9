//! Small helpers that every command shares.

pub(crate) mod bytes;
pub(crate) mod errno;
pub(crate) mod failure;
pub(crate) mod interrupt;
pub(crate) mod json;
pub(crate) mod keyval;
pub(crate) mod out;
pub(crate) mod persona;
pub(crate) mod progress;
pub(crate) mod rate;
pub(crate) mod size;
pub(crate) mod snapshots;
pub(crate) mod tell;
