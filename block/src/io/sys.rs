//! The system calls that engines share, each behind a function that returns what an engine reports:
//! bytes or 0, or a negative `errno`.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::Arc,
    time::Duration,
};

use super::{Backend, EngineFile, FallocateMode, HostFile, HostOp, Segment};
use crate::{Error, Result};

/// The most segments the host takes in one operation (`UIO_MAXIOV`).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// The most bytes the host moves in one operation (`MAX_RW_COUNT`).
pub(crate) const MAX_TRANSFER: usize = 0x7fff_f000;

/// Processor time of the calling thread: what other threads take does not count.
pub(crate) fn thread_time() -> std::time::Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: every Linux has this clock, and `now` is ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    debug_assert_eq!(result, 0, "the thread's clock can be read");
    std::time::Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// The last error of the calling thread as an engine result.
pub(crate) fn last_errno() -> i32 {
    negative_errno(&io::Error::last_os_error())
}

/// An error of the host as an engine result.
pub(crate) fn negative_errno(error: &io::Error) -> i32 {
    -error.raw_os_error().unwrap_or(libc::EIO)
}

/// The eventfd of a driving thread.
#[derive(Debug)]
pub(crate) struct Notifier(File);

impl Notifier {
    /// A new non-blocking eventfd.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: makes a descriptor from two plain numbers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Makes it readable.
    pub(crate) fn signal(&self) {
        // Only a full counter refuses, and then it is readable already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it unreadable.
    pub(crate) fn clear(&self) {
        // Only an empty counter refuses.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A registered file.
#[derive(Debug)]
pub(crate) struct Registered {
    /// The descriptor, or -1.
    pub(crate) fd: RawFd,
    /// The unit of direct I/O, or 1.
    pub(crate) unit: usize,
    /// The file is on a memory file system.
    pub(crate) in_memory: bool,
    /// Reads go through the page cache of a disk file system.
    pub(crate) cached: bool,
    /// Writes to the file cannot be tried without waiting.
    pub(crate) waits_to_write: bool,
    /// Keeps it open.
    pub(crate) file: Arc<HostFile>,
}

/// The files that an engine knows.
#[derive(Debug, Default)]
pub(crate) struct FileTable(Vec<Option<Registered>>);

impl FileTable {
    /// Adds a file under a free index.
    pub(crate) fn insert(&mut self, file: &Arc<HostFile>) -> EngineFile {
        let fd = file.raw_fd().unwrap_or(-1);
        let system = file_system(fd);
        let in_memory = matches!(system, Some(TMPFS_MAGIC | RAMFS_MAGIC));
        let cached = !in_memory && !file.is_direct() && !file.is_block_device();
        let registered = Some(Registered {
            fd,
            in_memory,
            cached,
            waits_to_write: cached
                && file.is_writable()
                && !matches!(system, Some(XFS_MAGIC | BTRFS_MAGIC)),
            unit: file.alignment().offset.max(1) as usize,
            file: Arc::clone(file),
        });
        let index = match self.0.iter().position(Option::is_none) {
            Some(free) => {
                self.0[free] = registered;
                free
            }
            None => {
                self.0.push(registered);
                self.0.len() - 1
            }
        };
        EngineFile(index as u32)
    }

    /// Removes a file.
    pub(crate) fn remove(&mut self, file: EngineFile) {
        if let Some(place) = self.0.get_mut(file.0 as usize) {
            *place = None;
        }
    }

    /// The file, unless it was removed.
    pub(crate) fn get(&self, file: EngineFile) -> Option<&Registered> {
        self.0.get(file.0 as usize)?.as_ref()
    }
}

/// Refuses files that the operating system does not know.
pub(crate) fn require_os(file: &HostFile, engine: &str) -> Result<RawFd> {
    match file.backend() {
        Backend::Os(os) => Ok(os.as_raw_fd()),
        Backend::Simulated(_) => Err(Error::unsupported(format!(
            "the {engine} engine cannot drive a simulated file"
        ))
        .path(file.path())),
    }
}

/// The segments that one operation can take, from the start: the caller goes on after a short
/// transfer. A cut between segments stays on a multiple of `unit`, as direct I/O needs it.
pub(crate) fn prefix(segments: &[Segment], unit: usize) -> &[Segment] {
    if segments.len() <= MAX_SEGMENTS {
        return segments;
    }
    let mut total = 0usize;
    let mut best = 0;
    for (index, segment) in segments[..MAX_SEGMENTS].iter().enumerate() {
        total = total.wrapping_add(segment.len());
        if total.is_multiple_of(unit) {
            best = index + 1;
        }
    }
    &segments[..if best == 0 { MAX_SEGMENTS } else { best }]
}

/// Settles the flags of a file for I/O.
///
/// Clears `O_NONBLOCK`, which opening sets so that it never waits: io_uring reads it as the wish to have
/// `EAGAIN` instead of waiting, wherever the file system cannot start reads without waiting. Sets
/// `O_NOATIME`, because every read would look whether the access time is due; a file of another owner
/// keeps it.
pub(crate) fn settle_flags(fd: RawFd) -> io::Result<()> {
    // SAFETY: asks for a number.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let blocking = flags & !libc::O_NONBLOCK;
    match set_flags(fd, flags, blocking | libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => set_flags(fd, flags, blocking),
        result => result,
    }
}

fn set_flags(fd: RawFd, now: i32, wanted: i32) -> io::Result<()> {
    // SAFETY: takes plain numbers.
    if now == wanted || unsafe { libc::fcntl(fd, libc::F_SETFL, wanted) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

fn result(returned: isize) -> i32 {
    if returned < 0 {
        last_errno()
    } else {
        // The host moves at most MAX_TRANSFER bytes.
        i32::try_from(returned).unwrap_or(i32::MAX)
    }
}

/// Reads into segments, with `RWF_*` flags.
///
/// # Safety
/// The segments are writable memory until this returns.
pub(crate) unsafe fn preadv(
    fd: RawFd,
    segments: &[Segment],
    unit: usize,
    offset: u64,
    flags: libc::c_int,
) -> i32 {
    let Ok(offset) = i64::try_from(offset) else {
        return -libc::EINVAL;
    };
    let segments = prefix(segments, unit);
    // SAFETY: a segment is laid out as an iovec, and the caller vouches for the memory.
    let returned = unsafe {
        libc::preadv2(
            fd,
            segments.as_ptr().cast(),
            segments.len() as libc::c_int,
            offset,
            flags,
        )
    };
    result(returned)
}

/// Writes segments; with `dsync` the data is durable afterwards.
///
/// # Safety
/// The segments are readable memory until this returns.
pub(crate) unsafe fn pwritev(
    fd: RawFd,
    segments: &[Segment],
    unit: usize,
    offset: u64,
    dsync: bool,
) -> i32 {
    let Ok(offset) = i64::try_from(offset) else {
        return -libc::EINVAL;
    };
    let segments = prefix(segments, unit);
    let write = |flags| {
        // SAFETY: a segment is laid out as an iovec, and the caller vouches for the memory.
        result(unsafe {
            libc::pwritev2(
                fd,
                segments.as_ptr().cast(),
                segments.len() as libc::c_int,
                offset,
                flags,
            )
        })
    };
    if !dsync {
        return write(0);
    }
    match write(libc::RWF_DSYNC) {
        // A kernel or file system without the flag.
        code if code == -libc::EOPNOTSUPP => match write(0) {
            written if written > 0 => match fdatasync(fd) {
                0 => written,
                failed => failed,
            },
            other => other,
        },
        code => code,
    }
}

/// Makes data durable.
pub(crate) fn fdatasync(fd: RawFd) -> i32 {
    // SAFETY: takes a descriptor alone.
    result(unsafe { libc::fdatasync(fd) } as isize)
}

/// The flags of `fallocate` for a mode.
pub(crate) fn fallocate_flags(mode: FallocateMode) -> i32 {
    match mode {
        FallocateMode::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        FallocateMode::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        FallocateMode::Allocate => 0,
    }
}

/// Changes the allocation of a range. On a block device the kernel discards or zeroes it.
pub(crate) fn fallocate(fd: RawFd, mode: FallocateMode, offset: u64, len: u64) -> i32 {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return -libc::EINVAL;
    };
    // SAFETY: takes a descriptor and plain numbers.
    result(unsafe { libc::fallocate(fd, fallocate_flags(mode), offset, len) } as isize)
}

/// Performs an operation on a file on the calling thread.
///
/// # Safety
/// The segments are memory, writable for a read, until this returns.
pub(crate) unsafe fn perform(files: &FileTable, op: &HostOp<'_>) -> i32 {
    let target = |file| files.get(file).map(|file| (file.fd, file.unit));
    let result = match *op {
        HostOp::Read {
            file,
            offset,
            segments,
        } => target(file).map(|(fd, unit)| {
            // SAFETY: the caller vouches for the memory until this returns.
            unsafe { preadv(fd, segments, unit, offset, 0) }
        }),
        HostOp::Write {
            file,
            offset,
            segments,
            dsync,
        } => target(file).map(|(fd, unit)| {
            // SAFETY: the caller vouches for the memory until this returns.
            unsafe { pwritev(fd, segments, unit, offset, dsync) }
        }),
        HostOp::Sync { file } => target(file).map(|(fd, _)| fdatasync(fd)),
        HostOp::Fallocate {
            file,
            mode,
            offset,
            len,
        } => target(file).map(|(fd, _)| fallocate(fd, mode, offset, len)),
        HostOp::Timer { .. } | HostOp::PollReadable { .. } => Some(-libc::EINVAL),
    };
    result.unwrap_or(-libc::EBADF)
}

/// Memory file systems: only swapping can make an operation on their files wait.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// File systems that can try to write through the page cache without waiting (the kernel's
/// `FOP_BUFFER_WASYNC`).
const XFS_MAGIC: u64 = 0x5846_5342;
const BTRFS_MAGIC: u64 = 0x9123_683e;

/// The kind of file system that a file is on.
fn file_system(fd: RawFd) -> Option<u64> {
    let mut statfs = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel writes a structure of this size to a local variable.
    if unsafe { libc::fstatfs(fd, statfs.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: zeroed memory is a valid `statfs`, and the kernel filled it.
    let kind = unsafe { statfs.assume_init() }.f_type;
    // The width and the sign of the field differ between architectures.
    Some(kind as u64 & 0xffff_ffff)
}

/// What `poll` is asked for a descriptor that becomes readable.
pub(crate) fn readable(fd: RawFd) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

/// The result of a watch, once `revents` says something.
pub(crate) fn poll_result(revents: libc::c_short) -> i32 {
    if revents & libc::POLLNVAL != 0 {
        -libc::EBADF
    } else {
        0
    }
}

/// The timeout to sleep with after a submission: short if the kernel had no room for all of it.
pub(crate) fn try_again_soon(
    submitted: io::Result<()>,
    timeout: Option<Duration>,
) -> io::Result<Option<Duration>> {
    const SOON: Duration = Duration::from_millis(1);
    match submitted {
        Ok(()) => Ok(timeout),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EBUSY) => {
                Ok(Some(timeout.map_or(SOON, |timeout| timeout.min(SOON))))
            }
            _ => Err(error),
        },
    }
}

/// Waits until a descriptor is ready, the timeout has passed, or a signal arrived.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    });
    let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the array and the timeout are ours and outlive the call; no signal mask is given.
    let returned = unsafe {
        libc::ppoll(
            fds.as_mut_ptr(),
            fds.len() as libc::nfds_t,
            timeout,
            ptr::null(),
        )
    };
    if returned < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        // What poll would have written is not known.
        for fd in fds {
            fd.revents = 0;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_on_a_unit() {
        let list = |len: usize, count: usize| vec![Segment::new(ptr::null_mut(), len); count];
        assert_eq!(prefix(&list(100, 1024), 512).len(), 1024);
        assert_eq!(prefix(&list(512, 3000), 512).len(), 1024);
        // 100 bytes each: 128 segments are 25 units, 1024 segments are 200 units.
        assert_eq!(prefix(&list(100, 1025), 512).len(), 1024);
        // 96 bytes each: 16 segments are three units of 512.
        assert_eq!(prefix(&list(96, 2000), 512).len(), 1024);
        // 24 bytes each against 1536: only multiples of 64 segments.
        assert_eq!(prefix(&list(24, 2000), 1536 * 5).len() % 320, 0);
    }
}
