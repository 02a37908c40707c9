//! The function behind the socket, with what a bus has of it: configuration space, interrupts, memory,
//! and whether it may run.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use vm_memory::GuestMemoryAtomic;

use super::{PausableFunction, interrupts::VfioUserInterrupts, memory::VfioUserMemory, stream};
use crate::{
    pci::{ConfigSpace, Description, Mappable, Migratable},
    sys,
};

/// How long commands may take to end when the device is to be stopped.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Device {
    function: Arc<dyn PausableFunction>,
    description: Description,
    config: ConfigSpace,
    memory: GuestMemoryAtomic<VfioUserMemory>,
    interrupts: Arc<VfioUserInterrupts>,
    /// The bus master bit as the function knows it.
    master: bool,
    /// The client has stopped it: its workers are held.
    stopped: bool,
}

impl Device {
    /// The function as a client finds it first: reset, and not allowed to access memory.
    pub(super) fn new(
        function: Arc<dyn PausableFunction>,
        memory: GuestMemoryAtomic<VfioUserMemory>,
        interrupts: Arc<VfioUserInterrupts>,
    ) -> Self {
        let description = function.description();
        let mut device = Self {
            config: ConfigSpace::new(&description),
            description,
            function,
            memory,
            interrupts,
            master: true,
            stopped: false,
        };
        device.follow();
        device
    }

    pub(super) fn description(&self) -> &Description {
        &self.description
    }

    pub(super) fn interrupts(&self) -> &VfioUserInterrupts {
        &self.interrupts
    }

    pub(super) fn mappable(&self, bar: u8) -> Option<Mappable> {
        self.function.mappable(bar)
    }

    pub(super) fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.function.read_bar(bar, offset, data);
    }

    pub(super) fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        self.function.write_bar(bar, offset, data);
    }

    pub(super) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.config.show_line(self.interrupts.is_asserted());
        self.config.read(offset, data);
    }

    /// Whether the write was a reset, which is over when this returns.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) -> bool {
        let changes = self.config.write(offset, data);
        if changes.reset {
            self.reset();
        } else if changes.master || changes.interrupts {
            self.follow();
        }
        changes.reset
    }

    /// Makes function and interrupts follow the command register. What the function has begun has ended
    /// when it may access memory no more.
    fn follow(&mut self) {
        let master = self.config.is_master();
        if self.master && !master {
            self.held(|device| device.function.set_bus_master(false));
        }
        self.interrupts.follow(master, self.config.line_disabled());
        if master && !self.master {
            self.function.set_bus_master(true);
        }
        self.master = master;
    }

    /// The client has enabled messages, or the line.
    pub(super) fn use_messages(&self) {
        self.function.use_messages(self.interrupts.uses_messages());
    }

    /// Does something while nothing that was begun uses guest memory.
    pub(super) fn held(&self, change: impl FnOnce(&Self)) {
        if self.stopped {
            change(self);
            return;
        }
        self.function.pause();
        change(self);
        self.function.resume();
    }

    /// Nothing that was begun uses the old memory when this returns.
    pub(super) fn exchange_memory(&self, new: VfioUserMemory) {
        self.held(|device| {
            if let Ok(guard) = device.memory.lock() {
                guard.replace(new);
            }
        });
    }

    /// Function-level reset: returns when nothing of the guest is in use any more. A device that was
    /// stopped runs afterwards.
    pub(super) fn reset(&mut self) {
        self.config.reset();
        if self.stopped {
            // A worker that is held cannot end anything; nor may it go on with what it has.
            self.function.set_bus_master(false);
            self.stopped = false;
            self.function.resume();
        }
        self.quiet();
        self.function.set_bus_master(false);
        self.master = false;
        self.interrupts.forget();
        self.interrupts.follow(false, self.config.line_disabled());
        self.interrupts.stop(false);
    }

    /// Resets the function and waits until it is idle.
    fn quiet(&self) {
        self.function.reset();
        let started = Instant::now();
        while !self.function.is_idle() {
            if started.elapsed() > Duration::from_secs(5) {
                tracing::warn!("a reset waits for the disk");
                std::thread::sleep(Duration::from_millis(100));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The client is gone: nothing that it has means anything any more.
    pub(super) fn end(&mut self) {
        self.reset();
        self.interrupts.clear();
        self.function.renew_mappable();
        self.exchange_memory(VfioUserMemory::new());
    }

    /// Whether it can be stopped, saved and restored.
    pub(super) fn can_migrate(&self) -> bool {
        self.function.migration().is_some()
    }

    fn migration(&self) -> Result<&dyn Migratable, i32> {
        self.function.migration().ok_or(libc::ENOTTY)
    }

    /// Ends what the function has taken, and holds it.
    pub(super) fn stop(&mut self) -> Result<(), i32> {
        let stopped = self.migration()?.stop(sys::after(PATIENCE));
        stopped.map_err(|error| {
            tracing::warn!(%error, "the device was not stopped");
            libc::EBUSY
        })?;
        self.interrupts.stop(true);
        self.stopped = true;
        Ok(())
    }

    /// Goes on after [`stop`](Self::stop).
    pub(super) fn start(&mut self) {
        self.stopped = false;
        self.interrupts.stop(false);
        self.function.resume();
    }

    /// The state of the stopped device.
    pub(super) fn save(&self) -> Result<Vec<u8>, i32> {
        let state = self.migration()?.save().map_err(|error| {
            tracing::warn!(%error, "the state of the device was not saved");
            libc::EIO
        })?;
        stream::encode(self.description.class, &self.config.save(), &state).ok_or(libc::EFBIG)
    }

    /// Puts the stopped device into a state that came from a client. After an error it needs a reset.
    pub(super) fn restore(&mut self, data: &[u8]) -> Result<(), String> {
        let parts = stream::decode(self.description.class, data)?;
        let mut config = ConfigSpace::new(&self.description);
        config.restore(parts.config)?;
        let migration = self.function.migration().ok_or("it cannot be restored")?;
        // A fresh function takes the state: it has to run for a moment to get there, without memory.
        self.function.set_bus_master(false);
        self.master = false;
        self.interrupts.forget();
        self.function.resume();
        self.quiet();
        migration
            .stop(sys::after(PATIENCE))
            .and_then(|()| migration.restore(parts.device))
            .map_err(|error| error.to_string())?;
        self.config = config;
        self.follow();
        Ok(())
    }
}
