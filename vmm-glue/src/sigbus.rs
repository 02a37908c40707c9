//! Guest memory whose file becomes shorter under the mapping.
//!
//! An access beyond the end of a mapped file is a SIGBUS, which would end the process and with it
//! the disks of other guests. A memfd sealed against shrinking cannot do that. For all others the
//! mapping is watched: the first access that fails replaces it as a whole by zeroes, and shuts the
//! connection down that it came over, so that its session ends as it does when the peer is gone. A
//! SIGBUS anywhere else is what it was before.
//!
//! The handler reads atomics and makes three system calls (`mmap`, `shutdown`, and nothing that
//! allocates or locks), which may be done in a signal handler on Linux.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering},
    },
};

/// The most mappings that are watched in a process.
const SLOTS: usize = 4096;

/// A watched mapping. `start` is 0 while the slot is free; it is set last and cleared first.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    connection: AtomicI32,
    lost: AtomicBool,
}

static WATCHED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        connection: AtomicI32::new(-1),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Slots from here on were never used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Whoever takes or frees a slot holds it; whether the handler is installed.
static INSTALLED: Mutex<bool> = Mutex::new(false);

/// What was done with SIGBUS before.
static BEFORE: Mutex<Option<libc::sigaction>> = Mutex::new(None);

/// A mapping that is watched as long as this lives, which must be as long as the mapping.
#[derive(Debug)]
pub(crate) struct Watch {
    slot: usize,
    /// Keeps the descriptor that the handler uses.
    _connection: File,
}

impl Watch {
    /// Watches the mapping of `len` bytes at `start`; if it is lost, `connection` is shut down.
    pub(crate) fn new(start: usize, len: usize, connection: BorrowedFd<'_>) -> io::Result<Self> {
        let connection = File::from(connection.try_clone_to_owned()?);
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            install()?;
            *installed = true;
        }
        let free = WATCHED
            .iter()
            .position(|slot| slot.start.load(Ordering::Relaxed) == 0)
            .ok_or_else(|| io::Error::other("too many mappings that may shrink"))?;
        let slot = &WATCHED[free];
        slot.len.store(len, Ordering::Relaxed);
        slot.connection
            .store(connection.as_raw_fd(), Ordering::Relaxed);
        slot.lost.store(false, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        USED.fetch_max(free + 1, Ordering::Release);
        Ok(Self {
            slot: free,
            _connection: connection,
        })
    }

    /// Whether an access has failed.
    pub(crate) fn is_lost(&self) -> bool {
        WATCHED[self.slot].lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _held = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        WATCHED[self.slot].start.store(0, Ordering::Release);
    }
}

fn install() -> io::Result<()> {
    // SAFETY: all bytes zero is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: all bytes zero is a valid `sigaction`.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both point to initialised structures, and the handler does only what a handler may.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    Ok(())
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler with SA_SIGINFO.
    let fault = unsafe { &*info };
    // SAFETY: for SIGBUS the address field is set.
    let address = unsafe { fault.si_addr() } as usize;
    for slot in &WATCHED[..USED.load(Ordering::Acquire).min(SLOTS)] {
        let start = slot.start.load(Ordering::Acquire);
        if start == 0 || !(start..start + slot.len.load(Ordering::Relaxed)).contains(&address) {
            continue;
        }
        if replace(slot, start) {
            return;
        }
    }
    // Not ours: whoever was asked before, or the default, which ends the process when the access is
    // tried again. The lock is only held while the handler is being installed.
    if let Ok(before) = BEFORE.try_lock()
        && let Some(before) = *before
        && ask(&before, signal, info, context)
    {
        return;
    }
    // SAFETY: SIG_DFL is a valid disposition for SIGBUS.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Calls the handler that was there before, in the way it was installed for; whether there was one.
fn ask(
    before: &libc::sigaction,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) -> bool {
    let handler = before.sa_sigaction;
    if matches!(handler, libc::SIG_DFL | libc::SIG_IGN) {
        return false;
    }
    if before.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: with SA_SIGINFO the field holds a function of this type.
        let handler = unsafe {
            std::mem::transmute::<
                usize,
                extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
            >(handler)
        };
        handler(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO the field holds a function of this type.
        let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler) };
        handler(signal);
    }
    true
}

/// Puts zeroes in the place of the mapping, and shuts the connection down.
fn replace(slot: &Slot, start: usize) -> bool {
    // SAFETY: the address of errno of this thread is always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the range is exactly one mapping, which its owner keeps while it is watched; whoever
    // holds pointers into it accesses volatile memory, for which other bytes are as good.
    let result = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(start),
            slot.len.load(Ordering::Relaxed),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    slot.lost.store(true, Ordering::Release);
    // SAFETY: the descriptor is open as long as the slot is in use; a failure does not matter.
    unsafe { libc::shutdown(slot.connection.load(Ordering::Relaxed), libc::SHUT_RDWR) };
    // SAFETY: as for reading it.
    unsafe { *errno = saved };
    result != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;

    static PLAIN: AtomicI32 = AtomicI32::new(0);
    static WITH_INFO: AtomicI32 = AtomicI32::new(0);

    extern "C" fn plain(signal: libc::c_int) {
        PLAIN.store(signal, Ordering::SeqCst);
    }

    extern "C" fn with_info(
        signal: libc::c_int,
        _info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        WITH_INFO.store(signal + context as i32, Ordering::SeqCst);
    }

    fn asked(handler: usize, flags: libc::c_int) -> bool {
        // SAFETY: all bytes zero is a valid `sigaction`.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        before.sa_sigaction = handler;
        before.sa_flags = flags;
        let context = ptr::without_provenance_mut(100);
        ask(&before, 7, ptr::null_mut(), context)
    }

    #[test]
    fn the_handler_before_ours_is_called_in_its_own_way() {
        assert!(asked(plain as *const () as usize, libc::SA_ONSTACK));
        assert_eq!(PLAIN.load(Ordering::SeqCst), 7);
        assert!(asked(with_info as *const () as usize, libc::SA_SIGINFO));
        assert_eq!(WITH_INFO.load(Ordering::SeqCst), 107);
        for flags in [0, libc::SA_SIGINFO] {
            assert!(!asked(libc::SIG_DFL, flags));
            assert!(!asked(libc::SIG_IGN, flags));
        }
    }
}
