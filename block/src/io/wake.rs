//! Wake-ups from any thread, for the driver of one.

use std::{
    cell::Cell,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
};

use super::slab::Key;
use crate::sync::lock;

/// Tasks to poll, pushed from any thread.
pub(super) struct WakeQueue {
    pub(super) list: Mutex<Vec<Key>>,
    pub(super) signalled: AtomicBool,
    pub(super) notifier: OwnedFd,
}

thread_local! {
    /// The wake queue whose turn runs on this thread: it needs no signal.
    pub(super) static CURRENT: Cell<*const WakeQueue> = const { Cell::new(ptr::null()) };
}

impl WakeQueue {
    fn signal(&self) {
        if CURRENT.get() == ptr::from_ref(self) || self.signalled.swap(true, Ordering::AcqRel) {
            return;
        }
        super::fsinfo::write_eventfd(self.notifier.as_raw_fd());
    }
}

/// Wakes a task.
pub(super) struct TaskWaker {
    pub(super) key: Key,
    /// The task is listed and was not polled since: however many wake it, it is polled once.
    pub(super) listed: AtomicBool,
    pub(super) queue: Arc<WakeQueue>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.listed.swap(true, Ordering::AcqRel) {
            return;
        }
        lock(&self.queue.list).push(self.key);
        self.queue.signal();
    }
}

/// Wakes the future that a thread waits for.
pub(super) struct RootWaker {
    pub(super) woken: AtomicBool,
    pub(super) queue: Arc<WakeQueue>,
}

impl Wake for RootWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.queue.signal();
    }
}
