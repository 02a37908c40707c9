//! What the operating system knows about a file beside its bytes.

use std::{
    fs::{File, Metadata},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::{ffi::OsStrExt, fs::FileTypeExt},
    },
    path::Path,
};

use super::file_options::{FileOptions, IoAlignment};

/// The alignment to assume where the kernel does not tell.
const FALLBACK_ALIGNMENT: u32 = 4096;

/// `BLKSSZGET`: logical block size of a block device.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// `BLKPBSZGET`: physical block size of a block device.
const BLKPBSZGET: libc::c_ulong = 0x127b;
/// `BLKGETSIZE64`: size of a block device in bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// What direct I/O on the file demands: `STATX_DIOALIGN`, else the device's sector size, else a
/// page.
pub(crate) fn direct_io_alignment(file: &File, metadata: &Metadata) -> IoAlignment {
    if let Some(alignment) = statx_dio_alignment(file) {
        return alignment;
    }
    if metadata.file_type().is_block_device()
        && let Some(sector) = block_size(file, BLKSSZGET)
    {
        return IoAlignment {
            memory: sector,
            offset: sector,
        };
    }
    IoAlignment {
        memory: FALLBACK_ALIGNMENT,
        offset: FALLBACK_ALIGNMENT,
    }
}

fn statx_dio_alignment(file: &File) -> Option<IoAlignment> {
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is an empty C string, and the result has the size
    // that the kernel writes.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            statx.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: zeroed memory is a valid `statx`, and the kernel filled it.
    let statx = unsafe { statx.assume_init() };
    let valid = statx.stx_mask & libc::STATX_DIOALIGN != 0
        && statx.stx_dio_mem_align.is_power_of_two()
        && statx.stx_dio_offset_align.is_power_of_two();
    valid.then_some(IoAlignment {
        memory: statx.stx_dio_mem_align,
        offset: statx.stx_dio_offset_align,
    })
}

fn block_size(file: &File, request: libc::c_ulong) -> Option<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: both requests store one int, and `size` is one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut size) };
    let size = u32::try_from(size).ok()?;
    (result == 0 && size.is_power_of_two() && size >= 512).then_some(size)
}

/// Logical and physical block size of a block device, in bytes.
pub(crate) fn block_sizes(file: &File) -> Option<(u32, u32)> {
    let logical = block_size(file, BLKSSZGET)?;
    let physical = block_size(file, BLKPBSZGET).unwrap_or(logical);
    Some((logical, physical.max(logical)))
}

/// The length of a file or block device.
pub(crate) fn file_len(file: &File, block_device: bool) -> io::Result<u64> {
    if !block_device {
        return Ok(file.metadata()?.len());
    }
    let mut size: u64 = 0;
    // SAFETY: the request stores one u64, and `size` is one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if result == 0 {
        Ok(size)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: a system call on an open descriptor; nothing uses the file position.
    let result = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if let Ok(found) = u64::try_from(result) {
        return Ok(Some(found));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(error),
    }
}

/// The next run of data at or after `offset`; `None` when only a hole follows.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek(file, offset, libc::SEEK_DATA) {
        Ok(Some(start)) => start,
        Ok(None) => return Ok(None),
        // A file system without hole detection: all of it is data.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let len = file.metadata()?.len();
            return Ok((offset < len).then_some((offset, len)));
        }
        Err(error) => return Err(error),
    };
    let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(start);
    Ok((end > start).then_some((start, end)))
}

/// Why a lock was not taken.
#[derive(Debug)]
pub enum LockError {
    /// Another process does not share a permission that is asked for.
    NotShared(&'static str),
    /// Another process has a permission that is not to be shared.
    InUse(&'static str),
    /// The file system has no locks.
    Unsupported(io::Error),
    /// The host failed.
    Io(io::Error),
}

/// First byte of the locks for permissions that are held.
const HELD_BASE: i64 = 100;
/// First byte of the locks for permissions that are not shared.
const NOT_SHARED_BASE: i64 = 200;
/// Permissions as QEMU numbers and names them. A fifth number is retired.
const PERMISSIONS: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

fn flock(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    // SAFETY: `flock` is plain data for which all zero bytes are valid.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

fn fcntl_lock(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the three lock commands read and write one `flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes a lock that others may take too; only somebody who knows nothing of all this, and locked
/// the byte for himself, is in the way.
fn set_shared(file: &File, byte: i64, name: &'static str) -> Result<(), LockError> {
    let mut lock = flock(libc::F_RDLCK, byte, 1);
    fcntl_lock(file, libc::F_OFD_SETLK, &mut lock).map_err(|error| lock_error(error, name))
}

/// What the host's answer to a request for a lock means.
pub(super) fn lock_error(error: io::Error, name: &'static str) -> LockError {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => LockError::NotShared(name),
        Some(libc::ENOLCK | libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => {
            LockError::Unsupported(error)
        }
        _ => LockError::Io(error),
    }
}

/// Whether another open file description holds any lock on the byte.
fn is_locked_by_other(file: &File, byte: i64) -> Result<bool, LockError> {
    let mut lock = flock(libc::F_WRLCK, byte, 1);
    fcntl_lock(file, libc::F_OFD_GETLK, &mut lock).map_err(LockError::Io)?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Takes the locks of the permissions in the two masks, then looks for conflicts: somebody who
/// does not share what is held, or holds what is not shared.
pub(crate) fn lock_permissions(file: &File, held: u64, not_shared: u64) -> Result<(), LockError> {
    let named = |mask: u64| {
        let bits = (0..).zip(PERMISSIONS);
        bits.filter(move |(n, _)| mask & 1 << n != 0)
    };
    let take_all = || {
        for (n, name) in named(held) {
            set_shared(file, HELD_BASE + n, name)?;
        }
        for (n, name) in named(not_shared) {
            set_shared(file, NOT_SHARED_BASE + n, name)?;
        }
        for (n, name) in named(held) {
            if is_locked_by_other(file, NOT_SHARED_BASE + n)? {
                return Err(LockError::NotShared(name));
            }
        }
        for (n, name) in named(not_shared) {
            if is_locked_by_other(file, HELD_BASE + n)? {
                return Err(LockError::InUse(name));
            }
        }
        Ok(())
    };
    take_all().inspect_err(|_| unlock_permissions(file))
}

/// Gives all those locks back.
pub(crate) fn unlock_permissions(file: &File) {
    let mut lock = flock(libc::F_UNLCK, HELD_BASE, NOT_SHARED_BASE);
    // Failing to unlock a descriptor that is about to be closed changes nothing.
    let _ = fcntl_lock(file, libc::F_OFD_SETLK, &mut lock);
}

/// Makes an eventfd readable.
pub(crate) fn write_eventfd(fd: std::os::fd::RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes eight bytes from a local array to an open descriptor.
    let written = unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
    // Only a full counter refuses, and then the descriptor is readable already.
    debug_assert!(written == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock);
}

/// Opens `name` inside `folder` with `openat2`: links and `..` may not lead out of it.
pub(crate) fn open_beneath(folder: &Path, name: &Path, options: FileOptions) -> io::Result<File> {
    let folder = File::open(folder)?;
    let name = std::ffi::CString::new(name.as_os_str().as_bytes())
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let access = if options.write {
        libc::O_RDWR
    } else {
        libc::O_RDONLY
    };
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let flags = access | direct | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    // SAFETY: `open_how` is plain data for which all zero bytes are valid.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    how.flags = u64::from(flags as u32);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the folder is open, the name is a C string, and the size is that of `how`.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            folder.as_raw_fd(),
            name.as_ptr(),
            std::ptr::from_mut(&mut how),
            size_of::<libc::open_how>(),
        )
    };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}
