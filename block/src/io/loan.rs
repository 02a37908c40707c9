//! Owned buffers lent to a request: the request keeps them alive, whatever becomes of the caller.

use std::{any::Any, cell::UnsafeCell, sync::Arc};

use super::{AlignedBuf, Buffers};

/// A buffer that a write can be made from.
///
/// Requests take buffers by value. The kernel may go on using the memory after the future that
/// waits for it is gone, so the request has to own it: a borrow would end with the future.
///
/// # Safety
/// The pointer leads to `buf_len` initialised bytes, which stay where they are and initialised
/// while the buffer exists, even when the value itself is moved. Nothing but a `&mut` to the buffer
/// changes them.
pub unsafe trait IoBuf: Send + 'static {
    /// The first byte.
    fn stable_ptr(&self) -> *const u8;
    /// The number of bytes.
    fn buf_len(&self) -> usize;
}

/// A buffer that a read can fill: all of [`buf_len`](IoBuf::buf_len), never more.
///
/// # Safety
/// As [`IoBuf`]; the pointer is that of [`stable_ptr`](IoBuf::stable_ptr) and may be written
/// through.
pub unsafe trait IoBufMut: IoBuf {
    /// The first byte.
    fn stable_mut_ptr(&mut self) -> *mut u8;
}

// SAFETY: a vector's bytes are on the heap, and its first `len` are initialised.
unsafe impl IoBuf for Vec<u8> {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }
    fn buf_len(&self) -> usize {
        self.len()
    }
}

// SAFETY: as for IoBuf; the vector owns its bytes alone.
unsafe impl IoBufMut for Vec<u8> {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.as_mut_ptr()
    }
}

// SAFETY: the bytes are on the heap and initialised.
unsafe impl IoBuf for AlignedBuf {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }
    fn buf_len(&self) -> usize {
        self.len()
    }
}

// SAFETY: as for IoBuf; the buffer owns its bytes alone.
unsafe impl IoBufMut for AlignedBuf {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.as_mut_ptr()
    }
}

// SAFETY: the bytes are on the heap, initialised, and never changed while they are shared.
unsafe impl IoBuf for Arc<[u8]> {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }
    fn buf_len(&self) -> usize {
        self.len()
    }
}

// SAFETY: the bytes exist for ever and never change.
unsafe impl IoBuf for &'static [u8] {
    fn stable_ptr(&self) -> *const u8 {
        self.as_ptr()
    }
    fn buf_len(&self) -> usize {
        self.len()
    }
}

/// The buffer, while the request has it. Nobody reaches the value before it is alone again.
struct Lent<T>(UnsafeCell<T>);

// SAFETY: a shared reference gives no access to the value; the last owner drops or takes it, on
// whatever thread that is, which `T: Send` allows.
unsafe impl<T: Send> Send for Lent<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Lent<T> {}

/// The caller's end of a buffer that a request has.
pub(crate) struct Loan<T>(Arc<Lent<T>>);

impl<T> Loan<T> {
    /// Lends a value; `parts` says where its bytes are, once it has found its place.
    fn lend(value: T, parts: impl FnOnce(&mut T) -> (*mut u8, usize)) -> (Self, Buffers)
    where
        T: Send + 'static,
    {
        let mut lent = Arc::new(Lent(UnsafeCell::new(value)));
        let parts = Arc::get_mut(&mut lent).map(|lent| parts(lent.0.get_mut()));
        let guard: Arc<dyn Any + Send + Sync> = Arc::<Lent<T>>::clone(&lent);
        // SAFETY: the callers' `parts` are valid while the value exists, which is as long as the
        // guard does, and nobody reaches the value meanwhile.
        let buffers = unsafe { Buffers::from_raw(parts, guard) };
        (Self(lent), buffers)
    }

    /// The buffer, once the [`Buffers`] made of it are gone; `None` before.
    pub(crate) fn end(self) -> Option<T> {
        Some(Arc::into_inner(self.0)?.0.into_inner())
    }
}

/// Lends a buffer to a read.
pub(crate) fn lend_target<T: IoBufMut>(value: T) -> (Loan<T>, Buffers) {
    Loan::lend(value, |value| (value.stable_mut_ptr(), value.buf_len()))
}

/// Lends a buffer to a write, which only reads it.
pub(crate) fn lend_source<T: IoBuf>(value: T) -> (Loan<T>, Buffers) {
    Loan::lend(value, |value| {
        (value.stable_ptr().cast_mut(), value.buf_len())
    })
}

#[cfg(feature = "tokio-uring")]
mod local {
    use std::{
        marker::PhantomData,
        mem::ManuallyDrop,
        os::fd::OwnedFd,
        thread::{self, ThreadId},
    };

    use tokio::io::unix::AsyncFd;
    use tokio_uring::buf::{BoundedBuf, BoundedBufMut, IoBuf, IoBufMut, Slice};

    use super::{Buffers, Loan};

    /// The caller's end of a buffer that a request has, on the caller's own thread.
    pub(crate) struct LocalLoan<T> {
        loan: Loan<Local<T>>,
        _not_send: PhantomData<*const ()>,
    }

    impl<T: 'static> LocalLoan<T> {
        fn lend(value: T, parts: impl FnOnce(&mut T) -> (*mut u8, usize)) -> (Self, Buffers) {
            let (loan, buffers) = Loan::lend(Local::new(value), |local: &mut Local<T>| {
                parts(&mut local.value)
            });
            let _not_send = PhantomData;
            (Self { loan, _not_send }, buffers)
        }

        /// The buffer, once the [`Buffers`] made of it are gone; `None` before.
        pub(crate) fn end(self) -> Option<T> {
            self.loan.end()?.into_inner()
        }
    }

    /// A value that is only reached and dropped on the thread it came from.
    struct Local<T> {
        value: ManuallyDrop<T>,
        thread: ThreadId,
    }

    // SAFETY: the value is not reached from another thread: `into_inner` and `drop` look first.
    unsafe impl<T> Send for Local<T> {}

    impl<T> Local<T> {
        fn new(value: T) -> Self {
            Self {
                value: ManuallyDrop::new(value),
                thread: thread::current().id(),
            }
        }

        fn is_here(&self) -> bool {
            self.thread == thread::current().id()
        }

        /// The value; `None`, and it is leaked, on another thread.
        fn into_inner(mut self) -> Option<T> {
            let here = self.is_here();
            // The drop below finds nothing to do.
            let value = here.then(|| {
                // SAFETY: it is taken once: `self` is forgotten.
                unsafe { ManuallyDrop::take(&mut self.value) }
            });
            std::mem::forget(self);
            value
        }
    }

    impl<T> Drop for Local<T> {
        fn drop(&mut self) {
            if self.is_here() {
                // SAFETY: it is dropped once, here, on its own thread.
                unsafe { ManuallyDrop::drop(&mut self.value) };
            }
        }
    }

    /// Lends a buffer of a tokio-uring program to a read: all of the slice, initialised or not.
    pub(crate) fn lend_uring_target<T: IoBufMut>(
        slice: Slice<T>,
    ) -> (LocalLoan<Slice<T>>, Buffers) {
        LocalLoan::lend(slice, |slice| {
            let (begin, len) = (slice.begin(), slice.bytes_total());
            // The slice's own pointer is made of a reference to the initialised bytes alone.
            let base = IoBufMut::stable_mut_ptr(slice.get_mut());
            (base.wrapping_add(begin), len)
        })
    }

    /// Lends a buffer of a tokio-uring program to a write: the slice's initialised bytes.
    pub(crate) fn lend_uring_source<T: IoBuf>(slice: Slice<T>) -> (LocalLoan<Slice<T>>, Buffers) {
        LocalLoan::lend(slice, |slice| {
            (slice.stable_ptr().cast_mut(), slice.bytes_init())
        })
    }

    /// A descriptor whose readiness the tokio runtime of this thread watches.
    pub(crate) fn watch(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the descriptor is owned, and is the same and open until it is dropped.
        Ok(unsafe { AsyncFd::register(fd) }?)
    }

    /// Says that a read filled the slice.
    pub(crate) fn filled<T: IoBufMut>(slice: &mut Slice<T>) {
        let bytes = slice.bytes_total();
        // SAFETY: the read has initialised them.
        unsafe { slice.set_init(bytes) };
    }
}

#[cfg(feature = "tokio-uring")]
pub(crate) use local::{LocalLoan, filled, lend_uring_source, lend_uring_target, watch};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_the_request_is_over() {
        let (loan, buffers) = lend_target(vec![0u8; 4]);
        buffers.copy_in(1, &[7, 8]);
        drop(buffers);
        assert_eq!(loan.end(), Some(vec![0, 7, 8, 0]));
    }

    #[test]
    fn a_request_keeps_the_buffer_of_a_caller_who_left() {
        let bytes: Arc<[u8]> = Arc::from([1u8, 2, 3].as_slice());
        let (loan, buffers) = lend_source(Arc::clone(&bytes));
        drop(loan);
        let mut copy = [0; 3];
        buffers.copy_out(0, &mut copy);
        assert_eq!(copy, [1, 2, 3]);
        assert_eq!(Arc::strong_count(&bytes), 2);
        drop(buffers);
        assert_eq!(Arc::strong_count(&bytes), 1);
    }

    #[test]
    fn a_loan_cannot_end_while_the_request_has_the_buffer() {
        let (loan, buffers) = lend_source(vec![1u8]);
        assert_eq!(loan.end(), None);
        drop(buffers);
    }

    #[test]
    fn empty_buffers_have_no_segments() {
        let (loan, buffers) = lend_target(Vec::new());
        assert!(buffers.segments().is_empty());
        drop(buffers);
        assert_eq!(loan.end(), Some(Vec::new()));
    }
}
