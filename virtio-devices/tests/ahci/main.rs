//! The AHCI host bus adapter from the driver's seat.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

mod cdrom;
mod common;
mod ncq;
mod port;
mod transfer;
