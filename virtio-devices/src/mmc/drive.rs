//! The drive: tray, medium, sense, events.

use serde::{Deserialize, Serialize};

use super::{BLOCK, Reply, Sense};
use crate::{Error, Result};

/// What a drive says of itself.
#[derive(Clone, Debug)]
pub struct MmcConfig {
    /// At most 8 ASCII characters.
    pub vendor: String,
    /// At most 16 ASCII characters.
    pub product: String,
    /// At most 4 ASCII characters.
    pub revision: String,
    /// At most 20 ASCII characters.
    pub serial: String,
    /// The physical interface, as the core feature names it: 2 is ATAPI, 7 is Serial ATAPI, 1 SCSI.
    pub interface: u32,
}

impl Default for MmcConfig {
    fn default() -> Self {
        Self {
            vendor: "PLATTER".to_owned(),
            product: "DVD-ROM".to_owned(),
            revision: "1.0".to_owned(),
            serial: "PLATTER0".to_owned(),
            interface: 7,
        }
    }
}

/// What the host cannot do with a tray.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrayError {
    /// The guest forbade to open it; an eject request was passed on to it.
    #[error("the guest has locked the tray; it was asked to eject")]
    Locked,
    /// The tray is closed, so that nothing can be put in or taken out.
    #[error("the tray is closed")]
    Closed,
    /// There is a medium in it already.
    #[error("there is a medium in the tray")]
    Occupied,
}

/// What GET EVENT STATUS NOTIFICATION reports of the medium (MMC-6, 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event {
    None,
    EjectRequest,
    NewMedia,
    MediaRemoval,
}

/// What MODE SELECT can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Modes {
    pub(super) recovery: u8,
    pub(super) retries: u8,
}

impl Default for Modes {
    fn default() -> Self {
        Self {
            recovery: 0,
            retries: 5,
        }
    }
}

/// Everything about a drive that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmcState {
    /// Bytes of the medium in the tray.
    pub medium: Option<u64>,
    /// The tray is open.
    pub open: bool,
    /// The driver forbade to open the tray.
    pub locked: bool,
    /// Why the last command failed.
    pub(super) sense: Sense,
    /// To be reported by the next command.
    pub(super) attention: Option<Sense>,
    pub(super) event: Event,
    pub(super) modes: Modes,
}

/// A DVD-ROM drive: parses packets, keeps the state of tray and medium. It does no I/O.
#[derive(Debug)]
pub struct MmcDrive {
    pub(super) config: MmcConfig,
    pub(super) state: MmcState,
    /// Counts movements of the tray.
    moves: u64,
}

impl MmcDrive {
    /// An empty drive, tray closed.
    ///
    /// # Errors
    /// [`Error::Config`] for texts that do not fit.
    pub fn new(config: MmcConfig) -> Result<Self> {
        for (name, text, limit) in [
            ("vendor", &config.vendor, 8),
            ("product", &config.product, 16),
            ("revision", &config.revision, 4),
            ("serial", &config.serial, 20),
        ] {
            let fits = text.len() <= limit && text.bytes().all(|b| (0x20..0x7f).contains(&b));
            if !fits {
                return Err(Error::Config(format!(
                    "{name} '{text}' is not at most {limit} printable ASCII characters"
                )));
            }
        }
        Ok(Self {
            config,
            state: MmcState {
                medium: None,
                open: false,
                locked: false,
                sense: Sense::NONE,
                attention: None,
                event: Event::None,
                modes: Modes::default(),
            },
            moves: 0,
        })
    }

    /// What has to be saved.
    #[must_use]
    pub fn save(&self) -> MmcState {
        self.state.clone()
    }

    /// Takes a saved state. The medium has to be there already, of the same size.
    ///
    /// # Errors
    /// [`Error::State`] when the medium is another one.
    pub fn restore(&mut self, state: MmcState) -> Result<()> {
        if state.medium != self.state.medium {
            return Err(Error::State(format!(
                "the medium has {:?} bytes, the saved one {:?}",
                self.state.medium, state.medium
            )));
        }
        self.state = state;
        Ok(())
    }

    /// Why the last command failed.
    #[must_use]
    pub fn sense(&self) -> Sense {
        self.state.sense
    }

    /// Counts movements of the tray, so that a host can tell that there was one.
    #[must_use]
    pub fn tray_moves(&self) -> u64 {
        self.moves
    }

    /// Whether the tray is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.open
    }

    /// Whether the guest has locked the tray.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.state.locked
    }

    /// A reset: the tray is unlocked; the medium and the tray stay as they are.
    pub fn reset(&mut self) {
        self.state.locked = false;
        self.state.sense = Sense::NONE;
        self.state.modes = Modes::default();
    }

    /// The host opens the tray. A locked one stays closed unless forced, and the guest is asked to
    /// eject.
    ///
    /// # Errors
    /// [`TrayError::Locked`].
    pub fn open_tray(&mut self, force: bool) -> std::result::Result<(), TrayError> {
        if self.state.locked && !force {
            self.state.event = Event::EjectRequest;
            return Err(TrayError::Locked);
        }
        self.state.locked = false;
        self.move_tray(true);
        Ok(())
    }

    /// The host closes the tray.
    pub fn close_tray(&mut self) {
        self.move_tray(false);
    }

    /// The host puts a medium of `bytes` into the open tray.
    ///
    /// # Errors
    /// [`TrayError::Closed`], [`TrayError::Occupied`].
    pub fn insert(&mut self, bytes: u64) -> std::result::Result<(), TrayError> {
        match (self.state.open, self.state.medium) {
            (false, _) => Err(TrayError::Closed),
            (true, Some(_)) => Err(TrayError::Occupied),
            (true, None) => {
                self.state.medium = Some(bytes);
                Ok(())
            }
        }
    }

    /// The host takes the medium out of the open tray; returns whether there was one.
    ///
    /// # Errors
    /// [`TrayError::Closed`].
    pub fn eject(&mut self) -> std::result::Result<bool, TrayError> {
        if !self.state.open {
            return Err(TrayError::Closed);
        }
        Ok(self.state.medium.take().is_some())
    }

    /// The medium that is in the drive from the start.
    pub fn load(&mut self, bytes: u64) {
        self.state.medium = Some(bytes);
    }

    pub(super) fn move_tray(&mut self, open: bool) {
        if self.state.open == open {
            return;
        }
        self.state.open = open;
        self.moves += 1;
        if self.state.medium.is_none() {
            return;
        }
        if open {
            self.state.event = Event::MediaRemoval;
        } else {
            self.state.event = Event::NewMedia;
            self.state.attention = Some(Sense::MEDIUM_CHANGED);
        }
    }

    /// Sectors of the medium; `None` without one that can be read.
    pub(super) fn blocks(&self) -> Option<u32> {
        let bytes = self.state.medium.filter(|_| !self.state.open)?;
        Some((bytes / BLOCK).min(u64::from(u32::MAX)) as u32)
    }

    /// Whether the medium is small enough to be a CD of 80 minutes.
    pub(super) fn is_cd(&self) -> bool {
        self.blocks().is_some_and(|blocks| blocks <= 80 * 60 * 75)
    }

    /// Ends with a check condition.
    pub(super) fn check(&mut self, sense: Sense) -> Reply {
        self.state.sense = sense;
        Reply::Check
    }

    /// Why there is no medium.
    pub(super) fn no_medium(&mut self) -> Reply {
        self.check(if self.state.open {
            Sense::NO_MEDIUM_OPEN
        } else {
            Sense::NO_MEDIUM_CLOSED
        })
    }
}

/// Data cut to the allocation length. Nothing at all is no error.
pub(super) fn cut(mut data: Vec<u8>, limit: usize) -> Reply {
    data.truncate(limit);
    if data.is_empty() {
        Reply::Good
    } else {
        Reply::Data(data)
    }
}
