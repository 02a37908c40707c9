//! Tests with a real guest: an unmodified Linux kernel with its own drivers, in QEMU with software emulation,
//! on disks that `platter serve` serves: over vhost-user to virtio_blk, over vfio-user to nvme and ahci.
//!
//! They need the lab of `tests/lab/setup.sh` and take minutes:
//!
//! ```sh
//! tests/lab/setup.sh && cargo test --test guest
//! ```

#[path = "../lab/mod.rs"]
mod lab;

mod file_system;
mod function;
mod load;
mod machine;
mod shared;

mod ahci;
mod firmware;
mod hotplug;
mod integrity;
mod nvme;
mod restart;
mod root_image;
mod storage;
