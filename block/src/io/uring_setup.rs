//! Setting up a ring: what the kernel has, and what to do without.

use std::io;

use io_uring::{IoUring, Probe, opcode};

use crate::{Error, ErrorKind, Result};

/// Entries of a ring's file table. Files beyond it are driven by their descriptors.
pub(super) const FILE_TABLE: u32 = 256;

/// What an engine needs, by the names of the kernel.
const REQUIRED: [(u8, &str); 8] = [
    (opcode::Read::CODE, "IORING_OP_READ"),
    (opcode::Write::CODE, "IORING_OP_WRITE"),
    (opcode::Readv::CODE, "IORING_OP_READV"),
    (opcode::Writev::CODE, "IORING_OP_WRITEV"),
    (opcode::Fsync::CODE, "IORING_OP_FSYNC"),
    (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
    (opcode::Timeout::CODE, "IORING_OP_TIMEOUT"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
];

/// A ring with room for `depth` operations and the engine's own poll, with the best task-work mode
/// that the kernel has; with none if it shall be `compatible` with the oldest.
pub(super) fn ring(depth: u32, compatible: bool) -> Result<IoUring> {
    let entries = (depth + 1).next_power_of_two();
    let plain = || IoUring::builder().setup_clamp().build(entries);
    let cooperative = || {
        IoUring::builder()
            .setup_clamp()
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries)
    };
    let deferred = || {
        IoUring::builder()
            .setup_clamp()
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(entries)
    };
    let ring = if compatible {
        plain()
    } else {
        deferred()
            .or_else(|error| retry(error, cooperative))
            .or_else(|error| retry(error, plain))
    }
    .map_err(|error| refused(&error))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| missing("IORING_REGISTER_PROBE").source(error))?;
    match REQUIRED.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(missing(name)),
        None => Ok(ring),
    }
}

/// Tries with fewer setup flags when the kernel does not know one.
fn retry(error: io::Error, build: impl FnOnce() -> io::Result<IoUring>) -> io::Result<IoUring> {
    if error.raw_os_error() == Some(libc::EINVAL) {
        build()
    } else {
        Err(error)
    }
}

fn missing(what: &str) -> Error {
    Error::unsupported(format!(
        "io_uring: the kernel lacks {what}; Linux 5.6 or later is needed"
    ))
}

/// What the refusal of a ring means.
fn refused(error: &io::Error) -> Error {
    let reason = match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has no io_uring; Linux 5.6 or later is needed".to_owned(),
        Some(libc::EPERM | libc::EACCES) => {
            "not permitted; see the sysctl kernel.io_uring_disabled and the process's seccomp filter"
                .to_owned()
        }
        Some(libc::ENOMEM) => {
            "not enough memory; older kernels count rings against RLIMIT_MEMLOCK".to_owned()
        }
        _ => error.to_string(),
    };
    let kind = match error.raw_os_error() {
        None | Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL) => {
            ErrorKind::Unsupported
        }
        Some(errno) => ErrorKind::from_errno(errno),
    };
    Error::with_message(kind, format!("io_uring: {reason}")).operation("create engine")
}

/// Gives the ring an empty file table; returns its size, 0 when the kernel refuses.
pub(super) fn register_file_table(ring: &IoUring) -> u32 {
    for size in [FILE_TABLE, 32] {
        if ring.submitter().register_files_sparse(size).is_ok() {
            return size;
        }
    }
    // Before Linux 5.19 an empty table is a list of -1.
    match ring.submitter().register_files(&[-1; FILE_TABLE as usize]) {
        Ok(()) => FILE_TABLE,
        Err(_) => 0,
    }
}
