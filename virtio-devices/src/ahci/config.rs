//! How an HBA and its drives are made.

use std::time::Duration;

use crate::worker::DEFAULT_POLL_MAX;

/// Where an HBA does what other models do, and not what the specification says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// A command that reads with PIO ends with a Register FIS after its last PIO Setup FIS.
    pub register_after_pio_in: bool,
    /// Descriptors do not interrupt (PxIS.DPS), whatever they ask for.
    pub no_descriptor_interrupt: bool,
    /// A READ or WRITE with a 28-bit address counts with 16 bits.
    pub wide_counts: bool,
}

/// How an HBA is made.
#[derive(Clone, Debug)]
pub struct HbaConfig {
    /// Ports, 1 to 32.
    pub ports: u8,
    /// CAP.SSS: a port is silent until the driver sets PxCMD.SUD.
    pub staggered_spin_up: bool,
    /// CAP.CCCS: command completion coalescing. It needs a bit of IS, so that 32 ports have none.
    pub coalescing: bool,
    /// What VS says: 0001_0301h is AHCI 1.3.1.
    pub version: u32,
    /// Deviations.
    pub quirks: Quirks,
    /// How long a port's worker looks for commands before it sleeps, at most; zero: never. See
    /// [`Worker::set_poll_max`](crate::worker::Worker::set_poll_max).
    pub poll_max: Duration,
}

impl Default for HbaConfig {
    fn default() -> Self {
        Self {
            ports: 6,
            staggered_spin_up: false,
            coalescing: true,
            version: 0x0001_0301,
            quirks: Quirks::default(),
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

/// What an optical drive says of itself.
#[derive(Clone, Debug)]
pub struct OpticalConfig {
    /// At most 40 ASCII characters.
    pub model: String,
    /// At most 20 ASCII characters.
    pub serial: String,
    /// At most 8 ASCII characters.
    pub firmware: String,
}

impl Default for OpticalConfig {
    fn default() -> Self {
        Self {
            model: "Platter DVD-ROM".to_owned(),
            serial: "PLATTER0".to_owned(),
            firmware: "1.0".to_owned(),
        }
    }
}
