//! Tests with a real guest: an unmodified Linux kernel with its own virtio_blk driver, in QEMU with
//! software emulation, on a disk that `platter serve vhost-user-blk` serves.
//!
//! They need the lab of `tests/lab/setup.sh` and take minutes:
//!
//! ```sh
//! tests/lab/setup.sh && cargo test --test guest
//! ```

#[path = "../lab/mod.rs"]
mod lab;

mod file_system;
mod machine;

mod hotplug;
mod integrity;
mod restart;
mod root_image;
