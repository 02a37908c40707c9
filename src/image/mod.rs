//! Images on the command line: naming them, opening them, making them. What these modules call in
//! the `block` crate is called nowhere else in the program.

pub(crate) mod bitmaps;
pub(crate) mod chain;
pub(crate) mod create;
pub(crate) mod encryption;
pub(crate) mod faults;
pub(crate) mod maintenance;
pub(crate) mod open;
pub(crate) mod overlay;
pub(crate) mod qcow2_options;
pub(crate) mod secrets;
pub(crate) mod spec;
pub(crate) mod vmstate;
