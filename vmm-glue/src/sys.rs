//! The system calls of this crate: poll, memfds, shared mappings, signals.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    ptr::NonNull,
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use crate::sigbus::Watch;

/// The seals that keep a mapping of the file valid for good.
pub(crate) const FIXED_SIZE: i32 = libc::F_SEAL_SHRINK;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Waits until one of the descriptors is ready for its events or `deadline` has passed. Returns
/// the events of each, all zero after the deadline. An interrupted wait goes on.
pub(crate) fn poll<const N: usize>(
    fds: [(BorrowedFd<'_>, i16); N],
    deadline: Option<Instant>,
) -> io::Result<[i16; N]> {
    let mut list = fds.map(|(fd, events)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    });
    loop {
        let timeout = match deadline {
            None => -1,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, so that the loop does not spin through the last millisecond.
                i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
            }
        };
        // SAFETY: `list` is an array of N pollfd structures that outlives the call.
        let ready = unsafe { libc::poll(list.as_mut_ptr(), N as libc::nfds_t, timeout) };
        match check(ready) {
            Ok(_) => return Ok(list.map(|entry| entry.revents)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A point in time that many from now.
pub(crate) fn after(duration: Duration) -> Instant {
    Instant::now() + duration
}

/// An eventfd that does not block.
pub(crate) fn event() -> io::Result<File> {
    // SAFETY: eventfd takes no pointer.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the call above made this descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// An eventfd of somebody else as a file of our own.
pub(crate) fn duplicate(event: &EventFd) -> io::Result<File> {
    let copy = event.try_clone()?;
    // SAFETY: the descriptor was just made and `into_raw_fd` gives it away.
    Ok(unsafe { File::from_raw_fd(copy.into_raw_fd()) })
}

/// Adds one to an eventfd. One that is at its end has been told often enough.
pub(crate) fn signal(event: &File) -> io::Result<()> {
    let mut event = event;
    match event.write(&1u64.to_ne_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

/// Sets a non-blocking eventfd to zero.
pub(crate) fn clear(event: &File) {
    let mut event = event;
    // Nothing to read is fine, and no other error is possible on an eventfd.
    let _ = event.read(&mut [0; 8]);
}

/// A memfd of `size` zero bytes whose size can never change.
pub(crate) fn sealed_memfd(name: &std::ffi::CStr, size: u64) -> io::Result<File> {
    // SAFETY: `name` is a NUL-terminated string.
    let fd = check(unsafe {
        libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    })?;
    // SAFETY: the call above made this descriptor, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int, and the descriptor is open.
    check(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// The seals of a file; none for a file that cannot be sealed.
pub(crate) fn seals(file: &File) -> i32 {
    // SAFETY: F_GET_SEALS takes no argument, and the descriptor is open.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals.max(0)
}

/// Closes the descriptor in programs this one starts.
pub(crate) fn set_cloexec(fd: RawFd) {
    // SAFETY: F_SETFD takes an int. A wrong descriptor gives an error, which does not matter here.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// Makes reads and writes of the descriptor fail where they would block.
pub(crate) fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument, and the descriptor is open.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    if flags & libc::O_NONBLOCK == 0 {
        // SAFETY: F_SETFL takes an int, and the descriptor is open.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    }
    Ok(())
}

/// The unit in which mappings of the file are made: the huge page on hugetlbfs, else the page.
fn mapping_unit(file: &File) -> u64 {
    let mut info = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `info` is large enough for what the call writes.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), info.as_mut_ptr()) };
    // SAFETY: it was zeroed, and all bytes zero is a valid `statfs`.
    let info = unsafe { info.assume_init() };
    // SAFETY: sysconf takes no pointer.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    if result == 0 && info.f_type == libc::HUGETLBFS_MAGIC {
        u64::try_from(info.f_bsize).unwrap_or(page).max(page)
    } else {
        page
    }
}

/// A part of a file, mapped shared for reading and writing.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Where the kernel put the mapping.
    base: NonNull<libc::c_void>,
    /// How long it is.
    total: usize,
    /// The first byte that was asked for, from `base`.
    lead: usize,
    /// How many bytes were asked for.
    len: usize,
    /// For a file that may shrink; it goes before the mapping does.
    watch: Option<Watch>,
}

// SAFETY: the mapping is memory that belongs to the struct; its bytes are only accessed through
// raw pointers, as volatile or atomic memory.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from `offset`, which need not be aligned. The range must lie inside the
    /// file.
    pub(crate) fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = |text: &'static str| io::Error::new(io::ErrorKind::InvalidInput, text);
        let end = offset.checked_add(len).ok_or(invalid("range overflows"))?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(invalid("descriptor is not a file"));
        }
        if len == 0 || end > meta.len() {
            return Err(invalid("range ends beyond the file"));
        }
        let unit = mapping_unit(file);
        let start = offset - offset % unit;
        let total = (end - start)
            .checked_next_multiple_of(unit)
            .and_then(|total| usize::try_from(total).ok())
            .ok_or(invalid("range overflows"))?;
        let at = libc::off_t::try_from(start).map_err(|_| invalid("range overflows"))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                total,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                at,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: NonNull::new(base).ok_or(invalid("mapped at address 0"))?,
            total,
            lead: (offset - start) as usize,
            len: len as usize,
            watch: None,
        })
    }

    /// The same for memory of a peer, whose file may shrink unless it is sealed: then the
    /// connection is shut down.
    pub(crate) fn of_peer(
        file: &File,
        offset: u64,
        len: u64,
        connection: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let mut mapping = Self::new(file, offset, len)?;
        if seals(file) & FIXED_SIZE == 0 {
            let start = mapping.base.as_ptr() as usize;
            mapping.watch = Some(Watch::new(start, mapping.total, connection)?);
        }
        Ok(mapping)
    }

    /// Memory of ours, all zeroes, of which the host gives what is touched.
    pub(crate) fn anonymous(len: u64) -> io::Result<Self> {
        let invalid = |text: &'static str| io::Error::new(io::ErrorKind::InvalidInput, text);
        let len = usize::try_from(len).map_err(|_| invalid("range overflows"))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: NonNull::new(base).ok_or(invalid("mapped at address 0"))?,
            total: len,
            lead: 0,
            len,
            watch: None,
        })
    }

    /// Makes [anonymous](Self::anonymous) memory zeroes again, which takes none of the host's.
    pub(crate) fn forget(&self) {
        // SAFETY: the range is this mapping, whose bytes are only accessed as volatile memory, for
        // which zeroes are as good.
        unsafe { libc::madvise(self.base.as_ptr(), self.total, libc::MADV_DONTNEED) };
    }

    /// Whether the file became shorter, and what was here is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }

    /// The number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of the first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr().cast::<u8>().wrapping_add(self.lead)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the address may be somebody else's.
        self.watch = None;
        // SAFETY: this is the range that mmap returned, and whoever held pointers into it also
        // held this struct.
        unsafe { libc::munmap(self.base.as_ptr(), self.total) };
    }
}

/// SIGTERM and SIGINT, to be read from a descriptor.
#[derive(Debug)]
pub(crate) struct StopSignals(OwnedFd);

impl StopSignals {
    /// Blocks both signals in the calling thread, and in every thread it starts from now on, and
    /// opens the descriptor that has them.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: sigemptyset initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for signal in [libc::SIGTERM, libc::SIGINT] {
            // SAFETY: the set was initialised above, and the signal numbers are valid.
            unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
        }
        // SAFETY: the set is initialised; the old mask is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the set is initialised, and -1 asks for a new descriptor.
        let fd = check(unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC) })?;
        // SAFETY: the call above made this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
