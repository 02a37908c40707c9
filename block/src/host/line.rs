//! The line in which requests wait for whoever drives the disk, and the tickets they wait with.

use std::{
    collections::VecDeque,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use crate::{Error, ErrorKind, Result, io::RequestOp, sync::lock};

/// Tickets of dropped futures that stay in line before somebody clears them away.
const MAX_ABANDONED: usize = 64;

/// What a future and the driver of the disk share about one request.
pub(super) struct Ticket {
    state: Mutex<State>,
    /// Name, offset and length of the request, for messages.
    pub(super) summary: (&'static str, u64, u64),
}

struct State {
    /// The request, until it is started or its future is dropped.
    op: Option<RequestOp>,
    result: Option<Result<()>>,
    waker: Waker,
}

impl Ticket {
    /// The request, to start it; `None` when nobody wants it any more.
    pub(super) fn take_op(&self) -> Option<RequestOp> {
        lock(&self.state).op.take()
    }

    /// Tells the future how the request ended.
    pub(super) fn end(&self, result: Result<()>) {
        let waker = {
            let mut state = lock(&self.state);
            state.result = Some(result);
            std::mem::replace(&mut state.waker, Waker::noop().clone())
        };
        waker.wake();
    }
}

/// Requests that were made and not yet started, and whoever sleeps until there are some.
///
/// A ticket's lock is taken inside the line's, never the other way round; wakers are called and
/// buffers dropped under neither.
pub(super) struct Line {
    path: PathBuf,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    tickets: VecDeque<Arc<Ticket>>,
    abandoned: usize,
    /// The driver of the disk, while it sleeps.
    sleeper: Option<Waker>,
    closed: bool,
}

impl Line {
    pub(super) fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self {
            path: path.to_owned(),
            waiting: Mutex::default(),
        })
    }

    /// A request, which joins the line when it is first polled.
    pub(super) fn request(self: &Arc<Self>, op: RequestOp) -> InLine {
        InLine {
            line: Arc::clone(self),
            stage: Stage::New(op),
        }
    }

    fn join(&self, ticket: Arc<Ticket>) -> Result<(), ErrorKind> {
        let sleeper = {
            let mut waiting = lock(&self.waiting);
            if waiting.closed {
                return Err(ErrorKind::Cancelled);
            }
            waiting.tickets.push_back(ticket);
            waiting.sleeper.take()
        };
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
        Ok(())
    }

    /// The next tickets in line, at most `count`.
    pub(super) fn take(&self, count: usize, out: &mut Vec<Arc<Ticket>>) {
        let mut waiting = lock(&self.waiting);
        let count = count.min(waiting.tickets.len());
        out.extend(waiting.tickets.drain(..count));
    }

    /// Has `waker` called when the next request joins the line or it is closed; `false` when there
    /// is something to do already. In a closed line only requests in flight are worth waiting for.
    pub(super) fn sleep(&self, waker: &Waker, in_flight: bool) -> bool {
        let mut waiting = lock(&self.waiting);
        if !waiting.tickets.is_empty() {
            return false;
        }
        if waiting.closed {
            return in_flight;
        }
        waiting.sleeper = Some(waker.clone());
        true
    }

    /// The driver does not sleep any more.
    pub(super) fn awake(&self) {
        lock(&self.waiting).sleeper = None;
    }

    /// No request joins any more; those in line are still served.
    pub(super) fn close(&self) {
        let sleeper = {
            let mut waiting = lock(&self.waiting);
            waiting.closed = true;
            waiting.sleeper.take()
        };
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
    }

    /// Whether no request is in line and none will be.
    pub(super) fn is_over(&self) -> bool {
        let waiting = lock(&self.waiting);
        waiting.closed && waiting.tickets.is_empty()
    }

    /// Clears tickets of dropped futures away once they are more than half of the line.
    fn abandon(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.abandoned += 1;
        if waiting.abandoned > MAX_ABANDONED.max(waiting.tickets.len() / 2) {
            waiting
                .tickets
                .retain(|ticket| lock(&ticket.state).op.is_some());
            waiting.abandoned = 0;
        }
    }

    pub(super) fn cancelled(&self, (name, offset, len): (&'static str, u64, u64)) -> Error {
        let error = Error::new(ErrorKind::Cancelled)
            .operation(name)
            .path(&self.path);
        if len == 0 {
            error
        } else {
            error.offset(offset)
        }
    }
}

enum Stage {
    New(RequestOp),
    Waiting(Arc<Ticket>),
    Ended,
}

/// A request on its way. Dropped before it was started, it is taken back.
#[must_use = "a request does nothing unless it is polled"]
pub(super) struct InLine {
    line: Arc<Line>,
    stage: Stage,
}

impl Future for InLine {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        match std::mem::replace(&mut this.stage, Stage::Ended) {
            Stage::New(op) => {
                let summary = op.summary();
                let ticket = Arc::new(Ticket {
                    summary,
                    state: Mutex::new(State {
                        op: Some(op),
                        result: None,
                        waker: context.waker().clone(),
                    }),
                });
                if this.line.join(Arc::clone(&ticket)).is_err() {
                    return Poll::Ready(Err(this.line.cancelled(summary)));
                }
                this.stage = Stage::Waiting(ticket);
                Poll::Pending
            }
            Stage::Waiting(ticket) => {
                let mut state = lock(&ticket.state);
                if let Some(result) = state.result.take() {
                    return Poll::Ready(result);
                }
                let before = (!state.waker.will_wake(context.waker()))
                    .then(|| std::mem::replace(&mut state.waker, context.waker().clone()));
                drop(state);
                drop(before);
                this.stage = Stage::Waiting(ticket);
                Poll::Pending
            }
            Stage::Ended => panic!("polled after the request ended"),
        }
    }
}

impl Drop for InLine {
    fn drop(&mut self) {
        if let Stage::Waiting(ticket) = &self.stage {
            let waker = std::mem::replace(&mut lock(&ticket.state).waker, Waker::noop().clone());
            drop(waker);
            if ticket.take_op().is_some() {
                self.line.abandon();
            }
        }
    }
}
