//! How the device reaches the front end: call and error descriptors, and the back-end channel.

use std::{
    fs::File,
    io,
    sync::{Mutex, PoisonError, RwLock},
};

use vhost::vhost_user::message::BackendReq;
use virtio_devices::{Interrupt, virtio::QueueFault};

use super::message::Channel;
use crate::sys;

/// The descriptors of one ring.
#[derive(Debug, Default)]
struct RingFiles {
    /// Told when buffers were used.
    call: RwLock<Option<File>>,
    /// Told when the ring is broken.
    err: Mutex<Option<File>>,
}

/// The way to the front end. It lives as long as the device; what it knows of a front end goes
/// with the connection.
#[derive(Debug)]
pub(super) struct Notifier {
    rings: Vec<RingFiles>,
    /// The back-end channel, if the front end made one.
    channel: Mutex<Option<Channel>>,
}

impl Notifier {
    /// For so many queues.
    pub(super) fn new(queues: u16) -> Self {
        Self {
            rings: (0..queues).map(|_| RingFiles::default()).collect(),
            channel: Mutex::new(None),
        }
    }

    /// Sets where a ring tells of used buffers.
    pub(super) fn set_call(&self, index: usize, file: Option<File>) {
        if let Some(ring) = self.rings.get(index) {
            *ring.call.write().unwrap_or_else(PoisonError::into_inner) = file;
        }
    }

    /// Sets where a ring tells that it is broken.
    pub(super) fn set_err(&self, index: usize, file: Option<File>) {
        if let Some(ring) = self.rings.get(index) {
            *ring.err.lock().unwrap_or_else(PoisonError::into_inner) = file;
        }
    }

    /// Sets the back-end channel.
    pub(super) fn set_channel(&self, channel: Option<Channel>) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }

    /// Forgets the front end.
    pub(super) fn clear(&self) {
        for index in 0..self.rings.len() {
            self.set_call(index, None);
            self.set_err(index, None);
        }
        self.set_channel(None);
    }
}

impl Interrupt for Notifier {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        let Some(ring) = self.rings.get(usize::from(queue)) else {
            return Ok(());
        };
        // The control thread holds the lock only to change the descriptor.
        match &*ring.call.read().unwrap_or_else(PoisonError::into_inner) {
            Some(file) => sys::signal(file),
            None => Ok(()),
        }
    }

    /// Sends `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, without asking for a reply: a front end that
    /// handles it reads the configuration space, which we answer on this very thread.
    fn signal_config(&self) -> io::Result<()> {
        match &*self.channel.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(channel) => channel.notify(BackendReq::CONFIG_CHANGE_MSG as u32),
            None => Ok(()),
        }
    }

    fn queue_broken(&self, queue: u16, fault: QueueFault) {
        tracing::warn!(queue, %fault, "the guest broke its queue");
        let Some(ring) = self.rings.get(usize::from(queue)) else {
            return;
        };
        if let Some(file) = &*ring.err.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = sys::signal(file);
        }
    }
}
