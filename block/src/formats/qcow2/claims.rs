//! Claims: writes that need the same clusters meet here, and the second waits for the first.

use std::sync::Mutex;

use crate::sync::{Notify, lock};

/// Runs of numbers (guest clusters, L1 indices) that one task each is working on.
#[derive(Debug, Default)]
pub(super) struct Claims {
    held: Mutex<Vec<(u64, u64)>>,
    changed: Notify,
}

/// A run that is claimed until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    run: (u64, u64),
}

impl Claims {
    /// Waits until no other claim overlaps `first..end`, and claims all of it at once.
    pub(super) async fn claim(&self, first: u64, end: u64) -> Claim<'_> {
        self.changed
            .until(|| {
                let mut held = lock(&self.held);
                let free = held
                    .iter()
                    .all(|(other, other_end)| *other_end <= first || end <= *other);
                if free {
                    held.push((first, end));
                }
                free.then_some(())
            })
            .await;
        Claim {
            claims: self,
            run: (first, end),
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.claims.held);
        if let Some(place) = held.iter().position(|run| *run == self.run) {
            held.swap_remove(place);
        }
        drop(held);
        self.claims.changed.notify_all();
    }
}
