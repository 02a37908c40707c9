//! Buffers of one queue that are used again: new ones cost zeroing and page faults.

use std::cell::RefCell;

use super::AlignedBuf;

/// The most bytes that are kept, and the most buffers.
const MAX_BYTES: usize = 4 << 20;
const MAX_BUFFERS: usize = 64;

/// Buffers that nobody uses.
#[derive(Debug, Default)]
pub(crate) struct SpareBuffers {
    kept: RefCell<Vec<AlignedBuf>>,
}

impl SpareBuffers {
    /// A buffer of `len` bytes with any content: for who overwrites every byte.
    pub(crate) fn take(&self, len: usize) -> AlignedBuf {
        let mut kept = self.kept.borrow_mut();
        match kept.iter().rposition(|buf| buf.len() == len) {
            Some(at) => kept.swap_remove(at),
            None => AlignedBuf::zeroed(len),
        }
    }

    /// Keeps a buffer for the next who asks for one.
    pub(crate) fn keep(&self, buf: AlignedBuf) {
        if buf.is_empty() || buf.len() > MAX_BYTES {
            return;
        }
        let mut kept = self.kept.borrow_mut();
        let mut bytes: usize = kept.iter().map(|buf| buf.len()).sum();
        // The oldest go: their sizes are not asked for any more.
        let mut old = 0;
        while bytes + buf.len() > MAX_BYTES || kept.len() - old == MAX_BUFFERS {
            bytes -= kept[old].len();
            old += 1;
        }
        kept.drain(..old);
        kept.push(buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_bounded() {
        let spare = SpareBuffers::default();
        let first = spare.take(4096);
        let at = first.as_ptr();
        spare.keep(first);
        assert_ne!(spare.take(8192).as_ptr(), at, "another length");
        assert_eq!(spare.take(4096).as_ptr(), at);
        for _ in 0..100 {
            spare.keep(AlignedBuf::zeroed(512));
        }
        assert_eq!(spare.kept.borrow().len(), MAX_BUFFERS);
        spare.keep(AlignedBuf::zeroed(MAX_BYTES));
        assert_eq!(spare.kept.borrow().len(), 1, "one that needs all the room");
        spare.keep(AlignedBuf::zeroed(MAX_BYTES + 1));
        assert_eq!(spare.kept.borrow().len(), 1);
    }
}
