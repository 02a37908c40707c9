//! The drive: tray, medium, sense, events; and which command goes where.

use serde::{Deserialize, Serialize};

use super::{BLOCK, Cdb, Reply, Sense, be16, mode::Modes, opcode};
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

    fn move_tray(&mut self, open: bool) {
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

    /// Executes a command.
    pub fn command(&mut self, cdb: &Cdb) -> Reply {
        let code = cdb[0];
        if code == opcode::REQUEST_SENSE {
            return self.request_sense(cdb);
        }
        let silent = matches!(
            code,
            opcode::INQUIRY | opcode::GET_CONFIGURATION | opcode::GET_EVENT_STATUS
        );
        if !silent && let Some(attention) = self.state.attention.take() {
            return self.check(attention);
        }
        self.state.sense = Sense::NONE;
        match code {
            opcode::TEST_UNIT_READY => match self.blocks() {
                Some(_) => Reply::Good,
                None => self.no_medium(),
            },
            opcode::INQUIRY => self.inquiry(cdb),
            opcode::START_STOP_UNIT => self.start_stop(cdb),
            opcode::PREVENT_ALLOW_MEDIUM_REMOVAL => self.prevent(cdb),
            opcode::READ_FORMAT_CAPACITIES => self.format_capacities(cdb),
            opcode::READ_CAPACITY => self.read_capacity(),
            opcode::READ_10 | opcode::READ_12 => self.read(cdb),
            opcode::READ_CD => self.read_cd(cdb),
            opcode::SEEK_10 => self.seek(cdb),
            opcode::READ_TOC => self.read_toc(cdb),
            opcode::GET_CONFIGURATION => self.get_configuration(cdb),
            opcode::GET_EVENT_STATUS => self.event_status(cdb),
            opcode::READ_DISC_INFORMATION => self.disc_information(cdb),
            opcode::READ_TRACK_INFORMATION => self.track_information(cdb),
            opcode::MODE_SELECT_10 => self.mode_select(cdb),
            opcode::MODE_SENSE_10 => self.mode_sense(cdb),
            opcode::GET_PERFORMANCE => self.get_performance(cdb),
            opcode::READ_DVD_STRUCTURE => self.dvd_structure(cdb),
            // There is one speed.
            opcode::SET_CD_SPEED => Reply::Good,
            opcode::MECHANISM_STATUS => self.mechanism_status(cdb),
            _ => self.check(Sense::INVALID_OPCODE),
        }
    }

    /// The data of a command that wanted some has come.
    pub fn data_out(&mut self, cdb: &Cdb, data: &[u8]) -> Reply {
        match cdb[0] {
            opcode::MODE_SELECT_10 => self.mode_parameters(data),
            _ => self.check(Sense::INVALID_OPCODE),
        }
    }

    /// What a read ended with: whether the medium could be read.
    pub fn read_ended(&mut self, ok: bool) -> Reply {
        if ok {
            Reply::Good
        } else if self.blocks().is_none() {
            self.no_medium()
        } else {
            self.check(Sense::READ_ERROR)
        }
    }

    fn request_sense(&mut self, cdb: &Cdb) -> Reply {
        // What waits to be reported may be reported here.
        let sense = match std::mem::take(&mut self.state.sense) {
            Sense::NONE => self.state.attention.take().unwrap_or_default(),
            sense => sense,
        };
        cut(sense.fixed().to_vec(), usize::from(cdb[4]))
    }

    /// START STOP UNIT: LoEj and Start move the tray.
    fn start_stop(&mut self, cdb: &Cdb) -> Reply {
        // Power conditions: there is nothing that would stop turning.
        if cdb[4] >> 4 != 0 {
            return Reply::Good;
        }
        match (cdb[4] & 2 != 0, cdb[4] & 1 != 0) {
            (true, false) if self.state.locked => self.check(Sense::REMOVAL_PREVENTED),
            (true, start) => {
                self.move_tray(!start);
                Reply::Good
            }
            (false, true) if self.blocks().is_none() => self.no_medium(),
            (false, _) => Reply::Good,
        }
    }

    fn prevent(&mut self, cdb: &Cdb) -> Reply {
        // Persistent prevention is the second bit.
        self.state.locked = cdb[4] & 1 != 0;
        Reply::Good
    }

    /// GET EVENT STATUS NOTIFICATION: polled, class "media".
    fn event_status(&mut self, cdb: &Cdb) -> Reply {
        const MEDIA: u8 = 4;
        if cdb[1] & 1 == 0 {
            // Asynchronous operation is not offered.
            return self.check(Sense::INVALID_FIELD);
        }
        let limit = usize::from(be16(cdb, 7));
        if cdb[4] & 1 << MEDIA == 0 {
            // No event available.
            return cut(vec![0, 2, 0x80, 1 << MEDIA], limit);
        }
        let code = match self.state.event {
            Event::None => 0,
            Event::EjectRequest => 1,
            Event::NewMedia => 2,
            Event::MediaRemoval => 3,
        };
        if limit > 4 {
            self.state.event = Event::None;
        }
        let present = u8::from(self.blocks().is_some()) << 1;
        let status = u8::from(self.state.open) | present;
        cut(vec![0, 6, MEDIA, 1 << MEDIA, code, status, 0, 0], limit)
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
