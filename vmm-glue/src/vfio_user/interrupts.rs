//! Interrupts as eventfds of the client.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use virtio_devices::VectorInterrupt;

use crate::sys;

/// The most vectors of an index.
pub(super) const MAX_VECTORS: usize = 2048;

/// Index of the line.
pub(super) const INTX: u32 = 0;
/// Index of MSI.
pub(super) const MSI: u32 = 1;
/// Index of MSI-X.
pub(super) const MSIX: u32 = 2;
/// Number of indices of a PCI device.
pub(super) const INDICES: u32 = 5;

#[derive(Debug, Default)]
struct State {
    line: Option<File>,
    asserted: bool,
    /// It was signalled and has not been unmasked since.
    masked: bool,
    /// The guest has disabled the line.
    disabled: bool,
    /// Messages may be sent.
    master: bool,
    /// The device is stopped: nothing is sent at all.
    stopped: bool,
    /// Vectors that were to be sent meanwhile.
    waiting: BTreeSet<u16>,
    msi: Vec<Option<File>>,
    msix: Vec<Option<File>>,
}

impl State {
    /// Signals the line if it is up and not masked; it is masked then, until the client unmasks it.
    fn show_line(&mut self) {
        if self.asserted
            && !self.masked
            && !self.disabled
            && !self.stopped
            && let Some(line) = &self.line
        {
            self.masked = true;
            if let Err(error) = sys::signal(line) {
                tracing::debug!(%error, "the line was not signalled");
            }
        }
    }

    /// Sends a message.
    fn send(&self, vector: u16) -> io::Result<()> {
        let vector = usize::from(vector);
        let file = if self.msix.is_empty() {
            // Fewer vectors than were asked for share what there is.
            let vector = vector % self.msi.len().max(1);
            self.msi.get(vector)
        } else {
            self.msix.get(vector)
        };
        match file {
            Some(Some(file)) => sys::signal(file),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Sends what has waited, if it may be sent now.
    fn send_waiting(&mut self) {
        if !self.master || self.stopped {
            return;
        }
        for vector in std::mem::take(&mut self.waiting) {
            if let Err(error) = self.send(vector) {
                tracing::debug!(vector, %error, "a message that had to wait was not sent");
            }
        }
    }
}

/// The interrupts of a device behind a vfio-user socket.
#[derive(Debug, Default)]
pub struct VfioUserInterrupts(Mutex<State>);

impl VfioUserInterrupts {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the eventfds of vectors from `start` on; `None` takes one away.
    pub(super) fn set(
        &self,
        index: u32,
        start: usize,
        files: Vec<Option<File>>,
    ) -> Result<(), i32> {
        let mut state = self.state();
        let end = start.checked_add(files.len()).ok_or(libc::EINVAL)?;
        for file in files.iter().flatten() {
            sys::set_nonblocking(file)
                .map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))?;
        }
        let list = match index {
            INTX if start == 0 && files.len() <= 1 => {
                state.line = files.into_iter().next().flatten();
                state.masked = false;
                state.show_line();
                return Ok(());
            }
            MSI => &mut state.msi,
            MSIX => &mut state.msix,
            _ => return Err(libc::EINVAL),
        };
        if end > MAX_VECTORS {
            return Err(libc::EINVAL);
        }
        if list.len() < end {
            list.resize_with(end, || None);
        }
        for (place, file) in list[start..].iter_mut().zip(files) {
            *place = file;
        }
        Ok(())
    }

    /// Takes all eventfds of an index away.
    pub(super) fn disable(&self, index: u32) {
        let mut state = self.state();
        match index {
            INTX => {
                state.line = None;
                state.masked = false;
            }
            MSI => state.msi.clear(),
            MSIX => state.msix.clear(),
            _ => {}
        }
    }

    /// Masks or unmasks the line; one that is still up is signalled again.
    pub(super) fn mask_line(&self, masked: bool) {
        let mut state = self.state();
        state.masked = masked;
        state.show_line();
    }

    /// Follows the command register: messages need the bus master bit, and the line may be disabled.
    pub(super) fn follow(&self, master: bool, line_disabled: bool) {
        let mut state = self.state();
        state.master = master;
        state.disabled = line_disabled;
        state.send_waiting();
        state.show_line();
    }

    /// Holds everything back while the device is stopped.
    pub(super) fn stop(&self, stopped: bool) {
        let mut state = self.state();
        state.stopped = stopped;
        state.send_waiting();
        state.show_line();
    }

    /// Whether the device asks for the line.
    pub(super) fn is_asserted(&self) -> bool {
        self.state().asserted
    }

    /// The device was reset: what had to wait is sent no more.
    pub(super) fn forget(&self) {
        self.state().waiting.clear();
    }

    /// Signals a vector because the client asks for it.
    pub(super) fn trigger(&self, index: u32, vector: usize) {
        let state = self.state();
        let file = match index {
            INTX => state.line.as_ref(),
            MSI => state.msi.get(vector).and_then(Option::as_ref),
            MSIX => state.msix.get(vector).and_then(Option::as_ref),
            _ => None,
        };
        if let Some(file) = file {
            let _ = sys::signal(file);
        }
    }

    /// Whether messages are enabled in place of the line.
    pub(super) fn uses_messages(&self) -> bool {
        let state = self.state();
        !state.msix.is_empty() || !state.msi.is_empty()
    }

    pub(super) fn clear(&self) {
        let mut state = self.state();
        let asserted = state.asserted;
        *state = State {
            asserted,
            ..State::default()
        };
    }
}

impl VectorInterrupt for VfioUserInterrupts {
    fn signal(&self, vector: u16) -> io::Result<()> {
        let mut state = self.state();
        if state.master && !state.stopped {
            return state.send(vector);
        }
        if usize::from(vector) < MAX_VECTORS {
            state.waiting.insert(vector);
        }
        Ok(())
    }

    fn set_level(&self, asserted: bool) {
        let mut state = self.state();
        state.asserted = asserted;
        state.show_line();
    }
}
