//! Sanitize (base specification 2.0, 8.21): its state, and the work itself.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use block::AsyncDiskFile;
use serde::{Deserialize, Serialize};

use crate::host::{Action, erase};

/// What a sidecar remembers of the last sanitize operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedSanitize {
    pub(super) outcome: Outcome,
    pub(super) action: Option<Action>,
    /// Dword 10 of the command that started it.
    pub(super) cdw10: u32,
    /// It failed, and the host has left that state (Exit Failure Mode).
    #[serde(default)]
    pub(super) left: bool,
}

/// How the last sanitize operation went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    #[default]
    Never,
    Completed,
    InProgress,
    Failed,
}

impl Outcome {
    fn of(ok: bool) -> Self {
        if ok {
            Outcome::Completed
        } else {
            Outcome::Failed
        }
    }
}

#[derive(Debug, Default)]
struct State {
    outcome: Outcome,
    action: Option<Action>,
    cdw10: u32,
    left: bool,
}

/// Dword 10: AUSE, a failure may be left without another operation.
const UNRESTRICTED: u32 = 1 << 3;

/// The sanitize state of a subsystem.
#[derive(Debug, Default)]
pub(super) struct Sanitize {
    state: Mutex<State>,
    running: AtomicBool,
    failed: AtomicBool,
    /// Of 65536.
    progress: AtomicU32,
    stop: AtomicBool,
}

impl Sanitize {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// The last one failed, and the host has not left that state.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn begin(&self, action: Action, cdw10: u32) -> bool {
        let mut state = self.state();
        if state.outcome == Outcome::InProgress {
            return false;
        }
        *state = State {
            outcome: Outcome::InProgress,
            action: Some(action),
            cdw10,
            left: false,
        };
        self.progress.store(0, Ordering::Release);
        self.failed.store(false, Ordering::Release);
        self.running.store(true, Ordering::Release);
        true
    }

    /// What there will be to remember once the operation has ended.
    pub(super) fn ended(&self, ok: bool) -> Option<SavedSanitize> {
        let outcome = Outcome::of(ok);
        self.saved().map(|saved| SavedSanitize { outcome, ..saved })
    }

    pub(super) fn end(&self, ok: bool) {
        self.state().outcome = Outcome::of(ok);
        self.failed.store(!ok, Ordering::Release);
        self.running.store(false, Ordering::Release);
    }

    /// The last one failed in restricted completion mode: only another one of that mode ends that.
    pub(super) fn has_failed_restricted(&self) -> bool {
        self.has_failed() && self.state().cdw10 & UNRESTRICTED == 0
    }

    /// Exit Failure Mode; returns whether there is something to remember.
    pub(super) fn leave_failure(&self) -> bool {
        let mut state = self.state();
        let failed = self.failed.swap(false, Ordering::AcqRel);
        state.left |= failed;
        failed
    }

    /// Takes over what sidecars remember; returns what has to be done again.
    pub(super) fn restore(&self, saved: SavedSanitize) -> Option<(Action, u32)> {
        let mut state = self.state();
        if saved.outcome == Outcome::InProgress || state.outcome == Outcome::Never {
            *state = State {
                outcome: saved.outcome,
                action: saved.action,
                cdw10: saved.cdw10,
                left: saved.left,
            };
            let failed = saved.outcome == Outcome::Failed && !saved.left;
            self.failed.store(failed, Ordering::Release);
        }
        if saved.outcome != Outcome::InProgress {
            return None;
        }
        state.outcome = Outcome::Never;
        Some((saved.action?, saved.cdw10))
    }

    pub(super) fn saved(&self) -> Option<SavedSanitize> {
        let state = self.state();
        (state.outcome != Outcome::Never).then_some(SavedSanitize {
            outcome: state.outcome,
            action: state.action,
            cdw10: state.cdw10,
            left: state.left,
        })
    }

    /// Ends a run soon, as if the power had failed: it goes on at the next start.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Log page 81h: progress, status, dword 10, and that there are no estimates.
    pub(super) fn log(&self) -> [u8; 512] {
        let mut page = [0; 512];
        let state = self.state();
        let progress = if state.outcome == Outcome::InProgress {
            self.progress.load(Ordering::Acquire).min(0xffff) as u16
        } else {
            0xffff
        };
        let passes = match state.action {
            Some(Action::Overwrite { passes, .. }) if state.outcome == Outcome::Completed => {
                u16::from(passes & 31)
            }
            _ => 0,
        };
        let status = match state.outcome {
            Outcome::Never => 0,
            Outcome::Completed => 1,
            Outcome::InProgress => 2,
            Outcome::Failed => 3,
        };
        page[..2].copy_from_slice(&progress.to_le_bytes());
        page[2..4].copy_from_slice(&(status | passes << 3).to_le_bytes());
        page[4..8].copy_from_slice(&state.cdw10.to_le_bytes());
        // No estimate for any kind of operation.
        page[8..32].fill(0xff);
        page
    }

    /// Erases a whole disk, which is `share` (first and number) of the 65536 parts of the operation; false
    /// if it was stopped before the end.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn erase(
        &self,
        disk: &dyn AsyncDiskFile,
        action: Action,
        share: (u64, u64),
    ) -> block::Result<bool> {
        erase(disk, action, &|| self.is_stopped(), &mut |done| {
            self.show(share.0 + u64::from(done) * share.1 / 0x1_0000);
        })
    }

    fn show(&self, progress: u64) {
        let progress = u32::try_from(progress.min(0xfffe)).unwrap_or(0xfffe);
        self.progress.store(progress, Ordering::Release);
    }
}
