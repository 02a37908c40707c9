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

impl Kind {
    pub(super) fn of(op: &HostOp<'_>) -> Self {
        match op {
            HostOp::Timer { .. } => Kind::Timer,
            HostOp::PollReadable { .. } => Kind::Watch,
            _ => Kind::File,
        }
    }
}

/// The file of an operation, as an entry names it.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) fd: RawFd,
    pub(super) unit: usize,
    pub(super) flags: squeue::Flags,
}

/// Makes the entry of a read or write of one or several segments.
///
/// An entry is 64 bytes of small fields. Moved as a whole right after they were written, as the builders of
/// the `io_uring` crate do, it waited for them in the processor's store buffer, and that was half of what
/// starting an operation cost. Words that are put together in registers do not.
#[inline(always)]
fn transfer(
    target: Target,
    memory: &RegisteredMemory,
    offset: u64,
    segments: &[Segment],
    write: Option<i32>,
) -> squeue::Entry {
    let segments = sys::prefix(segments, target.unit);
    let (opcode, address, len, index) = if let [segment] = segments {
        let fixed = memory.find(segment);
        let opcode = match (write, fixed) {
            (None, None) => opcode::Read::CODE,
            (None, Some(_)) => opcode::ReadFixed::CODE,
            (Some(_), None) => opcode::Write::CODE,
            (Some(_), Some(_)) => opcode::WriteFixed::CODE,
        };
        let len = segment.len().min(MAX_TRANSFER);
        (opcode, segment.as_ptr().addr(), len, fixed.unwrap_or(0))
    } else {
        // A segment is laid out as an iovec.
        let opcode = match write {
            None => opcode::Readv::CODE,
            Some(_) => opcode::Writev::CODE,
        };
        (opcode, segments.as_ptr().addr(), segments.len(), 0)
    };
    let rw_flags = write.unwrap_or(0) as u32;
    entry_of([
        u64::from(opcode) | u64::from(target.flags.bits()) << 8 | (target.fd as u64) << 32,
        offset,
        address as u64,
        len as u64 | u64::from(rw_flags) << 32,
        0,
        u64::from(index),
        0,
        0,
    ])
}

/// The entry of these words, those of the kernel's `struct io_uring_sqe` (`linux/io_uring.h`).
#[inline(always)]
fn entry_of(words: [u64; 8]) -> squeue::Entry {
    // SAFETY: the type is `repr(C)` around that structure, plain numbers of the same size.
    unsafe { std::mem::transmute::<[u64; 8], squeue::Entry>(words) }
}

/// An offset of -1 means the current position to the kernel, others are negative.
#[inline(always)]
fn check(number: u64) -> Result<u64, i32> {
    i64::try_from(number)
        .map(|_| number)
        .map_err(|_| -libc::EINVAL)
}

/// The entry of a read, without its user data; an engine result when it cannot be made.
pub(super) fn read_entry(
    target: Target,
    memory: &RegisteredMemory,
    offset: u64,
    segments: &[Segment],
) -> Result<squeue::Entry, i32> {
    let offset = check(offset)?;
    Ok(transfer(target, memory, offset, segments, None))
}

/// The entry of an operation, without its user data; an engine result when it cannot be made. A timer's duration
/// is left in `timeout`, where the kernel reads it.
#[inline(always)]
pub(super) fn entry(
    op: &HostOp<'_>,
    target: Target,
    memory: &RegisteredMemory,
    timeout: &mut types::Timespec,
) -> Result<squeue::Entry, i32> {
    let fd = types::Fd(target.fd);
    let entry = match *op {
        HostOp::Read {
            offset, segments, ..
        } => {
            let offset = check(offset)?;
            return Ok(transfer(target, memory, offset, segments, None));
        }
        HostOp::Write {
            offset,
            segments,
            dsync,
            ..
        } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            let offset = check(offset)?;
            return Ok(transfer(target, memory, offset, segments, Some(flags)));
        }
        HostOp::Sync { .. } => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        HostOp::Fallocate {
            mode, offset, len, ..
        } => opcode::Fallocate::new(fd, check(len)?)
            .offset(check(offset)?)
            .mode(sys::fallocate_flags(mode))
            .build(),
        HostOp::Timer { after } => {
            *timeout = types::Timespec::from(after.min(MAX_TIMEOUT));
            opcode::Timeout::new(timeout).build()
        }
        HostOp::PollReadable { fd } => {
            opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build()
        }
    };
    Ok(entry.flags(target.flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of an entry that the builders of the `io_uring` crate make.
    fn words(entry: squeue::Entry) -> [u64; 8] {
        // SAFETY: the type is `repr(C)` around plain numbers of the same size.
        unsafe { std::mem::transmute::<squeue::Entry, [u64; 8]>(entry) }
    }

    #[test]
    fn an_entry_is_what_the_builders_make() {
        let target = Target {
            fd: 7,
            unit: 1,
            flags: squeue::Flags::FIXED_FILE,
        };
        let fd = types::Fd(7);
        let memory = RegisteredMemory::default();
        let mut bytes = [0_u8; 1024];
        let base = bytes.as_mut_ptr();
        let list = [Segment::new(base, 512), Segment::new(base, 1024)];
        let (one, both) = (&list[..1], &list[..]);
        let made = |segments, write| words(transfer(target, &memory, 1 << 40, segments, write));
        let built = |entry: squeue::Entry| words(entry.flags(target.flags));
        let offset = 1 << 40;
        let iovecs = list.as_ptr().cast();
        assert_eq!(
            made(one, None),
            built(opcode::Read::new(fd, base, 512).offset(offset).build())
        );
        assert_eq!(
            made(both, None),
            built(opcode::Readv::new(fd, iovecs, 2).offset(offset).build())
        );
        for flags in [0, libc::RWF_DSYNC] {
            let write = opcode::Write::new(fd, base, 512).offset(offset);
            assert_eq!(made(one, Some(flags)), built(write.rw_flags(flags).build()));
            let writev = opcode::Writev::new(fd, iovecs, 2).offset(offset);
            assert_eq!(
                made(both, Some(flags)),
                built(writev.rw_flags(flags).build())
            );
        }
    }

    #[test]
    fn a_segment_in_registered_memory_names_it() {
        let mut ring = io_uring::IoUring::new(1).unwrap();
        let mut bytes = vec![0_u8; 8192];
        let base = bytes.as_mut_ptr();
        let mut memory = RegisteredMemory::default();
        // SAFETY: the bytes outlive the ring's use of them.
        assert!(unsafe { memory.register(&ring.submitter(), &[(base, 8192)]) });
        let target = Target {
            fd: 3,
            unit: 1,
            flags: squeue::Flags::empty(),
        };
        let fd = types::Fd(3);
        let list = [Segment::new(base, 512)];
        assert_eq!(
            words(transfer(target, &memory, 4096, &list, None)),
            words(
                opcode::ReadFixed::new(fd, base, 512, 0)
                    .offset(4096)
                    .build()
            )
        );
        let write = opcode::WriteFixed::new(fd, base, 512, 0).offset(4096);
        assert_eq!(
            words(transfer(
                target,
                &memory,
                4096,
                &list,
                Some(libc::RWF_DSYNC)
            )),
            words(write.rw_flags(libc::RWF_DSYNC).build())
        );
        assert!(ring.submission().is_empty());
    }
}
