//! One table of tests over every engine.

#![allow(clippy::unwrap_used)] // A test ends where something unexpected happens.

mod data;
mod rig;
mod waiting;
