//! The AHCI host bus adapter from the driver's seat.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

mod ata;
mod cdrom;
mod common;
mod engines;
mod hostile;
mod life;
mod ncq;
mod port;
mod protected;
mod random;
mod sanitize;
mod security;
mod transfer;
