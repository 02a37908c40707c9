//! One table of tests over every engine.

mod data;
mod rig;
mod waiting;
