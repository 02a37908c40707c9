//! An interrupt line that counts.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Interrupt, virtio::QueueFault};

/// Counts the interrupts of every queue, and wakes an eventfd with each.
#[derive(Debug)]
pub struct CountingInterrupt {
    queues: Vec<AtomicUsize>,
    config: AtomicUsize,
    faults: Mutex<Vec<(u16, QueueFault)>>,
    event: EventFd,
}

impl CountingInterrupt {
    /// For a device of that many queues.
    ///
    /// # Errors
    /// The host's, when there is no eventfd to be had.
    pub fn new(queues: u16) -> io::Result<Self> {
        Ok(Self {
            queues: (0..queues).map(|_| AtomicUsize::new(0)).collect(),
            config: AtomicUsize::new(0),
            faults: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Interrupts of a queue so far.
    #[must_use]
    pub fn count(&self, queue: u16) -> usize {
        self.queues
            .get(usize::from(queue))
            .map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// Configuration interrupts so far.
    #[must_use]
    pub fn config_count(&self) -> usize {
        self.config.load(Ordering::Acquire)
    }

    /// The queues that broke, and why.
    #[must_use]
    pub fn faults(&self) -> Vec<(u16, QueueFault)> {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Becomes readable with every queue interrupt.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Interrupt for CountingInterrupt {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        let count = self
            .queues
            .get(usize::from(queue))
            .ok_or(io::ErrorKind::NotFound)?;
        count.fetch_add(1, Ordering::AcqRel);
        self.event.write(1)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn queue_broken(&self, queue: u16, fault: QueueFault) {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((queue, fault));
        let _ = self.signal_config();
    }
}
