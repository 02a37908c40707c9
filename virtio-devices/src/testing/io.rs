//! The data plane of the mock disk.

use std::{
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    time::{Duration, Instant},
};

use block::{
    Result,
    io::{AsyncIo, Completion, MemoryRegions, Request},
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::state::{Plane, Shared};

/// The epoll data of the completion eventfd; watches use their descriptor.
const COMPLETIONS: u64 = u64::MAX;

pub(super) struct MockIo {
    disk: Shared,
    plane: usize,
    capacity: usize,
    in_flight: usize,
    event: EventFd,
    epoll: Epoll,
    watches: Vec<(RawFd, u64)>,
    fired: Vec<Completion>,
}

impl MockIo {
    pub(super) fn new(disk: Shared, capacity: usize) -> Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, COMPLETIONS),
        )?;
        let plane = {
            let mut state = disk.lock();
            state.planes.push(Plane {
                ready: Vec::new(),
                event: event.try_clone()?,
            });
            state.planes.len() - 1
        };
        Ok(Self {
            disk,
            plane,
            capacity,
            in_flight: 0,
            event,
            epoll,
            watches: Vec::new(),
            fired: Vec::new(),
        })
    }

    /// Turns watches that fired into completions; returns whether completions are at hand.
    fn poll(&mut self, timeout: i32) -> Result<bool> {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error.into()),
        };
        let mut any = false;
        for event in &events[..count] {
            any = true;
            if event.data() == COMPLETIONS {
                continue;
            }
            let fd = event.data() as RawFd;
            self.epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
            if let Some(at) = self.watches.iter().position(|watch| watch.0 == fd) {
                let (_, id) = self.watches.swap_remove(at);
                self.fired.push(Completion {
                    id,
                    result: Ok(()),
                    buffers: None,
                });
            }
        }
        Ok(any || !self.fired.is_empty())
    }
}

impl AsyncIo for MockIo {
    fn submit(&mut self, batch: &mut Vec<Request>) -> usize {
        let taken = batch.len().min(self.capacity - self.in_flight);
        if taken == 0 {
            return 0;
        }
        let mut state = self.disk.lock();
        state.batches.push(taken);
        for request in batch.drain(..taken) {
            state.accept(self.plane, request);
        }
        self.in_flight += taken;
        taken
    }

    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let _ = self.poll(0);
        let _ = self.event.read();
        let before = out.len();
        out.append(&mut self.disk.lock().planes[self.plane].ready);
        let ended = out.len() - before;
        self.in_flight -= ended;
        out.append(&mut self.fired);
        out.len() - before
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self.event` lives.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, id: u64) -> Result<()> {
        let raw = fd.as_raw_fd();
        self.epoll.ctl(
            ControlOperation::Add,
            raw,
            EpollEvent::new(EventSet::IN, raw as u64),
        )?;
        self.watches.push((raw, id));
        Ok(())
    }

    fn register_memory(&mut self, memory: MemoryRegions) -> bool {
        self.disk.lock().pinned.push(memory.len());
        true
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = deadline.map_or(-1, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                left.as_millis().try_into().unwrap_or(i32::MAX)
            });
            if self.poll(left)? {
                return Ok(true);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
        }
    }
}

impl Drop for MockIo {
    fn drop(&mut self) {
        // What is held would otherwise wait for a queue that is gone.
        while self.in_flight > 0 && !self.disk.lock().held.is_empty() {
            while self.disk.lock().release(0) {}
            let mut out = Vec::new();
            self.reap(&mut out);
        }
    }
}
