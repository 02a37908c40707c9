//! A disk in memory that does what a test says: holds completions back, fails requests, takes only
//! so many at a time, and remembers what it was asked.
//!
//! It is here rather than among the tests so that every front end, in any crate, is tested against
//! the same faults.

mod disk;
mod gate;
mod interrupt;
mod io;
mod null;
mod state;

pub use disk::{MockDisk, MockDiskConfig};
pub use interrupt::CountingInterrupt;
pub use null::NullDisk;
pub use state::Logged;
