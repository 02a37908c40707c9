//! The `platter` program: inspects, converts, checks, benchmarks and serves disk images.
//!
//! One file a subcommand; what they share is in [`util`] and [`image`]. Called by the name
//! `qemu-img` or `qemu-io` it speaks like those.

#![forbid(unsafe_code)]

mod amend;
mod app;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod control;
mod convert;
mod create;
mod ctl;
mod dd;
mod docs;
mod image;
mod info;
mod io;
mod map;
mod measure;
mod rebase;
mod resize;
mod serve;
mod serve_ahci;
mod serve_nvme;
mod serve_vfio_user;
mod snapshot;
mod util;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(app::run(std::env::args_os().collect()))
}
