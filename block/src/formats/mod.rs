//! Disk image formats: maps and metadata. Nothing here opens a file or calls the kernel.

pub mod luks;
pub mod qcow2;
pub mod raw;
