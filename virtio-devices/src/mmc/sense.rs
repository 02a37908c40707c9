//! Why a command failed (SPC-3, 4.5).

use serde::{Deserialize, Serialize};

/// Sense key and additional sense code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense {
    /// The sense key.
    pub key: u8,
    /// The additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
}

impl Sense {
    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// Nothing.
    pub const NONE: Self = Self::new(0, 0, 0);
    /// There is no medium, tray closed.
    pub const NO_MEDIUM_CLOSED: Self = Self::new(2, 0x3a, 1);
    /// There is no medium, tray open.
    pub const NO_MEDIUM_OPEN: Self = Self::new(2, 0x3a, 2);
    /// The medium could not be read.
    pub const READ_ERROR: Self = Self::new(3, 0x11, 0);
    /// The drive does not know the command.
    pub const INVALID_OPCODE: Self = Self::new(5, 0x20, 0);
    /// The address is beyond the end.
    pub const OUT_OF_RANGE: Self = Self::new(5, 0x21, 0);
    /// A field of the packet is wrong.
    pub const INVALID_FIELD: Self = Self::new(5, 0x24, 0);
    /// A field of the parameter list is wrong.
    pub const INVALID_PARAMETER: Self = Self::new(5, 0x26, 0);
    /// The parameter list ends too early.
    pub const PARAMETER_LENGTH: Self = Self::new(5, 0x1a, 0);
    /// The medium is none for which this works.
    pub const INCOMPATIBLE_MEDIUM: Self = Self::new(5, 0x30, 2);
    /// Saved values are not kept.
    pub const NO_SAVING: Self = Self::new(5, 0x39, 0);
    /// The driver forbade to open the tray.
    pub const REMOVAL_PREVENTED: Self = Self::new(5, 0x53, 2);
    /// The track holds other sectors.
    pub const ILLEGAL_MODE: Self = Self::new(5, 0x64, 0);
    /// The medium may have changed.
    pub const MEDIUM_CHANGED: Self = Self::new(6, 0x28, 0);

    /// As REQUEST SENSE returns it: fixed format, 18 bytes.
    #[must_use]
    pub fn fixed(self) -> [u8; 18] {
        let mut data = [0; 18];
        data[0] = 0x70;
        data[2] = self.key;
        data[7] = 10;
        data[12] = self.asc;
        data[13] = self.ascq;
        data
    }
}
