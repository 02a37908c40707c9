//! Hooks: what wants to see every change of a disk, such as a dirty bitmap or a mirror.

use std::sync::{
    Arc, RwLock,
    atomic::{AtomicBool, Ordering},
};

use crate::{ErrorKind, GuestRange};

/// A change of guest-visible data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Data is written.
    Write(GuestRange),
    /// A range is discarded.
    Discard(GuestRange),
    /// A range becomes zeroes.
    WriteZeroes(GuestRange),
}

/// Sees every change, whether it hit the map or went through a task. Called on the queue's thread:
/// it must not block.
pub trait Hook: Send + Sync {
    /// The change is about to start.
    fn begin(&self, mutation: Mutation);

    /// The change ended. After an error the range holds old or new data, or a mix.
    fn end(&self, mutation: Mutation, result: Result<(), ErrorKind>);
}

/// The hooks of a disk. With none attached a request pays one load.
#[derive(Default)]
pub(crate) struct Hooks {
    any: AtomicBool,
    list: RwLock<Vec<Arc<dyn Hook>>>,
}

impl Hooks {
    /// Attaches a hook. The caller drained the disk, so that no change is half seen.
    pub(crate) fn attach(&self, hook: Arc<dyn Hook>) {
        let mut list = self
            .list
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        list.push(hook);
        self.any.store(true, Ordering::Release);
    }

    /// Attaches a hook that may be attached already. The caller drained the disk.
    pub(crate) fn attach_once(&self, hook: Arc<dyn Hook>) {
        let list = self
            .list
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let there = list.iter().any(|other| Arc::ptr_eq(other, &hook));
        drop(list);
        if !there {
            self.attach(hook);
        }
    }

    /// Detaches a hook. The caller drained the disk.
    pub(crate) fn detach(&self, hook: &Arc<dyn Hook>) {
        let mut list = self
            .list
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        list.retain(|other| !Arc::ptr_eq(other, hook));
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    fn each(&self, act: impl Fn(&dyn Hook)) {
        if self.any.load(Ordering::Acquire) {
            let list = self
                .list
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            list.iter().for_each(|hook| act(&**hook));
        }
    }

    pub(crate) fn begin(&self, mutation: Option<Mutation>) {
        if let Some(mutation) = mutation {
            self.each(|hook| hook.begin(mutation));
        }
    }

    pub(crate) fn end(&self, mutation: Option<Mutation>, result: Result<(), ErrorKind>) {
        if let Some(mutation) = mutation {
            self.each(|hook| hook.end(mutation, result));
        }
    }
}
