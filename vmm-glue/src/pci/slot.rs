//! A PCI function in the process of its VMM: configuration space, BARs, MSI-X, MSI and the line. The
//! VMM brings the bus: it forwards accesses, and delivers messages and the line.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use virtio_devices::VectorInterrupt;

use super::{Changes, ConfigSpace, Description, MsiMessage, MsixTable, PausableFunction};

/// What a VMM does with the interrupts of a function. Called from any thread, with locks of the
/// function held: it must not call back into it.
pub trait BusSignals: Send + Sync {
    /// Delivers a message: MSI or MSI-X.
    ///
    /// # Errors
    /// What the host says; the device goes on.
    fn message(&self, address: u64, data: u32) -> io::Result<()>;

    /// Raises or lowers INTA.
    fn line(&self, asserted: bool);
}

/// What the configuration space says about interrupts.
#[derive(Clone, Copy, Debug, Default)]
struct Routing {
    msix: bool,
    msix_masked: bool,
    msi: Option<MsiMessage>,
    /// Messages may be sent; those of MSI that could not wait here, a bit a vector.
    master: bool,
    waiting: u32,
    line_disabled: bool,
    /// What the device asks for.
    asserted: bool,
    /// What the bus was told.
    shown: bool,
}

impl Routing {
    /// Whether no vector of MSI-X may be sent now.
    fn masks_table(&self) -> bool {
        !self.msix || self.msix_masked || !self.master
    }
}

/// The interrupts of a function in a slot. It is made first, and given to the function.
pub struct SlotInterrupts {
    signals: Arc<dyn BusSignals>,
    table: MsixTable,
    routing: Mutex<Routing>,
}

impl SlotInterrupts {
    /// Interrupts of a function with at most so many vectors of MSI-X.
    #[must_use]
    pub fn new(signals: Arc<dyn BusSignals>, vectors: u16) -> Arc<Self> {
        Arc::new(Self {
            signals,
            table: MsixTable::new(vectors),
            routing: Mutex::default(),
        })
    }

    fn routing(&self) -> MutexGuard<'_, Routing> {
        self.routing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the line as the routing has it now.
    fn show(&self, routing: &mut Routing) {
        let messages = routing.msix || routing.msi.is_some();
        let line = routing.asserted && !messages && !routing.line_disabled;
        if line != routing.shown {
            routing.shown = line;
            self.signals.line(line);
        }
    }

    /// The guest has changed what the configuration space says.
    fn follow(&self, config: &ConfigSpace) {
        let mut routing = self.routing();
        routing.msix = config.msix_enabled();
        routing.msix_masked = config.msix_masked();
        routing.msi = config.msi();
        routing.line_disabled = config.line_disabled();
        routing.master = config.is_master();
        self.show(&mut routing);
        let masked = routing.masks_table();
        let waiting = if routing.master {
            std::mem::take(&mut routing.waiting)
        } else {
            0
        };
        drop(routing);
        for due in self.table.set_masked(masked) {
            let _ = self.signals.message(due.address, due.data);
        }
        for vector in (0..32).filter(|vector| waiting & 1 << vector != 0) {
            let _ = self.signal(vector);
        }
    }

    fn reset(&self) {
        self.table.reset();
        self.routing().waiting = 0;
    }
}

impl VectorInterrupt for SlotInterrupts {
    fn signal(&self, vector: u16) -> io::Result<()> {
        let mut routing = self.routing();
        if routing.msix {
            // Under the lock, so that what becomes pending is seen when the mask goes.
            let due = self.table.signal(vector, routing.masks_table());
            drop(routing);
            return match due {
                Some(message) => self.signals.message(message.address, message.data),
                None => Ok(()),
            };
        }
        let Some(msi) = routing.msi else {
            return Ok(());
        };
        // Fewer vectors than were asked for share what there is.
        let vector = vector % u16::from(msi.vectors.max(1));
        if !routing.master {
            routing.waiting |= 1_u32.checked_shl(vector.into()).unwrap_or(0);
            return Ok(());
        }
        drop(routing);
        if msi.mask & 1_u32.checked_shl(vector.into()).unwrap_or(0) != 0 {
            return Ok(());
        }
        let data = msi.data.wrapping_add(vector);
        self.signals.message(msi.address, data.into())
    }

    fn set_level(&self, asserted: bool) {
        let mut routing = self.routing();
        routing.asserted = asserted;
        self.show(&mut routing);
    }
}

/// A function in its place on a bus.
pub struct PciSlot {
    function: Arc<dyn PausableFunction>,
    description: Description,
    interrupts: Arc<SlotInterrupts>,
    config: Mutex<ConfigSpace>,
}

impl PciSlot {
    /// Puts a function into a slot; `interrupts` are those that it was made with.
    #[must_use]
    pub fn new(function: Arc<dyn PausableFunction>, interrupts: Arc<SlotInterrupts>) -> Self {
        let description = function.description();
        function.use_messages(false);
        function.set_bus_master(false);
        Self {
            config: Mutex::new(ConfigSpace::new(&description)),
            function,
            description,
            interrupts,
        }
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from the configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config();
        config.show_line(self.interrupts.routing().asserted);
        config.read(offset, data);
    }

    /// Writes to the configuration space; the VMM maps BARs anew if the answer says that they have
    /// changed. A function-level reset is over when this returns.
    pub fn write_config(&self, offset: u64, data: &[u8]) -> Changes {
        let mut config = self.config();
        let changes = config.write(offset, data);
        if changes.reset {
            self.reset_with(&mut config);
            return changes;
        }
        if changes.master && !config.is_master() {
            // What it has begun ends before the guest reads that it may not.
            self.function.pause();
            self.function.set_bus_master(false);
            self.function.resume();
        }
        if changes.interrupts || changes.master {
            self.function.use_messages(config.uses_messages());
            self.interrupts.follow(&config);
        }
        if changes.master && config.is_master() {
            self.function.set_bus_master(true);
        }
        changes
    }

    /// The BAR that decodes an address, in I/O space or in memory: its number, and the offset in it.
    #[must_use]
    pub fn decode(&self, io: bool, address: u64) -> Option<(u8, u64)> {
        let config = self.config();
        let on = if io {
            config.decodes_io()
        } else {
            config.decodes_memory()
        };
        let bars = self
            .description
            .bars
            .iter()
            .filter(|bar| on && bar.io == io);
        bars.into_iter().find_map(|bar| {
            let base = config.bar_address(bar.index).filter(|base| *base != 0)?;
            let offset = address.checked_sub(base)?;
            (offset < bar.size).then_some((bar.index, offset))
        })
    }

    /// The place of the MSI-X table or the pending bits that an access to a BAR is for.
    fn msix_at(&self, bar: u8, offset: u64) -> Option<(bool, u64)> {
        let msix = self.description.msix.filter(|msix| msix.bar == bar)?;
        let inside = |start: u32, len: u64| {
            let at = offset.checked_sub(start.into())?;
            (at < len).then_some(at)
        };
        let table = inside(msix.table, u64::from(msix.vectors) * 16);
        let pending = || inside(msix.pending, u64::from(msix.vectors).div_ceil(64) * 8);
        table
            .map(|at| (true, at))
            .or_else(|| pending().map(|at| (false, at)))
    }

    /// Reads from a BAR.
    pub fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match self.msix_at(bar, offset) {
            Some((true, at)) => self.interrupts.table.read_table(at, data),
            Some((false, at)) => self.interrupts.table.read_pending(at, data),
            None => self.function.read_bar(bar, offset, data),
        }
    }

    /// Writes to a BAR.
    pub fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        match self.msix_at(bar, offset) {
            Some((true, at)) => {
                let masked = self.interrupts.routing().masks_table();
                for due in self.interrupts.table.write_table(at, data, masked) {
                    let _ = self.interrupts.signals.message(due.address, due.data);
                }
            }
            Some((false, _)) => {}
            None => self.function.write_bar(bar, offset, data),
        }
    }

    /// Reset of the bus, or of the function. Nothing of the guest's memory is in use when it returns.
    pub fn reset(&self) {
        self.reset_with(&mut self.config());
    }

    fn reset_with(&self, config: &mut ConfigSpace) {
        config.reset();
        self.interrupts.reset();
        self.interrupts.follow(config);
        self.function.use_messages(false);
        self.function.reset();
        // Workers that are asked to pause answer when what they had begun has ended.
        self.function.pause();
        self.function.set_bus_master(false);
        self.function.resume();
    }

    /// The function.
    #[must_use]
    pub fn function(&self) -> &Arc<dyn PausableFunction> {
        &self.function
    }
}
