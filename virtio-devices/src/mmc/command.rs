//! Which command goes where; and those that are about the drive itself.

use super::{
    Cdb, MmcDrive, Reply, Sense, be16,
    drive::{Event, cut},
    opcode,
};

impl MmcDrive {
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
