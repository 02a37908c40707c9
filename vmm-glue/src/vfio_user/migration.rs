//! Moving a device to another process: the states of VFIO's migration protocol, version 2, without its
//! optional ones, and the data that goes through messages (`linux/vfio.h`, `enum vfio_device_mig_state`).
//!
//! ```text
//! RUNNING <-> STOP <-> STOP_COPY
//!               ^-----> RESUMING
//! ```
//!
//! Every other pair of states is a way through STOP. A step that fails while the device is being put into
//! a state leaves ERROR, which only a reset ends.

use super::{device::Device, stream};

/// VFIO_MIGRATION_STOP_COPY: neither peer-to-peer states, which need devices that know of each other, nor
/// pre-copy, which a state this small does not need.
pub(super) const FLAGS: u64 = 1;
/// What is said of the size of the data before there is any.
const ESTIMATE: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
enum State {
    Error = 0,
    Stop = 1,
    #[default]
    Running = 2,
    StopCopy = 3,
    Resuming = 4,
}

impl State {
    /// A state that a client may ask for.
    fn asked(number: u32) -> Option<Self> {
        match number {
            1 => Some(State::Stop),
            2 => Some(State::Running),
            3 => Some(State::StopCopy),
            4 => Some(State::Resuming),
            _ => None,
        }
    }
}

/// Where the device is on its way, and the data.
#[derive(Debug, Default)]
pub(super) struct Migration {
    state: State,
    /// What is read in STOP_COPY, or was written in RESUMING.
    data: Vec<u8>,
    /// How much of it was read.
    at: usize,
}

impl Migration {
    /// The number of the state.
    pub(super) fn state(&self) -> u32 {
        self.state as u32
    }

    /// The device was reset.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Goes to a state.
    ///
    /// # Errors
    /// EINVAL for a state that cannot be asked for, or not from here; what the device says.
    pub(super) fn go(&mut self, number: u32, device: &mut Device) -> Result<(), i32> {
        let target = State::asked(number).ok_or(libc::EINVAL)?;
        if self.state == State::Error {
            return Err(libc::EINVAL);
        }
        while self.state != target {
            let next = if self.state == State::Stop {
                target
            } else {
                State::Stop
            };
            self.step(next, device)?;
        }
        Ok(())
    }

    fn step(&mut self, next: State, device: &mut Device) -> Result<(), i32> {
        match (self.state, next) {
            (State::Running, _) => device.stop()?,
            (State::Resuming, _) => {
                let data = std::mem::take(&mut self.data);
                if let Err(error) = device.restore(&data) {
                    tracing::warn!(error, "the device does not take this state");
                    self.state = State::Error;
                    return Err(libc::EINVAL);
                }
            }
            (_, State::Running) => device.start(),
            (_, State::StopCopy) => self.data = device.save()?,
            // The session is over, or begins.
            _ => self.data = Vec::new(),
        }
        self.at = 0;
        self.state = next;
        Ok(())
    }

    /// Reads the next bytes of the state: fewer than `size` at the end.
    ///
    /// # Errors
    /// EINVAL in another state than STOP_COPY.
    pub(super) fn read(&mut self, size: usize) -> Result<&[u8], i32> {
        if self.state != State::StopCopy {
            return Err(libc::EINVAL);
        }
        let start = self.at;
        self.at = start.saturating_add(size).min(self.data.len());
        Ok(&self.data[start..self.at])
    }

    /// Takes more bytes of a state. What is refused is not taken.
    ///
    /// # Errors
    /// EINVAL in another state than RESUMING, and for bytes that are not of a state of this device, or
    /// more than it has.
    pub(super) fn write(&mut self, data: &[u8], device: &Device) -> Result<(), i32> {
        if self.state != State::Resuming {
            return Err(libc::EINVAL);
        }
        let before = self.data.len();
        self.data.extend_from_slice(data);
        let total = stream::total(device.description().class, &self.data);
        let fits = match total {
            Ok(Some(total)) => self.data.len() <= total,
            Ok(None) => true,
            Err(error) => {
                tracing::warn!(error, "the device does not take this state");
                false
            }
        };
        if !fits {
            self.data.truncate(before);
            return Err(libc::EINVAL);
        }
        Ok(())
    }

    /// Bytes of data that there are to be read, or may be.
    pub(super) fn size(&self) -> u64 {
        match self.state {
            State::StopCopy => (self.data.len() - self.at) as u64,
            _ => ESTIMATE,
        }
    }
}
