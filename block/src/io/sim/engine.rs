//! The engine of a simulation.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{
    SimFile, lock, nanos,
    world::{Action, Flight, Port, World},
};
use crate::{
    Error, Result,
    io::{
        Backend, Engine, EngineFile, HostFile, HostOp, Segment, Started, Token,
        sys::{self, FileTable, MAX_TRANSFER, Notifier},
    },
};

/// An engine of a [`SimHost`](super::SimHost).
pub(super) struct SimEngine {
    world: Arc<Mutex<World>>,
    port: usize,
    depth: usize,
    files: FileTable,
    /// Started, not submitted; a timer with its time.
    waiting: Vec<(Token, Action, Option<u64>)>,
    watches: Vec<(Token, RawFd)>,
    notifier: Arc<Notifier>,
}

impl SimEngine {
    pub(super) fn new(world: &Arc<Mutex<World>>, depth: u32) -> Result<Self> {
        let notifier =
            Arc::new(Notifier::new().map_err(|e| Error::from(e).operation("create eventfd"))?);
        let mut inner = lock(world);
        inner.ports.push(Port {
            done: Vec::new(),
            notifier: Arc::clone(&notifier),
            in_flight: 0,
        });
        let port = inner.ports.len() - 1;
        drop(inner);
        Ok(Self {
            world: Arc::clone(world),
            port,
            depth: depth.max(1) as usize,
            files: FileTable::default(),
            waiting: Vec::new(),
            watches: Vec::new(),
            notifier,
        })
    }

    /// The file's index in the world, whether it may be written, and the unit of direct I/O.
    fn target(&self, file: EngineFile) -> Option<(usize, &HostFile)> {
        let file = self.files.get(file)?.file.as_ref();
        let Backend::Simulated(simulated) = file.backend() else {
            return None;
        };
        let simulated = simulated.as_any().downcast_ref::<SimFile>()?;
        Some((simulated.index, file))
    }

    fn action(&self, op: &HostOp<'_>) -> Result<Action, i32> {
        Ok(match *op {
            HostOp::Read {
                file,
                offset,
                segments,
            } => {
                let (index, file) = self.target(file).ok_or(-libc::EBADF)?;
                let segments = check(file, offset, segments)?;
                Action::Read {
                    file: index,
                    offset,
                    segments: segments.into(),
                    unit: u64::from(file.alignment().offset),
                }
            }
            HostOp::Write {
                file,
                offset,
                segments,
                dsync,
            } => {
                let (index, file) = self.target(file).ok_or(-libc::EBADF)?;
                writable(file)?;
                let segments = check(file, offset, segments)?;
                Action::Write {
                    file: index,
                    offset,
                    segments: segments.into(),
                    unit: u64::from(file.alignment().offset),
                    dsync,
                }
            }
            HostOp::Sync { file } => {
                let (index, _) = self.target(file).ok_or(-libc::EBADF)?;
                Action::Sync {
                    file: index,
                    point: 0,
                }
            }
            HostOp::Fallocate {
                file,
                mode,
                offset,
                len,
            } => {
                let (index, file) = self.target(file).ok_or(-libc::EBADF)?;
                writable(file)?;
                // The sum fits a signed offset too.
                let end = offset
                    .checked_add(len)
                    .and_then(|end| i64::try_from(end).ok());
                if len == 0 || end.is_none() {
                    return Err(-libc::EINVAL);
                }
                Action::Fallocate {
                    file: index,
                    mode,
                    offset,
                    len,
                }
            }
            HostOp::Timer { .. } | HostOp::PollReadable { .. } => Action::Result(0),
        })
    }

    fn launch_waiting(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let mut world = lock(&self.world);
        for (token, action, after) in self.waiting.drain(..) {
            world.launch(self.port, token, action, after);
        }
    }

    /// Moves watches whose descriptor is readable to `out`.
    fn look_at_watches(&mut self, out: &mut Vec<(Token, i32)>) {
        self.watches.retain(|(token, fd)| {
            let revents = look(*fd);
            if revents != 0 {
                out.push((*token, sys::poll_result(revents)));
            }
            revents == 0
        });
    }
}

fn look(fd: RawFd) -> libc::c_short {
    let mut polled = [sys::readable(fd)];
    match sys::poll(&mut polled, Some(Duration::ZERO)) {
        Ok(()) => polled[0].revents,
        Err(_) => 0,
    }
}

fn writable(file: &HostFile) -> Result<(), i32> {
    if file.is_writable() {
        Ok(())
    } else {
        Err(-libc::EBADF)
    }
}

/// What a host checks of a transfer; the segments that one operation takes.
fn check<'a>(file: &HostFile, offset: u64, segments: &'a [Segment]) -> Result<&'a [Segment], i32> {
    let alignment = file.alignment();
    let unit = u64::from(alignment.offset);
    let segments = sys::prefix(segments, unit as usize);
    let mut total = 0usize;
    for segment in segments {
        if !(segment.as_ptr() as usize).is_multiple_of(alignment.memory as usize) {
            return Err(-libc::EINVAL);
        }
        total = total.checked_add(segment.len()).ok_or(-libc::EINVAL)?;
    }
    let end = i64::try_from(offset)
        .ok()
        .and_then(|offset| offset.checked_add(i64::try_from(total).ok()?));
    if end.is_none()
        || total > MAX_TRANSFER
        || !offset.is_multiple_of(unit)
        || !(total as u64).is_multiple_of(unit)
    {
        return Err(-libc::EINVAL);
    }
    Ok(segments)
}

impl Engine for SimEngine {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn register(&mut self, file: &Arc<HostFile>) -> Result<EngineFile> {
        let ours = match file.backend() {
            Backend::Os(_) => false,
            Backend::Simulated(simulated) => simulated
                .as_any()
                .downcast_ref::<SimFile>()
                .is_some_and(|simulated| Arc::ptr_eq(&simulated.world, &self.world)),
        };
        if !ours {
            return Err(Error::unsupported(
                "a simulated engine drives only the files of its own host",
            )
            .path(file.path()));
        }
        Ok(self.files.insert(file))
    }

    fn unregister(&mut self, file: EngineFile) {
        self.files.remove(file);
    }

    unsafe fn start(&mut self, token: Token, op: HostOp<'_>) -> Started {
        let mut world = lock(&self.world);
        if world.ports[self.port].in_flight >= self.depth {
            return Started::Full;
        }
        let after = match op {
            HostOp::PollReadable { fd } => {
                drop(world);
                self.watches.push((token, fd));
                return Started::Pending;
            }
            HostOp::Timer { after } => Some(nanos(after)),
            _ => None,
        };
        let action = match self.action(&op) {
            Ok(action) => action,
            Err(result) => Action::Result(result),
        };
        let inline = world.config.p_inline;
        if after.is_none() && world.holds.is_empty() && world.rng.chance(inline) {
            return Started::Done(world.run_inline(action));
        }
        world.ports[self.port].in_flight += 1;
        drop(world);
        self.waiting.push((token, action, after));
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        self.launch_waiting();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(Token, i32)>) {
        self.notifier.clear();
        out.append(&mut lock(&self.world).ports[self.port].done);
        self.look_at_watches(out);
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.launch_waiting();
        if look(self.notifier.as_raw_fd()) != 0 || self.watches.iter().any(|(_, fd)| look(*fd) != 0)
        {
            return Ok(());
        }
        let mut world = lock(&self.world);
        if !world.ports[self.port].done.is_empty() {
            return Ok(());
        }
        let limit = timeout.map_or(u64::MAX, |timeout| world.now.saturating_add(nanos(timeout)));
        if !world.step(limit) {
            if timeout.is_some() {
                world.now = limit;
            }
            drop(world);
            // Only another thread can change anything now.
            std::thread::yield_now();
        }
        Ok(())
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    fn is_simulated(&self) -> bool {
        true
    }
}

impl Drop for SimEngine {
    fn drop(&mut self) {
        self.launch_waiting();
        let mut world = lock(&self.world);
        let port = self.port;
        // Timers end with the engine; everything else is waited for, because it uses memory.
        let timers: Vec<_> = world
            .events
            .iter()
            .filter(|(_, flight)| flight.port == port && matches!(flight.action, Action::Result(_)))
            .map(|(key, _)| *key)
            .collect();
        for key in timers {
            world.events.remove(&key);
            world.ports[port].in_flight -= 1;
        }
        let (held, others): (Vec<Flight>, Vec<Flight>) = std::mem::take(&mut world.held)
            .into_iter()
            .partition(|flight| flight.port == port);
        world.held = others;
        for flight in held {
            world.land(&flight);
        }
        while world.ports[port].in_flight > 0 && world.step(u64::MAX) {}
        debug_assert_eq!(world.ports[port].in_flight, 0);
        world.ports[port].done.clear();
    }
}
