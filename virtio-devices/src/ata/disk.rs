//! An ATA disk: its configuration and its state.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use block::AsyncDiskFile;
use serde::{Deserialize, Serialize};

use super::{
    NcqError, Registers, Step, TaskFile, error,
    kept::{ERRORS, ErrorEntry, HostLogs},
    protection::{Protection, Volatile},
    status,
};
use crate::{Error, Result, identity};

/// The most sectors of a DRQ block of READ and WRITE MULTIPLE.
pub(super) const MAX_MULTIPLE: u8 = 16;

/// Heads and sectors a track, unless the driver says something else.
pub(super) const DEFAULT_GEOMETRY: (u8, u8) = (16, 63);

/// What TRIM does on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trim {
    /// It is not offered.
    None,
    /// A hint; what is read afterwards may be the old data.
    Hint,
    /// What is trimmed reads as zeroes (DRAT and RZAT).
    Zero,
}

/// What a disk says of itself.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// At most 40 ASCII characters.
    pub model: String,
    /// At most 20 ASCII characters.
    pub serial: String,
    /// At most 8 ASCII characters.
    pub firmware: String,
    /// The world wide name; 0 is none.
    pub wwn: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical sector: a power of two, at least a logical one, at most 64 KiB.
    pub physical_sector: u32,
    /// Refuse everything that writes.
    pub read_only: bool,
    /// What TRIM does.
    pub trim: Trim,
    /// Whether the disk starts with a volatile write cache.
    pub write_cache: bool,
    /// The file that remembers passwords and sanitize operations. Without it, and on a disk that is not
    /// really overwritten ([`Capabilities::overwrite`](block::Capabilities::overwrite)), the Security and
    /// Sanitize Device feature sets are not offered. With it a thread does host work, and rings the
    /// [doorbell](crate::ahci::Hba::doorbell) of the port when a command can end.
    pub sidecar: Option<PathBuf>,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            model: "Platter SATA disk".to_owned(),
            serial: "PLATTER0".to_owned(),
            firmware: "1.0".to_owned(),
            wwn: 0,
            logical_sector: 512,
            physical_sector: 512,
            read_only: false,
            trim: Trim::None,
            write_cache: true,
            sidecar: None,
        }
    }
}

impl DiskConfig {
    /// What fits a disk: its sectors, whether it can be written and trimmed; serial number and world
    /// wide name are made of its path, unique and the same at every start.
    #[must_use]
    pub fn of(disk: &dyn AsyncDiskFile) -> Self {
        let (topology, can) = (disk.topology(), disk.capabilities());
        let logical = if topology.logical_block_size == 4096 {
            4096
        } else {
            512
        };
        let physical = topology.physical_block_size;
        let fits = physical.is_power_of_two() && (logical..=1 << 16).contains(&physical);
        let seed = identity::seed(disk);
        Self {
            serial: format!("PL{:016X}", identity::fnv(&seed, 3)),
            // Locally assigned (NAA 3): nobody registered it.
            wwn: 3 << 60 | identity::fnv(&seed, 4) >> 4,
            logical_sector: logical,
            physical_sector: if fits { physical } else { logical },
            read_only: !can.writable,
            trim: match (can.writable, can.write_zeroes, can.discard) {
                (true, true, _) => Trim::Zero,
                (true, false, true) => Trim::Hint,
                _ => Trim::None,
            },
            ..Self::default()
        }
    }

    fn check(&self) -> Result<()> {
        check_text("model", &self.model, 40)?;
        check_text("serial", &self.serial, 20)?;
        check_text("firmware", &self.firmware, 8)?;
        if !matches!(self.logical_sector, 512 | 4096) {
            return Err(Error::Config(format!(
                "logical_sector is {}, not 512 or 4096",
                self.logical_sector
            )));
        }
        let physical = self.physical_sector;
        if !physical.is_power_of_two() || physical < self.logical_sector || physical > 1 << 16 {
            return Err(Error::Config(format!(
                "physical_sector is {physical}, not a power of two from {} to 65536",
                self.logical_sector
            )));
        }
        Ok(())
    }
}

/// Whether a text fits into the field of an IDENTIFY.
pub(super) fn check_text(name: &str, text: &str, limit: usize) -> Result<()> {
    if text.len() > limit || !text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(Error::Config(format!(
            "{name} '{text}' is not at most {limit} printable ASCII characters"
        )));
    }
    Ok(())
}

/// The power modes (ACS-3, 4.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// Active.
    Active,
    /// Idle.
    Idle,
    /// Standby.
    Standby,
    /// Only a reset helps.
    Sleep,
}

/// Everything about a disk that a driver changes, and its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Whether the volatile write cache is on.
    pub write_cache: bool,
    /// Whether read look-ahead is on; it changes nothing.
    pub look_ahead: bool,
    /// Sectors of a DRQ block of READ and WRITE MULTIPLE; 0 is off.
    pub multiple: u8,
    /// The transfer mode that was set last (SET FEATURES 03h).
    pub transfer_mode: u8,
    /// The power mode.
    pub power: Power,
    /// Whether SMART is on.
    pub smart: bool,
    /// Whether attributes are saved by themselves.
    pub smart_autosave: bool,
    /// Whether settings survive a COMRESET (software settings preservation).
    pub preserve_settings: bool,
    /// Whether a software reset keeps the settings (SET FEATURES 66h).
    pub keep_on_reset: bool,
    /// Heads and sectors a track, for cylinder, head and sector addresses.
    pub geometry: (u8, u8),
    /// Why queued commands are refused, until the log was read.
    pub ncq_error: Option<NcqError>,
    /// Counters.
    pub counters: Counters,
    /// The newest errors.
    pub(super) errors: Vec<ErrorEntry>,
    /// What the host keeps in logs 80h to 9Fh.
    pub(super) host_logs: HostLogs,
    /// Of passwords and sanitize, what no sidecar remembers; in a saved state only.
    pub(super) protection: Option<Volatile>,
}

/// What a disk counts for SMART and for the device statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Read commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Logical sectors read.
    pub sectors_read: u64,
    /// Logical sectors written.
    pub sectors_written: u64,
    /// Commands that failed because of the medium.
    pub media_errors: u64,
    /// Commands that failed.
    pub errors: u64,
    /// Times it was powered on, or plugged in.
    pub power_cycles: u64,
    /// COMRESETs.
    pub comresets: u64,
    /// Software resets.
    pub soft_resets: u64,
    /// Seconds powered on before this power cycle.
    pub seconds: u64,
}

impl Counters {
    /// Whether a disk can have counted so far: they can go on growing.
    fn are_possible(&self) -> bool {
        let all = [
            self.reads,
            self.writes,
            self.sectors_read,
            self.sectors_written,
            self.media_errors,
            self.errors,
            self.power_cycles,
            self.comresets,
            self.soft_resets,
            self.seconds,
        ];
        all.iter().all(|counter| *counter < 1 << 63)
    }
}

/// An ATA disk: parses commands, keeps the drive's settings. It does no I/O.
#[derive(Debug)]
pub struct AtaDisk {
    pub(super) config: DiskConfig,
    pub(super) state: DiskState,
    /// Bytes; the disk may be resized.
    size: Arc<AtomicU64>,
    pub(super) since: Instant,
    /// Where security and sanitize are offered.
    pub(super) protection: Option<Arc<Protection>>,
}

impl AtaDisk {
    /// A disk of `size` bytes, which may change.
    ///
    /// # Errors
    /// [`Error::Config`] for sector sizes or texts that ATA cannot express.
    pub fn new(config: DiskConfig, size: Arc<AtomicU64>) -> Result<Self> {
        config.check()?;
        let mut disk = Self {
            state: DiskState {
                write_cache: config.write_cache,
                look_ahead: true,
                multiple: 0,
                transfer_mode: 0x46,
                power: Power::Active,
                smart: true,
                smart_autosave: true,
                preserve_settings: true,
                keep_on_reset: false,
                geometry: DEFAULT_GEOMETRY,
                ncq_error: None,
                counters: Counters::default(),
                errors: Vec::new(),
                host_logs: HostLogs::default(),
                protection: None,
            },
            config,
            size,
            since: Instant::now(),
            protection: None,
        };
        disk.state.counters.power_cycles = 1;
        Ok(disk)
    }

    /// Offers security and sanitize.
    pub(crate) fn protect(&mut self, protection: Arc<Protection>) {
        self.protection = Some(protection);
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// The number of logical sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        // 48 bits of address.
        (self.size.load(Ordering::Acquire) / u64::from(self.config.logical_sector)).min(1 << 48)
    }

    /// Seconds powered on, in all.
    pub(super) fn seconds(&self) -> u64 {
        self.state
            .counters
            .seconds
            .saturating_add(self.since.elapsed().as_secs())
    }

    /// What has to be saved.
    #[must_use]
    pub fn save(&self) -> DiskState {
        let mut state = self.state.clone();
        state.counters.seconds = self.seconds();
        state.protection = self.protection.as_ref().map(|it| it.save());
        state
    }

    /// Takes a saved state, which is not trusted.
    ///
    /// # Errors
    /// [`Error::State`] for values that no command could have set.
    pub fn restore(&mut self, mut state: DiskState) -> Result<()> {
        if state.multiple != 0
            && (!state.multiple.is_power_of_two() || state.multiple > MAX_MULTIPLE)
        {
            return Err(Error::State(format!(
                "multiple is {}, not a power of two up to {}",
                state.multiple, MAX_MULTIPLE
            )));
        }
        if state.geometry.0 == 0 || state.geometry.0 > 16 || state.geometry.1 == 0 {
            return Err(Error::State(format!(
                "a geometry of {} heads and {} sectors",
                state.geometry.0, state.geometry.1
            )));
        }
        if !state.counters.are_possible() {
            return Err(Error::State("counters that nothing reaches".to_owned()));
        }
        if state.errors.len() > ERRORS || !state.host_logs.is_sane() {
            return Err(Error::State("logs are larger than they can be".to_owned()));
        }
        match (&self.protection, state.protection.take()) {
            (Some(protection), Some(now)) => protection.restore(now)?,
            (None, None) => {}
            (has, _) => {
                return Err(Error::State(format!(
                    "the disk has {} sidecar, the saved one {}",
                    if has.is_some() { "a" } else { "no" },
                    if has.is_some() { "none" } else { "one" }
                )));
            }
        }
        self.state = state;
        self.since = Instant::now();
        Ok(())
    }

    /// The registers after a reset or a diagnostic: the signature of an ATA disk.
    #[must_use]
    pub fn signature() -> Registers {
        Registers {
            status: status::READY,
            error: 1,
            count: 1,
            lba: 1,
            device: 0,
        }
    }

    /// A reset of the device: `hard` is a COMRESET or power on, otherwise a software reset.
    pub fn reset(&mut self, hard: bool) {
        self.state.ncq_error = None;
        self.state.power = Power::Active;
        let counters = &mut self.state.counters;
        let keep = if hard {
            counters.comresets += 1;
            self.state.preserve_settings
        } else {
            counters.soft_resets += 1;
            self.state.keep_on_reset
        };
        if let Some(protection) = &self.protection {
            protection.reset(hard, self.state.preserve_settings);
        }
        if !keep {
            self.state.multiple = 0;
            self.state.look_ahead = true;
            self.state.write_cache = self.config.write_cache;
            self.state.geometry = DEFAULT_GEOMETRY;
        }
    }

    /// A command that is not offered, or a field of which is wrong.
    pub(super) fn abort(&mut self, task: &TaskFile) -> Step {
        Step::End(self.fail(task, error::ABRT))
    }

    /// Counts a failure, and the registers for it.
    pub(super) fn fail(&mut self, task: &TaskFile, error: u8) -> Registers {
        let registers = Registers::failed(task, error);
        // An unknown command says nothing about the health of the disk.
        if error != error::ABRT {
            self.note_error(task, registers);
        }
        registers
    }

    /// Whether TRIM is offered.
    pub(super) fn offers_trim(&self) -> bool {
        !self.config.read_only && self.config.trim != Trim::None
    }

    /// Adds a failure to the error log.
    pub(super) fn note_error(&mut self, task: &TaskFile, registers: Registers) {
        let hours = (self.seconds() / 3600).min(0xffff) as u16;
        let state = &mut self.state;
        state.counters.errors += 1;
        if state.errors.len() == ERRORS {
            state.errors.remove(0);
        }
        state.errors.push(ErrorEntry {
            task: *task,
            registers,
            hours,
        });
    }
}
