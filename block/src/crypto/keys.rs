//! What can be done to the passwords of an encrypted image.

use std::time::Duration;

use super::Secret;

/// A change of the passwords of an encrypted image.
#[derive(Clone, Debug)]
pub enum KeyChange {
    /// Adds a password.
    Add {
        /// The password.
        new: Secret,
        /// The key slot; the first free one otherwise.
        slot: Option<usize>,
        /// How long trying it should take.
        iter_time: Duration,
        /// Take the slot even if it has a password.
        force: bool,
    },
    /// Removes passwords: every slot that has the password `old`, or `slot`, or `slot` if it has
    /// that password. At least one of the two is needed.
    Erase {
        /// The password.
        old: Option<Secret>,
        /// The key slot.
        slot: Option<usize>,
        /// Even where no password is left then: the data is lost.
        force: bool,
    },
}

/// What is given to open an encrypted image.
#[derive(Clone, Debug, Default)]
pub(crate) enum Unlock {
    /// Nothing: it does not open.
    #[default]
    Nothing,
    /// Its secret.
    With(Secret),
    /// It stays locked: its header can be seen, its data neither read nor written.
    Locked,
}
