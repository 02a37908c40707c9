//! What the mock disk's control plane and its data planes share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{
    ErrorKind, Result,
    io::{Completion, Request, RequestOp},
};
use vmm_sys_util::eventfd::EventFd;

/// A request that reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logged {
    /// A read.
    Read {
        /// The first byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
    },
    /// A write.
    Write {
        /// The first byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
        /// Force unit access.
        fua: bool,
    },
    /// A flush.
    Flush,
    /// A discard.
    Discard {
        /// The first byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
    },
    /// A write zeroes.
    WriteZeroes {
        /// The first byte.
        offset: u64,
        /// The number of bytes.
        len: u64,
        /// May unmap.
        may_unmap: bool,
    },
}

impl Logged {
    fn of(op: &RequestOp) -> Self {
        match op {
            RequestOp::Read { offset, buffers } => Logged::Read {
                offset: *offset,
                len: buffers.len(),
            },
            RequestOp::Write {
                offset,
                buffers,
                fua,
            } => Logged::Write {
                offset: *offset,
                len: buffers.len(),
                fua: *fua,
            },
            RequestOp::Flush => Logged::Flush,
            RequestOp::Discard { offset, len } => Logged::Discard {
                offset: *offset,
                len: *len,
            },
            RequestOp::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => Logged::WriteZeroes {
                offset: *offset,
                len: *len,
                may_unmap: *may_unmap,
            },
        }
    }
}

type Failure = Box<dyn FnMut(&Logged) -> Option<ErrorKind> + Send>;
type ResizeListener = Box<dyn Fn(u64) + Send + Sync>;

/// What a data plane and the test share.
pub(super) struct Plane {
    pub(super) ready: Vec<Completion>,
    pub(super) event: EventFd,
}

/// What the handles of one mock disk share.
#[derive(Default)]
pub(super) struct State {
    pub(super) data: Vec<u8>,
    pub(super) hold: bool,
    pub(super) held: Vec<(usize, Request)>,
    pub(super) fail: Option<Failure>,
    pub(super) log: Vec<Logged>,
    pub(super) batches: Vec<usize>,
    pub(super) pinned: Vec<usize>,
    pub(super) listeners: Vec<ResizeListener>,
    pub(super) planes: Vec<Plane>,
}

impl State {
    /// A data plane got a request: does it or holds it.
    pub(super) fn accept(&mut self, plane: usize, request: Request) {
        self.log.push(Logged::of(&request.op));
        if self.hold {
            self.held.push((plane, request));
        } else {
            self.execute(plane, request);
        }
    }

    /// Does the held request at `index`; whether there was one.
    pub(super) fn release(&mut self, index: usize) -> bool {
        if index >= self.held.len() {
            return false;
        }
        let (plane, request) = self.held.remove(index);
        self.execute(plane, request);
        true
    }

    /// Does a request and completes it.
    pub(super) fn execute(&mut self, plane: usize, request: Request) {
        let allowed = self.allow(&Logged::of(&request.op));
        let result = allowed.and_then(|()| self.transfer(&request.op));
        let buffers = match request.op {
            RequestOp::Read { buffers, .. } | RequestOp::Write { buffers, .. } => Some(buffers),
            _ => None,
        };
        if let Some(plane) = self.planes.get_mut(plane) {
            plane.ready.push(Completion {
                id: request.id,
                result,
                buffers,
            });
            let _ = plane.event.write(1);
        }
    }

    /// Asks the test whether a request is to fail.
    pub(super) fn allow(&mut self, request: &Logged) -> Result<(), ErrorKind> {
        let failure = self.fail.as_mut().and_then(|fail| fail(request));
        failure.map_or(Ok(()), Err)
    }

    fn transfer(&mut self, op: &RequestOp) -> Result<(), ErrorKind> {
        match op {
            RequestOp::Read { offset, buffers } => {
                let from = slice(&mut self.data, *offset, buffers.len())?;
                buffers.copy_in(0, from);
            }
            RequestOp::Write {
                offset, buffers, ..
            } => buffers.copy_out(0, slice(&mut self.data, *offset, buffers.len())?),
            RequestOp::Flush => {}
            RequestOp::Discard { offset, len } | RequestOp::WriteZeroes { offset, len, .. } => {
                slice(&mut self.data, *offset, *len)?.fill(0);
            }
        }
        Ok(())
    }
}

/// Bytes of the disk.
pub(super) fn slice(data: &mut [u8], offset: u64, len: u64) -> Result<&mut [u8], ErrorKind> {
    let end = offset.checked_add(len).ok_or(ErrorKind::OutOfRange)?;
    if end > data.len() as u64 {
        return Err(ErrorKind::OutOfRange);
    }
    Ok(&mut data[offset as usize..end as usize])
}

/// A handle on the state.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<Mutex<State>>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
