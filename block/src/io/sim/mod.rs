//! A deterministic simulation of files and of the engine that drives them.
//!
//! A [`SimHost`] is a [`Host`] whose files are memory and whose operations end in virtual time, in
//! an order that follows from a seed alone. The code above it is the one that runs over the
//! operating system. All engines of a host share its clock and are driven by one thread; the same
//! seed and the same calls give the same run, which [`SimHost::trace`] can prove.
//!
//! # Time
//! An operation starts when its engine submits it and ends after a random delay. `reap` returns what
//! has ended; only `wait` and [`SimHost::step`] move the clock, to the end of the next operation of
//! any engine. When nothing is in flight anywhere, `wait` returns at once:
//! [`SimHost::idle`] tells a test that it would wait for ever.
//!
//! # Effect
//! A read sees the file as it is when the read ends; a write takes its bytes from memory and changes
//! the file when the write ends, as a device that copies at the last moment would. Overlapping
//! operations in flight therefore take effect in any order, and memory that changes under a write is
//! noticed.
//!
//! # Durability
//! A sync makes exactly those changes durable that had ended when it was submitted. What it does not
//! cover may or may not survive a [`SimHost::power_cut`], sector by sector, and the file may be
//! shorter than it was. A failed sync loses some of what it should have covered for good. After
//! [`SimHost::kill`] only operations in flight are in doubt. In both cases the old host is dead:
//! everything on it fails with `EIO`, so that its tasks can end, and the new host goes on.
//! Directories are not simulated: a created file exists.
//!
//! # Faults
//! [`SimConfig`] gives probabilities; [`SimHost::inject`] plans single faults, and [`SimHost::hold`]
//! keeps operations from ending.

mod content;
mod engine;
mod file_state;
mod world;

use std::{
    any::Any,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use self::{content::Content, engine::SimEngine, world::World};
use super::{Engine, EngineKind, FileOptions, Host, HostFile, IoAlignment, SimulatedFile};
use crate::{Error, Result};

/// What a simulation does, and how likely.
#[derive(Clone, Copy, Debug)]
pub struct SimConfig {
    /// Where all random numbers come from.
    pub seed: u64,
    /// The shortest time an operation takes.
    pub min_delay: Duration,
    /// The longest time an operation takes.
    pub max_delay: Duration,
    /// Probability that a transfer is shorter than asked, by whole units of direct I/O.
    pub p_short: f64,
    /// Probability that an operation ends with `EINTR` or `EAGAIN` and did nothing.
    pub p_eintr: f64,
    /// Probability that an operation fails with `EIO`.
    pub p_error: f64,
    /// Probability that a write or allocation that needs space fails with `ENOSPC`.
    pub p_enospc: f64,
    /// Probability that an operation is done when it starts.
    pub p_inline: f64,
    /// What a disk writes as a whole, in bytes.
    pub sector: u32,
    /// What files opened for direct I/O demand.
    pub alignment: IoAlignment,
    /// The `errno` with which the file system refuses locks; `None` where it has them.
    pub lock_errno: Option<i32>,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            min_delay: Duration::from_micros(10),
            max_delay: Duration::from_millis(1),
            p_short: 0.0,
            p_eintr: 0.0,
            p_error: 0.0,
            p_enospc: 0.0,
            p_inline: 0.0,
            sector: 512,
            alignment: IoAlignment {
                memory: 512,
                offset: 512,
            },
            lock_errno: None,
        }
    }
}

impl SimConfig {
    /// The default with a seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }
}

/// A kind of operation, for planned faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Syncs.
    Sync,
    /// Punching, zeroing, allocating.
    Fallocate,
}

/// A planned fault: of the operations of one kind, counted as they are submitted, the first `skip`
/// are left alone and the next `count` fail.
#[derive(Clone, Debug)]
pub struct SimFault {
    /// On this file, or on any.
    pub path: Option<PathBuf>,
    /// Which kind.
    pub op: SimOp,
    /// How many to leave alone.
    pub skip: u64,
    /// How many to fail.
    pub count: u64,
    /// The `errno` to fail with. `EIO` lets a write or sync take effect in part.
    pub errno: i32,
}

/// Operations that ended so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimStats {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Syncs.
    pub syncs: u64,
    /// Punching, zeroing, allocating.
    pub fallocates: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A simulated host. Clones are the same host.
#[derive(Clone, Debug)]
pub struct SimHost {
    world: Arc<Mutex<World>>,
}

impl SimHost {
    /// A host without files.
    #[must_use]
    pub fn new(config: SimConfig) -> Self {
        Self::of(World::new(config))
    }

    fn of(world: World) -> Self {
        Self {
            world: Arc::new(Mutex::new(world)),
        }
    }

    /// Makes a file with durable content, or gives an existing one that content.
    pub fn create(&self, path: impl AsRef<Path>, bytes: &[u8]) -> Arc<SimFile> {
        let index = lock(&self.world).add_file(path.as_ref(), Content::from_slice(bytes));
        self.at(index)
    }

    /// A file that exists.
    #[must_use]
    pub fn file(&self, path: impl AsRef<Path>) -> Option<Arc<SimFile>> {
        let index = lock(&self.world).names.get(path.as_ref()).copied()?;
        Some(self.at(index))
    }

    fn at(&self, index: usize) -> Arc<SimFile> {
        Arc::new(SimFile {
            world: Arc::clone(&self.world),
            index,
        })
    }

    /// The paths of all files.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        lock(&self.world).names.keys().cloned().collect()
    }

    /// Virtual time since the start.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_nanos(lock(&self.world).now)
    }

    /// Lets virtual time pass; what ends meanwhile ends.
    pub fn advance(&self, time: Duration) {
        let mut world = lock(&self.world);
        let end = world.now.saturating_add(nanos(time));
        while world.step(end) {}
        world.now = end;
    }

    /// Moves the clock to the end of the next operation of any engine; `false` when nothing is in
    /// flight except what is held.
    #[must_use]
    pub fn step(&self) -> bool {
        lock(&self.world).step(u64::MAX)
    }

    /// Whether nothing is in flight, except what is held, and nothing waits to be reaped: a test
    /// that still waits for something waits for ever.
    #[must_use]
    pub fn idle(&self) -> bool {
        let world = lock(&self.world);
        world.events.is_empty() && world.ports.iter().all(|port| port.done.is_empty())
    }

    /// Operations in flight, those held included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let world = lock(&self.world);
        world.events.len() + world.held.len()
    }

    /// Changes the configuration from now on (the seed and the sector size are used once, at the
    /// start).
    pub fn configure(&self, change: impl FnOnce(&mut SimConfig)) {
        change(&mut lock(&self.world).config);
    }

    /// Plans a fault. Of several that match an operation, the first planned that still has
    /// operations to count decides.
    pub fn inject(&self, fault: SimFault) {
        lock(&self.world).faults.push(fault);
    }

    /// Operations of this kind on a file that are submitted from now on do not end before
    /// [`release`](Self::release).
    pub fn hold(&self, path: impl AsRef<Path>, op: SimOp) {
        let mut world = lock(&self.world);
        if let Some(index) = world.names.get(path.as_ref()).copied() {
            world.holds.push((index, op));
        }
    }

    /// Operations that were held go on.
    pub fn release(&self, path: impl AsRef<Path>, op: SimOp) {
        let mut world = lock(&self.world);
        if let Some(index) = world.names.get(path.as_ref()).copied() {
            world.release(Some((index, op)));
        }
    }

    /// Cuts the power: the host that boots afterwards, with what survived. This one is dead.
    #[must_use = "the files that survived are on the new host"]
    pub fn power_cut(&self) -> SimHost {
        Self::of(lock(&self.world).end(true))
    }

    /// Kills the process: the same host for the next one. This one is dead. What was not durable
    /// still is not.
    #[must_use = "the files are on the new host"]
    pub fn kill(&self) -> SimHost {
        Self::of(lock(&self.world).end(false))
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> SimStats {
        lock(&self.world).stats
    }

    /// A number that depends on everything that ended so far: when, for whom and with what result.
    #[must_use]
    pub fn trace(&self) -> u64 {
        lock(&self.world).trace
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Host for SimHost {
    fn open_beneath(&self, folder: &Path, name: &Path, options: FileOptions) -> Result<HostFile> {
        // A simulation has no links: only the name itself could lead out.
        let climbs = name
            .components()
            .any(|component| !matches!(component, std::path::Component::Normal(_)));
        if climbs {
            return Err(Error::new(crate::ErrorKind::Denied).path(&folder.join(name)));
        }
        let path = match folder.to_str() {
            Some(".") => name.to_owned(),
            _ => folder.join(name),
        };
        self.open(&path, options)
    }

    fn absolute(&self, path: &Path) -> Option<std::path::PathBuf> {
        Some(path.to_owned())
    }

    fn open(&self, path: &Path, options: FileOptions) -> Result<HostFile> {
        let fail = |errno| {
            Error::from(io::Error::from_raw_os_error(errno))
                .operation("open")
                .path(path)
        };
        let mut world = lock(&self.world);
        if world.dead {
            return Err(fail(libc::EIO));
        }
        let index = match world.names.get(path).copied() {
            Some(index) => {
                if options.create && options.truncate && options.write {
                    world.files[index].set_len(0);
                }
                index
            }
            None if options.create && options.write => world.add_file(path, Content::default()),
            None => return Err(fail(libc::ENOENT)),
        };
        let alignment = if options.direct {
            world.config.alignment
        } else {
            IoAlignment::NONE
        };
        drop(world);
        Ok(HostFile::simulated(
            path,
            self.at(index),
            options.write,
            alignment,
        ))
    }

    fn engine(&self, _kind: EngineKind, depth: u32) -> Result<Box<dyn Engine>> {
        Ok(Box::new(SimEngine::new(&self.world, depth)?))
    }

    fn is_os(&self) -> bool {
        false
    }
}

/// A file of a simulation.
#[derive(Debug)]
pub struct SimFile {
    world: Arc<Mutex<World>>,
    index: usize,
}

impl SimFile {
    /// What a read sees now.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        lock(&self.world).files[self.index].current.to_vec()
    }

    /// What a read of a part sees now: `len` bytes, or less at the end of the file.
    #[must_use]
    pub fn content_at(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let got = lock(&self.world).files[self.index]
            .current
            .read(offset, &mut bytes);
        bytes.truncate(got);
        bytes
    }

    /// What survives a power cut for certain, if nothing later arrives.
    #[must_use]
    pub fn durable_content(&self) -> Vec<u8> {
        lock(&self.world).files[self.index].durable.to_vec()
    }

    /// Changes that a power cut may take away.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        lock(&self.world).files[self.index].unsynced()
    }

    /// Changes bytes behind everybody's back, durably.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        lock(&self.world).files[self.index].poke(offset, bytes);
    }

    /// Writes what a read sees now to a real file, sparsely.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let content = lock(&self.world).files[self.index].current.clone();
        let file = File::create(path)?;
        file.set_len(content.len())?;
        for (offset, bytes) in content.runs() {
            file.write_all_at(bytes, offset)?;
        }
        Ok(())
    }
}

impl SimulatedFile for SimFile {
    fn len(&self) -> u64 {
        lock(&self.world).files[self.index].current.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut world = lock(&self.world);
        if world.dead {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        world.files[self.index].set_len(len);
        Ok(())
    }

    fn lock_errno(&self) -> Option<i32> {
        lock(&self.world).config.lock_errno
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
