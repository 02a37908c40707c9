//! One guest for many tests: booting takes seconds, plugging a device into a running guest takes a moment.

use std::ops::{Deref, DerefMut};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::machine::Guest;

static SHARED: Mutex<Option<Guest>> = Mutex::new(None);

/// The shared guest, for one test at a time. A test that fails takes the guest with it; the next one gets a new one.
#[derive(Debug)]
pub(crate) struct SharedGuest {
    place: MutexGuard<'static, Option<Guest>>,
    finished: bool,
}

impl SharedGuest {
    /// Waits for the guest, and boots one if there is none, or none with room for `slots` more devices.
    #[track_caller]
    pub(crate) fn get(slots: usize) -> Self {
        let mut place = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(guest) = place.take_if(|guest| guest.free_slots() < slots) {
            guest.kill();
        }
        if place.is_none() {
            *place = Some(boot());
        }
        Self {
            place,
            finished: false,
        }
    }

    /// The test is over: expects that the kernel has seen no trouble, and leaves the guest to the next test.
    #[track_caller]
    pub(crate) fn done(mut self) {
        self.expect_no_trouble();
        self.finished = true;
    }
}

/// A child is killed when the thread ends that made it, and a test's thread ends with the test.
fn boot() -> Guest {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        if sender.send(Guest::builder().fio().boot()).is_ok() {
            loop {
                thread::park();
            }
        }
    });
    receiver.recv().expect("the guest boots")
}

impl Deref for SharedGuest {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        self.place.as_ref().expect("a guest, while it is used")
    }
}

impl DerefMut for SharedGuest {
    fn deref_mut(&mut self) -> &mut Guest {
        self.place.as_mut().expect("a guest, while it is used")
    }
}

impl Drop for SharedGuest {
    fn drop(&mut self) {
        if !self.finished
            && let Some(guest) = self.place.take()
        {
            guest.kill();
        }
    }
}
