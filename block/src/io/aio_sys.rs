//! The system calls of Linux AIO, which the C library does not wrap.

use std::{
    io,
    os::fd::RawFd,
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

/// Operation codes.
pub(super) const CMD_PREAD: u16 = 0;
pub(super) const CMD_PWRITE: u16 = 1;
pub(super) const CMD_FDSYNC: u16 = 3;
pub(super) const CMD_POLL: u16 = 5;
pub(super) const CMD_PREADV: u16 = 7;
pub(super) const CMD_PWRITEV: u16 = 8;

/// The completion writes an eventfd.
const FLAG_RESFD: u32 = 1;

/// What a completion ring of the known layout says.
const RING_MAGIC: u32 = 0xa10a_10a1;

/// `struct iocb`.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub(super) struct Iocb {
    pub(super) data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    pub(super) rw_flags: i32,
    #[cfg(target_endian = "big")]
    key: u32,
    pub(super) opcode: u16,
    reqprio: i16,
    pub(super) fildes: u32,
    pub(super) buf: u64,
    pub(super) nbytes: u64,
    pub(super) offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

impl Iocb {
    /// An operation whose completion writes an eventfd.
    pub(super) fn new(opcode: u16, fd: RawFd, eventfd: RawFd) -> Self {
        Self {
            opcode,
            fildes: fd as u32,
            flags: FLAG_RESFD,
            resfd: eventfd as u32,
            ..Self::default()
        }
    }
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IoEvent {
    pub(super) data: u64,
    obj: u64,
    pub(super) res: i64,
    res2: i64,
}

/// The start of `struct aio_ring`, which the kernel maps into the process at the context's address.
#[repr(C)]
struct RingHeader {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
}

/// A context; destroying it waits for what it has in flight, except watches, which it cancels.
#[derive(Debug)]
pub(super) struct Context {
    id: libc::c_ulong,
    /// The ring can be looked at without a system call.
    visible: bool,
}

impl Context {
    pub(super) fn new(depth: u32) -> io::Result<Self> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: the kernel writes the context's id to a local variable.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut id) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut context = Self { id, visible: false };
        // SAFETY: the id of a context is the address of its ring, which is mapped until the context
        // is destroyed and starts with this header in every kernel; nobody writes the magic number.
        context.visible = unsafe { (*context.ring()).magic } == RING_MAGIC;
        Ok(context)
    }

    fn ring(&self) -> *const RingHeader {
        ptr::with_exposed_provenance(self.id as usize)
    }

    /// Whether there is certainly nothing to collect.
    pub(super) fn is_empty(&self) -> bool {
        if !self.visible {
            return false;
        }
        // SAFETY: the ring is mapped until the context is destroyed, and is read atomically.
        let head = unsafe { &(*self.ring()).head };
        // SAFETY: as above.
        let tail = unsafe { &(*self.ring()).tail };
        head.load(Ordering::Acquire) == tail.load(Ordering::Acquire)
    }

    /// Submits operations from the front; returns how many were taken. The error is that of the
    /// first.
    ///
    /// # Safety
    /// Each pointer is to an `Iocb` whose memory stays valid until its completion was collected.
    pub(super) unsafe fn submit(&self, list: &mut [*mut Iocb]) -> io::Result<usize> {
        // SAFETY: the list is ours; the caller vouches for what it points to.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.id,
                list.len() as libc::c_long,
                list.as_mut_ptr(),
            )
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Collects completions without waiting.
    pub(super) fn collect(&self, events: &mut [IoEvent]) -> usize {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: array and time are ours; the kernel writes at most as many events as fit.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.id,
                0 as libc::c_long,
                events.len() as libc::c_long,
                events.as_mut_ptr(),
                &raw mut now,
            )
        };
        // Only a signal interrupts it, and then there is a next time.
        usize::try_from(result).unwrap_or(0)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context exists and is not used again.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}
