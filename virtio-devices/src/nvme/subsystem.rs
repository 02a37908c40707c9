//! An NVM subsystem: the namespaces that its controllers share, and the threads for host work.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt::Write as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak,
        atomic::{AtomicU16, Ordering},
    },
};

use block::AsyncDiskFile;

use super::{
    namespace::{Namespace, NamespaceConfig, flag},
    pool::PoolConfig,
    reservation::{HostId, Notice},
    sanitize::Sanitize,
};
use crate::{
    Error, Result,
    host::{Action, Jobs},
    identity::fnv,
};

/// The most namespaces of a subsystem.
pub(super) const MAX_NAMESPACES: u32 = 256;
/// The most controllers of a subsystem.
const MAX_CONTROLLERS: u16 = 256;

/// How a subsystem is made. What is left empty is made from the rest, the same at every start.
#[derive(Clone, Debug, Default)]
pub struct SubsystemConfig {
    /// SUBNQN: at most 223 bytes.
    pub nqn: String,
    /// Serial number: at most 20 bytes of ASCII.
    pub serial: String,
    /// Model number: at most 40 bytes of ASCII.
    pub model: String,
    /// What distinguishes this subsystem from others with the same configuration: the path of its
    /// first image or socket, for instance.
    pub seed: String,
    /// Namespace management, if it is to be offered.
    pub pool: Option<PoolConfig>,
}

/// What a controller wants to know of its subsystem.
pub(super) trait Listener: Send + Sync {
    /// Namespaces were attached, detached, resized or formatted.
    fn namespaces_changed(&self, nsids: &[u32]);
    /// Commands that wait for others may go on.
    fn wake(&self);
    /// A reservation notice for this host, if it is the one of this controller.
    fn reservation_notice(&self, nsid: u32, host: HostId, notice: Notice);
    /// A sanitize operation has ended.
    fn sanitize_ended(&self);
    /// NSSR was written to one of the controllers.
    fn subsystem_reset(&self);
}

/// An NVM subsystem.
pub struct Subsystem {
    config: SubsystemConfig,
    namespaces: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    controllers: Mutex<BTreeMap<u16, Weak<dyn Listener>>>,
    next_controller: AtomicU16,
    pub(super) sanitize: Arc<Sanitize>,
    pub(super) jobs: Jobs,
    /// Sanitize operations take long; other host work must not wait for them.
    long_jobs: Jobs,
    /// Held while something of the pool is given away.
    pub(super) pool: Mutex<()>,
}

impl Subsystem {
    /// A subsystem with the namespaces that an earlier run has left in the pool, and no others.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is too long or not ASCII, and an image of the pool that
    /// cannot be opened; the host's error when a thread cannot be started.
    pub fn new(mut config: SubsystemConfig) -> Result<Arc<Self>> {
        let seed = config.seed.clone();
        if config.serial.is_empty() {
            config.serial = format!("{:016x}", fnv(&seed, 3));
        }
        if config.model.is_empty() {
            "Platter NVMe".clone_into(&mut config.model);
        }
        if config.nqn.is_empty() {
            let (high, low) = (fnv(&seed, 4), fnv(&seed, 5));
            let mut hex = String::new();
            let _ = write!(hex, "{high:016x}{low:016x}");
            config.nqn = format!(
                "nqn.2014-08.org.nvmexpress:uuid:{}-{}-8{}-8{}-{}",
                &hex[..8],
                &hex[8..12],
                &hex[13..16],
                &hex[17..20],
                &hex[20..32]
            );
        }
        for (what, text, most) in [
            ("serial", &config.serial, 20),
            ("model", &config.model, 40),
            ("subnqn", &config.nqn, 223),
        ] {
            if text.len() > most || !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                return Err(Error::Config(format!(
                    "{what} is '{text}', expected at most {most} characters of ASCII"
                )));
            }
        }
        let thread = |source| Error::Descriptor {
            what: "a thread for host work",
            source,
        };
        let subsystem = Arc::new(Self {
            config,
            namespaces: RwLock::default(),
            controllers: Mutex::default(),
            next_controller: AtomicU16::new(0),
            sanitize: Arc::default(),
            jobs: Jobs::start("nvme-host").map_err(thread)?,
            long_jobs: Jobs::start("nvme-sanitize").map_err(thread)?,
            pool: Mutex::default(),
        });
        subsystem.reopen_pool()?;
        Ok(subsystem)
    }

    /// Brings back what namespace management has made before.
    fn reopen_pool(self: &Arc<Self>) -> Result<()> {
        let Some(pool) = &self.config.pool else {
            return Ok(());
        };
        for nsid in 1..=MAX_NAMESPACES {
            if let Some(disk) = pool.reopen(nsid)? {
                let config = NamespaceConfig {
                    nsid: Some(nsid),
                    sidecar: Some(pool.sidecar(nsid)),
                    ..NamespaceConfig::default()
                };
                self.insert(disk, &config, Some(pool.image(nsid)))?;
            }
        }
        let used = self.pool_used();
        if used > pool.capacity {
            let (capacity, folder) = (pool.capacity, pool.folder.display());
            tracing::warn!(used, capacity, %folder, "the pool holds more than its capacity");
        }
        Ok(())
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &SubsystemConfig {
        &self.config
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<u32, Arc<Namespace>>> {
        self.namespaces
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn controllers(&self) -> MutexGuard<'_, BTreeMap<u16, Weak<dyn Listener>>> {
        self.controllers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a disk as a namespace and attaches it to every controller; returns its identifier.
    ///
    /// # Errors
    /// [`Error::Config`] for an identifier that is taken or out of range, a block size that is not
    /// 512 or 4096, or a sidecar that cannot be used.
    pub fn add_namespace(
        self: &Arc<Self>,
        disk: Box<dyn AsyncDiskFile>,
        config: &NamespaceConfig,
    ) -> Result<u32> {
        let nsid = self.insert(disk, config, None)?;
        let controllers: Vec<u16> = self.controllers().keys().copied().collect();
        if let Some(namespace) = self.namespace(nsid) {
            namespace.attached().extend(controllers);
        }
        self.changed(&[nsid]);
        if !self.controllers().is_empty() {
            self.resume_sanitize();
        }
        Ok(nsid)
    }

    pub(super) fn insert(
        self: &Arc<Self>,
        disk: Box<dyn AsyncDiskFile>,
        config: &NamespaceConfig,
        pooled: Option<PathBuf>,
    ) -> Result<u32> {
        let mut namespaces = self
            .namespaces
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let nsid = match config.nsid {
            Some(nsid) => nsid,
            None => (1..=MAX_NAMESPACES)
                .find(|nsid| !namespaces.contains_key(nsid))
                .ok_or_else(|| {
                    Error::Config(format!("{MAX_NAMESPACES} namespaces are the most"))
                })?,
        };
        if !(1..=MAX_NAMESPACES).contains(&nsid) || namespaces.contains_key(&nsid) {
            return Err(Error::Config(format!(
                "namespace {nsid} is taken or not 1 to {MAX_NAMESPACES}"
            )));
        }
        let path = disk.path();
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let seed = format!("{} {nsid} {}", self.config.nqn, path.display());
        let weak = Arc::downgrade(self);
        disk.on_resize(Box::new(move |size| {
            if let Some(subsystem) = weak.upgrade() {
                subsystem.resized(nsid, size);
            }
        }));
        let namespace = Namespace::new(nsid, disk, config, &seed, pooled)?;
        namespaces.insert(nsid, Arc::new(namespace));
        Ok(nsid)
    }

    /// Removes a namespace: detached from every controller, its commands ended, and forgotten. The
    /// image stays.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such namespace, and for one of the pool, which would be back
    /// at the next start.
    pub fn remove_namespace(&self, nsid: u32) -> Result<()> {
        let is_configured = |namespace: &Namespace| match namespace.pooled() {
            None => Ok(()),
            Some(image) => Err(Error::Config(format!(
                "namespace {nsid} was made in the pool, where {} would bring it back at the next start: it can only be deleted",
                image.display()
            ))),
        };
        self.take(nsid, is_configured).map(|_| ())
    }

    /// Deletes a namespace of the pool, as a host does with Namespace Management: removed as by
    /// [`remove_namespace`](Self::remove_namespace), its image and its sidecar with it. What it took of
    /// the capacity is free again.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such namespace, for one that was configured, and when one of
    /// the files could not be removed; the namespace is gone all the same then.
    pub fn delete_namespace(&self, nsid: u32) -> Result<()> {
        let is_pooled = |namespace: &Namespace| match namespace.pooled() {
            Some(_) => Ok(()),
            None => Err(Error::Config(format!(
                "namespace {nsid} was configured with {}, which is not in the pool: it can only be removed",
                namespace.disk().path().display()
            ))),
        };
        let namespace = self.take(nsid, is_pooled)?;
        match namespace.pooled() {
            Some(image) => namespace.erase_from_pool(image),
            None => Ok(()),
        }
    }

    /// Takes a namespace away from every controller, if it `may` be.
    fn take(
        &self,
        nsid: u32,
        may: impl FnOnce(&Namespace) -> Result<()>,
    ) -> Result<Arc<Namespace>> {
        let namespace = {
            let mut namespaces = self
                .namespaces
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let Entry::Occupied(entry) = namespaces.entry(nsid) else {
                return Err(Error::Config(format!("there is no namespace {nsid}")));
            };
            may(entry.get())?;
            entry.remove()
        };
        namespace.set_flag(flag::GONE, true);
        namespace.attached().clear();
        self.changed(&[nsid]);
        Ok(namespace)
    }

    /// A namespace, attached or not.
    #[must_use]
    pub fn namespace(&self, nsid: u32) -> Option<Arc<Namespace>> {
        self.read().get(&nsid).cloned()
    }

    /// All namespaces, in order.
    #[must_use]
    pub fn namespaces(&self) -> Vec<Arc<Namespace>> {
        self.read().values().cloned().collect()
    }

    /// The namespaces attached to a controller, in order.
    pub(super) fn attached_to(&self, controller: u16) -> Vec<Arc<Namespace>> {
        let namespaces = self.read();
        namespaces
            .values()
            .filter(|namespace| namespace.attached().contains(&controller))
            .cloned()
            .collect()
    }

    /// Changes the size of a namespace's disk, and tells every controller it is attached to. A
    /// namespace of the pool may grow by what the pool has left (UNVMCAP), and gives back what it
    /// shrinks by.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such namespace, `size` is not whole blocks or the pool has
    /// no room for it; the disk's error.
    pub fn resize_namespace(&self, nsid: u32, size: u64) -> Result<()> {
        let namespace = self
            .namespace(nsid)
            .ok_or_else(|| Error::Config(format!("there is no namespace {nsid}")))?;
        let block = u64::from(namespace.lba_size());
        if size == 0 || !size.is_multiple_of(block) {
            return Err(Error::Config(format!(
                "the size of namespace {nsid} is {size}, expected a multiple of its {block} bytes"
            )));
        }
        let _pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(_), Some(pool)) = (namespace.pooled(), &self.config.pool) {
            let others = self.pool_used().saturating_sub(namespace.disk().size());
            let room = pool.capacity.saturating_sub(others);
            if size > room && size > namespace.disk().size() {
                return Err(Error::Config(format!(
                    "the size of namespace {nsid} is {size}, expected at most the {room} bytes that the pool has for it"
                )));
            }
        }
        Ok(namespace.disk().resize(size)?)
    }

    fn resized(&self, nsid: u32, size: u64) {
        if let Some(namespace) = self.namespace(nsid) {
            namespace.resized(size);
            self.changed(&[nsid]);
        }
    }

    /// Reserves an identifier for a controller that is being made.
    pub(super) fn next_controller(&self) -> Result<u16> {
        let id = self.next_controller.fetch_add(1, Ordering::Relaxed);
        if id >= MAX_CONTROLLERS {
            return Err(Error::Config(format!(
                "{MAX_CONTROLLERS} controllers are the most of a subsystem"
            )));
        }
        Ok(id)
    }

    /// Adds a controller and attaches every namespace to it, but those of the pool only if a host has
    /// done so before.
    pub(super) fn add_controller(self: &Arc<Self>, id: u16, listener: Weak<dyn Listener>) {
        self.controllers().insert(id, listener);
        for namespace in self.namespaces() {
            if namespace.is_for(id) {
                namespace.attached().insert(id);
            }
        }
        self.resume_sanitize();
    }

    pub(super) fn remove_controller(&self, id: u16) {
        self.controllers().remove(&id);
        for namespace in self.namespaces() {
            namespace.attached().remove(&id);
        }
    }

    /// Whether there is more than one controller: what CMIC and NMIC tell. A driver takes a lone
    /// controller that says otherwise for one path of several.
    pub(super) fn has_several_controllers(&self) -> bool {
        self.controllers().len() > 1
    }

    /// The identifiers of the controllers.
    pub(super) fn controller_ids(&self) -> Vec<u16> {
        self.controllers().keys().copied().collect()
    }

    /// Calls `tell` for every controller, without a lock.
    pub(super) fn tell(&self, tell: impl Fn(u16, &dyn Listener)) {
        let all: Vec<_> = self
            .controllers()
            .iter()
            .map(|(id, listener)| (*id, listener.clone()))
            .collect();
        for (id, listener) in all {
            if let Some(listener) = listener.upgrade() {
                tell(id, &*listener);
            }
        }
    }

    /// Tells every controller that these namespaces have changed.
    pub(super) fn changed(&self, nsids: &[u32]) {
        self.tell(|_, listener| listener.namespaces_changed(nsids));
    }

    /// Bytes of the pool that namespaces take.
    pub(super) fn pool_used(&self) -> u64 {
        let namespaces = self.read();
        let pooled = namespaces.values().filter(|it| it.pooled().is_some());
        pooled.map(|it| it.disk().size()).sum()
    }

    /// Starts a sanitize operation on all namespaces; false if one is running.
    pub(super) fn start_sanitize(self: &Arc<Self>, action: Action, cdw10: u32) -> bool {
        if !self.sanitize.begin(action, cdw10) {
            return false;
        }
        let namespaces = self.namespaces();
        for namespace in &namespaces {
            namespace.set_flag(flag::SANITIZING, true);
        }
        let weak = Arc::downgrade(self);
        let sanitize = Arc::clone(&self.sanitize);
        self.long_jobs.run(move || {
            let done = run_sanitize(&sanitize, &namespaces, action);
            if let Some(ok) = done {
                for namespace in &namespaces {
                    namespace.set_sanitized(sanitize.ended(ok));
                    if let Err(error) = namespace.persist() {
                        tracing::error!(nsid = namespace.nsid(), %error, "sanitize is over");
                    }
                    namespace.set_flag(flag::SANITIZING, false);
                }
                // Whoever sees that it is over finds the namespaces as they are afterwards.
                sanitize.end(ok);
            }
            if let Some(subsystem) = weak.upgrade() {
                subsystem.tell(|_, listener| listener.sanitize_ended());
            }
        });
        true
    }

    /// Goes on with a sanitize operation that a restart has interrupted, on all namespaces: when the
    /// first controller is made, they are all there.
    fn resume_sanitize(self: &Arc<Self>) {
        if self.sanitize.is_running() {
            return;
        }
        let mut again = None;
        for namespace in self.namespaces() {
            let saved = namespace.sanitized();
            again = saved
                .and_then(|saved| self.sanitize.restore(saved))
                .or(again);
        }
        if let Some((action, cdw10)) = again {
            self.start_sanitize(action, cdw10);
        }
    }
}

impl Drop for Subsystem {
    fn drop(&mut self) {
        self.sanitize.stop();
    }
}

/// `None` if it was stopped and will go on at the next start; else whether it succeeded.
fn run_sanitize(
    sanitize: &Sanitize,
    namespaces: &[Arc<Namespace>],
    action: Action,
) -> Option<bool> {
    // Durable before anything is changed, so that it goes on after a crash.
    for namespace in namespaces {
        namespace.set_sanitized(sanitize.saved());
        if let Err(error) = namespace.persist() {
            tracing::error!(nsid = namespace.nsid(), %error, "sanitize");
            return Some(false);
        }
    }
    let count = namespaces.len().max(1) as u64;
    for (index, namespace) in namespaces.iter().enumerate() {
        // What was in flight ends first; nothing new begins, because of the flag.
        while !namespace.gate.claim() {
            std::thread::yield_now();
        }
        while !namespace.gate.is_quiet() {
            if sanitize.is_stopped() {
                return None;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let share = 0x1_0000 / count;
        let result = sanitize.erase(namespace.disk(), action, (share * index as u64, share));
        namespace.gate.release();
        match result {
            Ok(true) => namespace.mark(|marks| *marks = Default::default()),
            Ok(false) => return None,
            Err(error) => {
                tracing::error!(nsid = namespace.nsid(), %error, "sanitize");
                return Some(false);
            }
        }
    }
    Some(true)
}
