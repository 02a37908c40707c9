//! The vfio-user server, from a client's seat.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests"
)]

mod ahci;
mod ahci_driver;
mod bus;
mod client;
mod forged;
#[path = "../common/image.rs"]
mod image;
mod messages;
mod migration;
mod nvme;
mod nvme_driver;
mod poll;
mod server;
