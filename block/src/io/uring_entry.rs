//! Operations as entries of a submission queue.

use std::{os::fd::RawFd, time::Duration};

use io_uring::{opcode, squeue, types};

use super::{
    HostOp, Segment,
    sys::{self, MAX_TRANSFER},
    uring_memory::RegisteredMemory,
};

/// The longest timeout handed to the kernel; a wait may end early anyway.
pub(super) const MAX_TIMEOUT: Duration = Duration::from_secs(1 << 31);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Touches a file, and perhaps memory of the caller.
    File,
    Timer,
    Watch,
}

/// The file of an operation, as an entry names it.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) fd: RawFd,
    pub(super) unit: usize,
    pub(super) flags: squeue::Flags,
}

/// The entry of a read or write of one or several segments.
fn transfer(
    target: Target,
    memory: &RegisteredMemory,
    offset: u64,
    segments: &[Segment],
    write: Option<i32>,
) -> squeue::Entry {
    let fd = types::Fd(target.fd);
    let segments = sys::prefix(segments, target.unit);
    if let [segment] = segments {
        let base = segment.as_ptr();
        let len = segment.len().min(MAX_TRANSFER) as u32;
        let fixed = memory.find(segment);
        return match (write, fixed) {
            (None, None) => opcode::Read::new(fd, base, len).offset(offset).build(),
            (None, Some(index)) => opcode::ReadFixed::new(fd, base, len, index)
                .offset(offset)
                .build(),
            (Some(flags), None) => opcode::Write::new(fd, base, len)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (Some(flags), Some(index)) => opcode::WriteFixed::new(fd, base, len, index)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
    }
    // A segment is laid out as an iovec.
    let list = segments.as_ptr().cast();
    let count = segments.len() as u32;
    match write {
        None => opcode::Readv::new(fd, list, count).offset(offset).build(),
        Some(flags) => opcode::Writev::new(fd, list, count)
            .offset(offset)
            .rw_flags(flags)
            .build(),
    }
}

/// The entry of an operation, without its user data; an engine result when it cannot be made. A
/// timer's duration is left in `timeout`, where the kernel reads it.
pub(super) fn entry(
    op: &HostOp<'_>,
    target: Target,
    memory: &RegisteredMemory,
    timeout: &mut types::Timespec,
) -> Result<(squeue::Entry, Kind), i32> {
    // An offset of -1 means the current position to the kernel, others are negative.
    let check = |number: u64| match i64::try_from(number) {
        Ok(_) => Ok(number),
        Err(_) => Err(-libc::EINVAL),
    };
    let fd = types::Fd(target.fd);
    let (entry, kind) = match *op {
        HostOp::Read {
            offset, segments, ..
        } => {
            let entry = transfer(target, memory, check(offset)?, segments, None);
            (entry, Kind::File)
        }
        HostOp::Write {
            offset,
            segments,
            dsync,
            ..
        } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            let entry = transfer(target, memory, check(offset)?, segments, Some(flags));
            (entry, Kind::File)
        }
        HostOp::Sync { .. } => {
            let fsync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
            (fsync.build(), Kind::File)
        }
        HostOp::Fallocate {
            mode, offset, len, ..
        } => {
            let entry = opcode::Fallocate::new(fd, check(len)?)
                .offset(check(offset)?)
                .mode(sys::fallocate_flags(mode))
                .build();
            (entry, Kind::File)
        }
        HostOp::Timer { after } => {
            *timeout = types::Timespec::from(after.min(MAX_TIMEOUT));
            (opcode::Timeout::new(timeout).build(), Kind::Timer)
        }
        HostOp::PollReadable { fd } => {
            let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32);
            (poll.build(), Kind::Watch)
        }
    };
    Ok((entry.flags(target.flags), kind))
}
