//! Interrupts of a controller: a message a vector, or one level-triggered line.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::VectorInterrupt;

/// What a level-triggered line shows.
#[derive(Debug, Default)]
struct Line {
    /// A bit a completion queue that has entries the host has not taken, and its vector.
    waiting: Vec<(u16, u16)>,
    mask: u32,
    asserted: bool,
}

/// The interrupts of a controller.
pub(super) struct Interrupts {
    sink: Arc<dyn VectorInterrupt>,
    /// Messages; otherwise the line.
    messages: AtomicBool,
    line: Mutex<Line>,
}

impl Interrupts {
    pub(super) fn new(sink: Arc<dyn VectorInterrupt>) -> Self {
        Self {
            sink,
            messages: AtomicBool::new(true),
            line: Mutex::default(),
        }
    }

    /// Messages (MSI-X or MSI are enabled), or the line.
    pub(super) fn use_messages(&self, messages: bool) {
        self.messages.store(messages, Ordering::Release);
        self.with_line(|_| ());
    }

    pub(super) fn uses_messages(&self) -> bool {
        self.messages.load(Ordering::Acquire)
    }

    /// A completion queue has new entries. Returns whether a message was sent, and how that went.
    pub(super) fn posted(&self, queue: u16, vector: u16) -> Option<std::io::Result<()>> {
        if self.uses_messages() {
            return Some(self.sink.signal(vector));
        }
        self.with_line(|line| {
            if !line.waiting.contains(&(queue, vector)) {
                line.waiting.push((queue, vector));
            }
        });
        None
    }

    /// A completion queue is gone, or the host has taken everything from it, which is asked under
    /// the lock that [`posted`](Self::posted) takes after the entry was counted.
    pub(super) fn taken(&self, queue: u16, empty: impl FnOnce() -> bool) {
        if !self.uses_messages() {
            self.with_line(|line| {
                if empty() {
                    line.waiting.retain(|(id, _)| *id != queue);
                }
            });
        }
    }

    /// INTMS.
    pub(super) fn mask(&self, mask: u32) {
        self.with_line(|line| line.mask = mask);
    }

    pub(super) fn reset(&self) {
        self.with_line(|line| {
            line.waiting.clear();
            line.mask = 0;
        });
    }

    fn with_line(&self, change: impl FnOnce(&mut Line)) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut line);
        let unmasked =
            |vector: u16| vector >= 32 || line.mask & 1u32.wrapping_shl(u32::from(vector)) == 0;
        let level =
            !self.uses_messages() && line.waiting.iter().any(|(_, vector)| unmasked(*vector));
        if level != line.asserted {
            line.asserted = level;
            self.sink.set_level(level);
        }
    }
}
