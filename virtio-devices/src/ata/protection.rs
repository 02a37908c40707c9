//! What protects the data of a disk: passwords and sanitize operations, and the sidecar that remembers
//! them. It is shared by the port and by the thread that does its work, and knows no command.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use block::{AsyncDiskFile, ErrorKind};
use serde::{Deserialize, Serialize};

use super::password::Password;
use crate::{
    Error, Result,
    host::{self, Action, Sidecar, erase},
};

/// The version of the sidecar that is written here.
const VERSION: u32 = 1;

/// Wrong passwords until only a power cycle helps.
const ATTEMPTS: u8 = 5;

/// The master password identifier of a disk whose master password nobody has set.
const FACTORY_MASTER: u16 = 0xfffe;

/// What is not told of progress: the operation has ended.
pub(super) const ENDED: u16 = 0xffff;

/// What a sidecar remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    version: u32,
    /// The user password; with one, security is enabled.
    #[serde(default)]
    pub(super) user: Option<Password>,
    #[serde(default)]
    pub(super) master: Option<Password>,
    /// Master password capability: with maximum the master password can only erase.
    #[serde(default)]
    pub(super) maximum: bool,
    pub(super) master_identifier: u16,
    /// The newest sanitize operation.
    #[serde(default)]
    pub(super) sanitize: Option<Sanitize>,
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            version: VERSION,
            user: None,
            master: None,
            maximum: false,
            master_identifier: FACTORY_MASTER,
            sanitize: None,
        }
    }
}

impl host::Content for Kept {
    // A password that somebody uses elsewhere, too, could be guessed from its hash.
    const MODE: u32 = 0o600;

    fn check(&self) -> std::result::Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "version is {}, this is version {VERSION}",
                self.version
            ));
        }
        if let Some(Sanitize {
            action: Action::CryptoErase,
            ..
        }) = self.sanitize
        {
            return Err("sanitize is CryptoErase, expected BlockErase or Overwrite".to_owned());
        }
        let passwords = [&self.user, &self.master];
        passwords
            .into_iter()
            .flatten()
            .try_for_each(Password::check)
    }
}

/// A sanitize operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sanitize {
    pub(super) action: Action,
    /// The FAILURE MODE bit: a failure may be left without another operation.
    pub(super) failure_mode: bool,
    pub(super) outcome: Outcome,
}

/// How a sanitize operation went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    Running,
    Succeeded,
    Failed,
}

/// What a power cycle ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Volatile {
    /// Security is enabled, and no password was given.
    pub(super) locked: bool,
    pub(super) frozen: bool,
    /// Wrong passwords that are left.
    pub(super) attempts: u8,
    /// The last command was SECURITY ERASE PREPARE.
    pub(super) prepared: bool,
    pub(super) sanitize_frozen: bool,
    pub(super) antifreeze: bool,
}

impl Volatile {
    fn power_on(kept: &Kept) -> Self {
        Self {
            locked: kept.user.is_some(),
            frozen: false,
            attempts: ATTEMPTS,
            prepared: false,
            sanitize_frozen: false,
            antifreeze: false,
        }
    }

    fn check(&self, kept: &Kept) -> Result<()> {
        let bad = |what: &str| Err(Error::State(what.to_owned()));
        if self.attempts > ATTEMPTS {
            return bad("more attempts at a password than a disk allows");
        }
        if self.locked && (self.frozen || kept.user.is_none()) {
            return bad("a disk that is locked, and frozen or without a user password");
        }
        if self.sanitize_frozen && self.antifreeze {
            return bad("sanitize that is frozen against an antifreeze lock");
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) kept: Kept,
    pub(super) now: Volatile,
}

impl State {
    pub(super) fn is_enabled(&self) -> bool {
        self.kept.user.is_some()
    }

    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.kept.sanitize.map(|sanitize| sanitize.outcome)
    }

    /// A sanitize operation runs, or its failure was not left: nobody gets at the data.
    pub(super) fn is_sanitizing(&self) -> bool {
        matches!(self.outcome(), Some(Outcome::Running | Outcome::Failed))
    }
}

/// What protects the data of a disk. All of it may be called from any thread.
#[derive(Debug)]
pub(crate) struct Protection {
    sidecar: Sidecar<Kept>,
    state: Mutex<State>,
    /// A command has to be looked at before it is begun.
    restricts: AtomicBool,
    /// Of 65536, of a sanitize operation.
    progress: AtomicU32,
    /// The disk is gone: an operation goes on at the next start.
    power_off: AtomicBool,
    /// SECURITY ERASE UNIT ends, because of a reset.
    cancelled: AtomicBool,
}

impl Protection {
    /// Reads the sidecar, or makes one; the disk is powered on.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not one of ours, or cannot be written.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        let (sidecar, kept) = Sidecar::open(path)?;
        let now = Volatile::power_on(&kept);
        let protection = Self {
            sidecar,
            state: Mutex::new(State { kept, now }),
            restricts: AtomicBool::new(false),
            progress: AtomicU32::new(0),
            power_off: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
        };
        protection.change(|_| ());
        Ok(Arc::new(protection))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> State {
        self.lock().clone()
    }

    /// Changes what is not kept.
    pub(super) fn change<R>(&self, change: impl FnOnce(&mut Volatile) -> R) -> R {
        let mut state = self.lock();
        let result = change(&mut state.now);
        self.refresh(&state);
        result
    }

    fn refresh(&self, state: &State) {
        let restricts = state.now.locked || state.now.prepared || state.is_sanitizing();
        self.restricts.store(restricts, Ordering::Release);
    }

    /// Whether a command has to be looked at before it is begun.
    pub(super) fn restricts(&self) -> bool {
        self.restricts.load(Ordering::Acquire)
    }

    /// A software reset, or a hardware reset that may leave the security state as it is (software
    /// settings preservation).
    pub(super) fn reset(&self, hard: bool, preserve: bool) {
        self.cancel();
        let enabled = self.lock().is_enabled();
        self.change(|now| {
            now.prepared = false;
            if hard {
                now.sanitize_frozen = false;
                now.antifreeze = false;
            }
            if hard && !preserve {
                now.locked = enabled;
                now.frozen = false;
                now.attempts = ATTEMPTS;
            }
        });
    }

    /// Ends SECURITY ERASE UNIT soon: nobody waits for it any more.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// A new one may begin.
    pub(super) fn uncancel(&self) {
        self.cancelled.store(false, Ordering::Release);
    }

    /// Ends every work soon, as if the power had failed.
    pub(crate) fn power_off(&self) {
        self.power_off.store(true, Ordering::Release);
    }

    pub(super) fn progress(&self) -> u16 {
        match self.lock().outcome() {
            Some(Outcome::Running) => self.progress.load(Ordering::Acquire).min(0xfffe) as u16,
            _ => ENDED,
        }
    }

    /// Remembers something: first in the sidecar, then here.
    pub(super) fn keep(
        &self,
        change: impl FnOnce(&mut Kept),
    ) -> std::result::Result<(), ErrorKind> {
        let mut kept = self.lock().kept.clone();
        change(&mut kept);
        if let Err(error) = self.sidecar.write(|| kept.clone()) {
            tracing::error!(%error, "not remembered");
            return Err(ErrorKind::Io(libc::EIO));
        }
        let mut state = self.lock();
        state.kept = kept;
        self.refresh(&state);
        Ok(())
    }

    /// Erases the disk, unless a reset ends that.
    pub(super) fn erase_unit(
        &self,
        disk: &dyn AsyncDiskFile,
    ) -> std::result::Result<(), ErrorKind> {
        let stopped =
            || self.cancelled.load(Ordering::Acquire) || self.power_off.load(Ordering::Acquire);
        match erase(disk, Action::BlockErase, &stopped, &mut |_| ()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ErrorKind::Cancelled),
            Err(error) => {
                tracing::error!(%error, "SECURITY ERASE UNIT");
                Err(error.kind())
            }
        }
    }

    /// Begins a sanitize operation: it is remembered before anything is erased.
    pub(super) fn begin_sanitize(
        &self,
        action: Action,
        failure_mode: bool,
    ) -> std::result::Result<(), ErrorKind> {
        self.progress.store(0, Ordering::Release);
        self.keep(|kept| {
            kept.sanitize = Some(Sanitize {
                action,
                failure_mode,
                outcome: Outcome::Running,
            });
        })
    }

    /// Does the sanitize operation that is to be done, if there is one.
    pub(crate) fn sanitize(&self, disk: &dyn AsyncDiskFile) {
        let Some(Sanitize {
            action,
            outcome: Outcome::Running,
            ..
        }) = self.lock().kept.sanitize
        else {
            return;
        };
        let stopped = || self.power_off.load(Ordering::Acquire);
        let erased = erase(disk, action, &stopped, &mut |done| {
            self.progress.store(done, Ordering::Release);
        });
        let ended = match erased {
            Ok(true) => Outcome::Succeeded,
            Ok(false) => return,
            Err(error) => {
                tracing::error!(%error, "sanitize");
                Outcome::Failed
            }
        };
        let end = |kept: &mut Kept| {
            if let Some(sanitize) = &mut kept.sanitize {
                sanitize.outcome = ended;
            }
        };
        if self.keep(end).is_err() {
            // It is done all the same; a start would do it once more.
            let mut state = self.lock();
            end(&mut state.kept);
            self.refresh(&state);
        }
    }

    /// What has to be saved.
    pub(super) fn save(&self) -> Volatile {
        self.lock().now
    }

    /// Whether an operation runs, which cannot be saved.
    pub(crate) fn runs_sanitize(&self) -> bool {
        self.lock().outcome() == Some(Outcome::Running)
    }

    /// Takes a saved state, which is not trusted. What is kept may have changed since the sidecar was
    /// opened.
    pub(super) fn restore(&self, now: Volatile) -> Result<()> {
        let kept = self.sidecar.read()?;
        now.check(&kept)?;
        let mut state = self.lock();
        *state = State { kept, now };
        self.refresh(&state);
        Ok(())
    }
}
