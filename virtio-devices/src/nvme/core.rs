//! What the parts of a controller share: registers, doorbells, the mail of its workers.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    Status,
    config::NvmeConfig,
    doorbell::{Doorbells, Rung, Shadow},
    events::{self, Event, Events},
    features::Features,
    interrupt::Interrupts,
    registers::{Action, DOORBELLS, Registers, csts},
    reservation::{HostId, Notice},
    smart::Counters,
    subsystem::{Listener, Subsystem},
};
use crate::{Result, stats::QueueStats, sync::lock};

/// What came of an Abort.
#[derive(Clone, Copy, Debug)]
pub(super) struct AbortReply {
    /// Names the Abort.
    pub(super) token: u64,
    /// The command that was aborted: it is posted before the Abort ends.
    pub(super) aborted: Option<u64>,
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Mail {
    /// Starts the admin queue where the registers say.
    Enable,
    CreateCq(NewCq),
    CreateSq(NewSq),
    /// `token` names the admin command to complete.
    DeleteCq {
        id: u16,
        token: u64,
    },
    DeleteSq {
        id: u16,
        token: u64,
    },
    /// Aborts a command of one of its queues; `token` names the Abort.
    Abort {
        queue: u16,
        cid: u16,
        token: u64,
    },
    /// Host work for one of its commands has ended.
    Ended {
        token: u64,
        status: Status,
        dw0: u32,
    },
    /// Controller reset: nothing more is posted.
    Reset,
}

/// A completion queue to be made.
#[derive(Clone, Debug)]
pub(super) struct NewCq {
    pub(super) id: u16,
    pub(super) base: u64,
    pub(super) size: u32,
    pub(super) vector: Option<u16>,
    pub(super) tail: u32,
    pub(super) phase: bool,
}

/// A submission queue to be made.
#[derive(Clone, Debug)]
pub(super) struct NewSq {
    pub(super) id: u16,
    pub(super) base: u64,
    pub(super) size: u32,
    pub(super) cq: u16,
    pub(super) head: u32,
}

/// A worker, as others reach it.
pub(super) struct Port {
    mail: Mutex<VecDeque<Mail>>,
    has_mail: AtomicBool,
    /// It will not look again unless it is kicked.
    pub(super) sleeping: AtomicBool,
    /// It waits for the host to take completions.
    pub(super) blocked: AtomicBool,
    pub(super) event: EventFd,
    pub(super) stats: Arc<QueueStats>,
    pub(super) busy: AtomicU64,
    /// Its driver looks after every doorbell: no descriptor has to be written.
    inline: bool,
}

impl Port {
    pub(super) fn send(&self, mail: Mail) {
        self.mail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(mail);
        self.has_mail.store(true, Ordering::SeqCst);
        self.kick();
    }

    pub(super) fn has_mail(&self) -> bool {
        self.has_mail.load(Ordering::SeqCst)
    }

    pub(super) fn receive(&self) -> VecDeque<Mail> {
        self.has_mail.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wakes the worker if it sleeps.
    pub(super) fn kick(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) && !self.inline {
            // A counter at its end has been told often enough.
            let _ = self.event.write(1);
        }
    }
}

/// A queue as the admin commands see it.
#[derive(Clone, Debug)]
pub(super) struct Queue<T> {
    pub(super) new: T,
    /// Being deleted.
    pub(super) closing: bool,
}

/// The queues of a controller.
#[derive(Debug, Default)]
pub(super) struct Queues {
    pub(super) sqs: Vec<Option<Queue<NewSq>>>,
    pub(super) cqs: Vec<Option<Queue<NewCq>>>,
}

/// The values that the workers read on every batch.
#[derive(Debug, Default)]
pub(super) struct Hot {
    pub(super) page: AtomicU64,
    pub(super) write_through: AtomicBool,
    pub(super) coalescing: AtomicU32,
    pub(super) arbitration: AtomicU32,
    /// Changes when the attached namespaces do.
    pub(super) namespaces: AtomicU32,
    /// The admin worker has events to report.
    pub(super) events: AtomicBool,
    pub(super) shadow_version: AtomicU32,
    /// The bus master bit of the function is clear: no worker may access guest memory.
    pub(super) no_dma: AtomicBool,
}

/// The shared state of a controller.
pub(super) struct Core {
    pub(super) config: NvmeConfig,
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) id: u16,
    registers: Mutex<Registers>,
    pub(super) doorbells: Doorbells,
    pub(super) shadow: Mutex<Option<Shadow>>,
    pub(super) interrupts: Interrupts,
    features: Mutex<Features>,
    events: Mutex<Events>,
    queues: Mutex<Queues>,
    /// The admin worker, then those of the I/O queues.
    pub(super) ports: Vec<Port>,
    pub(super) hot: Hot,
    /// Workers that have not finished a reset.
    resetting: AtomicUsize,
    /// An enable that came while a reset was not finished.
    enable_later: AtomicBool,
    pub(super) started: Instant,
    /// Counters from another process, that SMART goes on from.
    pub(super) brought: Mutex<Counters>,
}

impl Core {
    pub(super) fn new(
        config: NvmeConfig,
        subsystem: Arc<Subsystem>,
        id: u16,
        interrupts: Interrupts,
    ) -> Result<Self> {
        let port = || -> Result<Port> {
            Ok(Port {
                mail: Mutex::default(),
                has_mail: AtomicBool::new(false),
                sleeping: AtomicBool::new(true),
                blocked: AtomicBool::new(false),
                event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).map_err(|source| {
                    crate::Error::Descriptor {
                        what: "doorbell of a worker",
                        source,
                    }
                })?,
                stats: Arc::default(),
                busy: AtomicU64::new(0),
                inline: config.inline,
            })
        };
        let ports = (0..=config.workers)
            .map(|_| port())
            .collect::<Result<Vec<_>>>()?;
        let queues = config.io_queues + 1;
        let core = Self {
            id,
            doorbells: Doorbells::new(queues),
            shadow: Mutex::default(),
            interrupts,
            registers: Mutex::default(),
            features: Mutex::new(Features::new(config.vectors)),
            events: Mutex::default(),
            queues: Mutex::new(Queues {
                sqs: vec![None; usize::from(queues)],
                cqs: vec![None; usize::from(queues)],
            }),
            ports,
            hot: Hot::default(),
            resetting: AtomicUsize::new(0),
            enable_later: AtomicBool::new(false),
            started: Instant::now(),
            brought: Mutex::default(),
            subsystem,
            config,
        };
        core.hot.page.store(4096, Ordering::Release);
        core.apply_features();
        Ok(core)
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    pub(super) fn features(&self) -> MutexGuard<'_, Features> {
        lock(&self.features)
    }

    pub(super) fn queues(&self) -> MutexGuard<'_, Queues> {
        lock(&self.queues)
    }

    /// Looks at or changes events; the admin worker reports what it may.
    pub(super) fn with_events<R>(&self, change: impl FnOnce(&mut Events) -> R) -> R {
        let result = change(&mut lock(&self.events));
        self.hot.events.store(true, Ordering::SeqCst);
        self.ports[0].kick();
        result
    }

    /// Looks at or changes events without telling anybody.
    pub(super) fn with_events_quietly<R>(&self, change: impl FnOnce(&mut Events) -> R) -> R {
        change(&mut lock(&self.events))
    }

    pub(super) fn add_event(&self, event: Event) {
        self.with_events(|events| events.add(event));
    }

    /// Adds a failed command to the error log.
    pub(super) fn log_error(&self, queue: u16, command: &super::command::Command, status: Status) {
        lock(&self.events).add_error(queue, command, status);
    }

    /// Makes what the workers read agree with the features.
    pub(super) fn apply_features(&self) {
        let features = self.features();
        let hot = &self.hot;
        hot.write_through
            .store(!features.write_cache, Ordering::Release);
        hot.coalescing
            .store(u32::from(features.coalescing), Ordering::Release);
        hot.arbitration
            .store(features.arbitration, Ordering::Release);
    }

    /// Whether workers may access guest memory.
    pub(super) fn may_access(&self) -> bool {
        !self.hot.no_dma.load(Ordering::SeqCst)
    }

    /// The bus master bit of the function.
    pub(super) fn set_bus_master(&self, on: bool) {
        self.hot.no_dma.store(!on, Ordering::SeqCst);
        if on {
            for port in &self.ports {
                port.kick();
            }
        }
    }

    /// The worker of a queue: all queues of one completion queue have the same.
    pub(super) fn worker_of(&self, cq: u16) -> usize {
        match cq {
            0 => 0,
            cq => 1 + usize::from(cq - 1) % self.config.workers,
        }
    }

    /// Reads registers. The doorbells read as zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= DOORBELLS {
            data.fill(0);
            return;
        }
        self.registers().read(offset, data);
    }

    /// Writes a register or a doorbell: 4 or 8 bytes, aligned. Other writes do nothing.
    pub(super) fn write(self: &Arc<Self>, offset: u64, data: &[u8]) {
        let value = |at: usize| super::command::le32(data, at);
        match (data.len(), offset % 4) {
            (4, 0) => self.write_dword(offset, value(0)),
            (8, 0) => {
                self.write_dword(offset, value(0));
                if let Some(next) = offset.checked_add(4) {
                    self.write_dword(next, value(4));
                }
            }
            _ => tracing::debug!(offset, len = data.len(), "a register write of a wrong size"),
        }
    }

    fn write_dword(self: &Arc<Self>, offset: u64, value: u32) {
        if let Some(doorbell) = offset.checked_sub(DOORBELLS) {
            self.ring(doorbell, value);
            return;
        }
        let action = self.registers().write(offset, value);
        match action {
            Action::None => {}
            Action::Enable => self.enable(),
            Action::Refuse => self.fail("it was enabled with values that do not work"),
            Action::Disable => self.reset(),
            Action::Shutdown => self.shutdown(),
            Action::Mask => {
                let mask = self.registers().intms;
                self.interrupts.mask(mask);
            }
            Action::SubsystemReset => self.subsystem.tell(|_, it| it.subsystem_reset()),
        }
    }

    /// A doorbell, `offset` bytes behind the first.
    pub(super) fn ring(&self, offset: u64, value: u32) {
        match self.doorbells.ring(offset, value) {
            Rung::Tail { worker } => {
                if let Some(port) = self.ports.get(worker) {
                    port.kick();
                }
            }
            Rung::Head { queue, worker } => {
                self.head_moved(queue, worker);
            }
            rung => {
                let registers = self.registers();
                if !registers.ready() {
                    return;
                }
                drop(registers);
                tracing::debug!(offset, value, ?rung, "a doorbell");
                self.add_event(if rung == Rung::NoQueue {
                    events::INVALID_DOORBELL
                } else {
                    events::INVALID_DOORBELL_VALUE
                });
            }
        }
    }

    fn head_moved(&self, queue: u16, worker: usize) {
        let Some(port) = self.ports.get(worker) else {
            return;
        };
        let messages = self.interrupts.uses_messages();
        if !messages {
            self.interrupts
                .taken(queue, || self.doorbells.is_empty(queue));
        }
        // The worker is woken only if it waits, or looks after the line itself.
        if port.blocked.swap(false, Ordering::SeqCst) || !messages {
            port.kick();
        }
    }

    fn enable(&self) {
        if self.resetting.load(Ordering::SeqCst) > 0 {
            self.enable_later.store(true, Ordering::SeqCst);
            return;
        }
        let page = self.registers().page();
        self.hot.page.store(page, Ordering::Release);
        self.ports[0].send(Mail::Enable);
    }

    /// The admin queue runs.
    pub(super) fn enabled(&self) {
        let mut registers = self.registers();
        if registers.enabled() && self.resetting.load(Ordering::SeqCst) == 0 {
            registers.csts |= csts::RDY;
        }
    }

    /// Something that only a reset mends.
    pub(super) fn fail(&self, why: &str) {
        tracing::warn!(controller = self.id, why, "the controller has failed");
        self.registers().csts |= csts::CFS;
    }

    /// Controller reset: every worker ends what it has, without posting it; the last one clears
    /// CSTS.RDY.
    pub(super) fn reset(&self) {
        self.enable_later.store(false, Ordering::SeqCst);
        if self.resetting.load(Ordering::SeqCst) > 0 {
            return;
        }
        self.resetting.store(self.ports.len(), Ordering::SeqCst);
        for id in 0..self.doorbells.queues() as u16 {
            self.doorbells.close_sq(id);
            self.doorbells.close_cq(id);
        }
        for port in &self.ports {
            port.send(Mail::Reset);
        }
    }

    /// A worker has nothing of the guest any more.
    pub(super) fn worker_reset(&self) {
        if self.resetting.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        *lock(&self.shadow) = None;
        self.hot.shadow_version.fetch_add(1, Ordering::SeqCst);
        self.features().reset();
        self.apply_features();
        lock(&self.events).reset();
        let mut queues = self.queues();
        queues.sqs.fill(None);
        queues.cqs.fill(None);
        drop(queues);
        self.interrupts.reset();
        let mut registers = self.registers();
        let cc = registers.cc;
        registers.reset();
        if self.enable_later.swap(false, Ordering::SeqCst) {
            registers.cc = cc;
            drop(registers);
            self.enable();
        }
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting.load(Ordering::SeqCst) > 0
    }

    fn shutdown(self: &Arc<Self>) {
        {
            let mut registers = self.registers();
            registers.csts = registers.csts & !csts::SHST | csts::SHST_OCCURRING;
        }
        let core = Arc::clone(self);
        self.subsystem.jobs.run(move || {
            for namespace in core.subsystem.attached_to(core.id) {
                if namespace.is_read_only() {
                    continue;
                }
                if let Err(error) = namespace.disk().flush() {
                    tracing::error!(nsid = namespace.nsid(), %error, "shutdown: flush");
                }
            }
            let mut registers = core.registers();
            if registers.csts & csts::SHST == csts::SHST_OCCURRING {
                registers.csts = registers.csts & !csts::SHST | csts::SHST_COMPLETE;
            }
        });
    }

    /// The host identifier that the host set; zeroes before.
    pub(super) fn host_id(&self) -> (HostId, bool) {
        self.features().host_id.unwrap_or_default()
    }
}

impl Listener for Core {
    fn namespaces_changed(&self, nsids: &[u32]) {
        self.hot.namespaces.fetch_add(1, Ordering::SeqCst);
        for port in &self.ports {
            port.kick();
        }
        let there = self.subsystem.namespaces();
        let tells = {
            let mut features = self.features();
            // A namespace that comes in the place of one that is gone starts afresh.
            features
                .namespaces
                .retain(|nsid, _| there.iter().any(|it| it.nsid() == *nsid));
            features.tells_namespaces()
        };
        self.with_events(|events| {
            for nsid in nsids {
                events.add_changed(*nsid);
            }
            if tells {
                events.add(events::NAMESPACES);
            }
        });
    }

    fn wake(&self) {
        for port in &self.ports {
            port.kick();
        }
    }

    fn reservation_notice(&self, nsid: u32, host: HostId, notice: Notice) {
        let (mask, ours) = {
            let features = self.features();
            (features.of(nsid).reservation_mask, features.host_id)
        };
        if ours.is_none_or(|(id, _)| id != host) {
            return;
        }
        let kind: u8 = match notice {
            Notice::RegistrationPreempted => 1,
            Notice::Released => 2,
            Notice::ReservationPreempted => 3,
        };
        if mask & 1 << kind != 0 {
            return;
        }
        self.with_events(|events| {
            events.add_notice(nsid, kind);
            events.add(events::RESERVATION);
        });
    }

    fn sanitize_ended(&self) {
        self.add_event(events::SANITIZED);
    }

    fn subsystem_reset(&self) {
        self.registers().csts |= csts::NSSRO;
        let enabled = {
            let mut registers = self.registers();
            let enabled = registers.enabled() || registers.ready();
            registers.cc &= !1;
            enabled
        };
        if enabled {
            self.reset();
        } else {
            self.registers().reset();
        }
    }
}
