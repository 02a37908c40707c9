//! Host work that has no asynchronous form: a thread that does one thing after the other.

use std::{
    sync::mpsc::{Sender, channel},
    thread::{self, JoinHandle},
};

type Job = Box<dyn FnOnce() + Send>;

/// A thread and what it still has to do. Dropping it waits until everything is done.
#[derive(Debug)]
pub(crate) struct Jobs {
    sender: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Jobs {
    /// Starts the thread.
    pub(crate) fn start(name: &str) -> std::io::Result<Self> {
        let (sender, jobs) = channel::<Job>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for job in jobs {
                    job();
                }
            })?;
        Ok(Self {
            sender: Some(sender),
            thread: Some(thread),
        })
    }

    /// Adds something to do.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(sender) = &self.sender {
            // The thread ends only when the sender is gone.
            let _ = sender.send(Box::new(job));
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        drop(self.sender.take());
        if let Some(thread) = self.thread.take() {
            // A job that holds the last handle on its own thread must not wait for it.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread for host work panicked");
            }
        }
    }
}
