//! A machine without a processor that speaks QEMU's qtest protocol, so that QEMU's own device tests
//! judge Platter's device models: virtio-blk, NVMe and AHCI, each as the PCI function that a VMM embeds.
//!
//! ```text
//! cargo build -p vmm-glue --example qtest-x86_64
//! tests/qtest/run.sh
//! ```
//!
//! The tests start this in place of `qemu-system-x86_64` and act as the guest: they access ports,
//! memory and registers over one socket, and control the machine with QMP over another. There are two
//! machines, `pc` (an i440FX) and `q35`, with RAM, a PCI host bridge at CF8h and CFCh, and fw_cfg at 510h
//! that tells how much RAM there is; `q35` has an AHCI adapter at 00:1f.2.

mod args;
mod devices;
mod machine;
mod migration;
mod monitor;
mod protocol;
mod qmp;

use std::{
    os::unix::net::UnixStream,
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
};

use args::Args;
use machine::Machine;

/// What goes wrong is told to whoever reads standard error, and ends the machine.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// How the tests end a machine whose images nobody looks at again.
extern "C" fn terminated(_signal: libc::c_int) {
    // SAFETY: `_exit` may be called in a signal handler.
    unsafe { libc::_exit(0) }
}

fn main() -> ExitCode {
    let handler: extern "C" fn(libc::c_int) = terminated;
    // SAFETY: the handler does nothing that a signal handler may not do.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qtest-x86_64: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args = Args::parse(std::env::args().skip(1))?;
    let connect = |path: &str| UnixStream::connect(path).map_err(|e| format!("{path}: {e}"));
    let (tests, monitor) = (connect(&args.qtest)?, connect(&args.monitor)?);
    let monitor = monitor::Monitor::new(monitor)?;
    let machine = Arc::new(Mutex::new(Machine::new(&args, &monitor)?));
    migration::listen(args, &machine, &monitor)?;
    let for_monitor = Arc::clone(&machine);
    thread::spawn(move || {
        let code = i32::from(qmp::serve(&monitor, &for_monitor).is_err());
        // `quit`, or the test is gone.
        std::process::exit(code);
    });
    protocol::serve(tests, &machine)
}
