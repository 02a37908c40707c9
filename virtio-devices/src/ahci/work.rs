//! The thread that does what a disk asks of its host, and how it tells the port's worker.

use std::sync::{Arc, Mutex};

use block::{AsyncDiskFile, ErrorKind};

use crate::{
    Error, Result,
    ata::{Protection, Work},
    host::Jobs,
    sync::lock,
};

/// The thread of a disk whose data is protected. Dropping it ends what it does, as a power failure would.
pub(super) struct HostWork {
    protection: Arc<Protection>,
    jobs: Jobs,
}

impl HostWork {
    /// Starts the thread, and goes on with a sanitize operation that was interrupted.
    pub(super) fn start(
        protection: Arc<Protection>,
        disk: &Arc<dyn AsyncDiskFile>,
    ) -> Result<Self> {
        let work = Self {
            protection,
            jobs: Jobs::start("ata-host").map_err(|source| Error::Descriptor {
                what: "a thread for host work",
                source,
            })?,
        };
        work.resume(disk);
        Ok(work)
    }

    /// Goes on with a sanitize operation, if the sidecar says that one was interrupted.
    pub(super) fn resume(&self, disk: &Arc<dyn AsyncDiskFile>) {
        let (protection, disk) = (Arc::clone(&self.protection), Arc::clone(disk));
        self.jobs.run(move || protection.sanitize(&*disk));
    }

    /// Whether a sanitize operation runs.
    pub(super) fn runs_sanitize(&self) -> bool {
        self.protection.runs_sanitize()
    }

    /// Nobody waits for what a command has begun.
    pub(super) fn cancel(&self) {
        self.protection.cancel();
    }

    /// Does something for a command.
    pub(super) fn run(
        &self,
        work: Work,
        disk: Arc<dyn AsyncDiskFile>,
        answer: impl FnOnce(std::result::Result<(), ErrorKind>) + Send + 'static,
    ) {
        let protection = Arc::clone(&self.protection);
        self.jobs.run(move || work.run(&protection, &*disk, answer));
    }
}

impl Drop for HostWork {
    fn drop(&mut self) {
        // The thread is waited for next.
        self.protection.power_off();
    }
}

/// What the thread has done: the id of the request, and what came of it.
pub(super) type Answer = (u64, std::result::Result<(), ErrorKind>);

/// Answers for a port's worker.
#[derive(Debug, Default)]
pub(super) struct Mail(Mutex<Vec<Answer>>);

impl Mail {
    pub(super) fn send(&self, answer: Answer) {
        lock(&self.0).push(answer);
    }

    pub(super) fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut *lock(&self.0))
    }
}
