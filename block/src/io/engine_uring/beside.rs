//! What an io_uring engine does beside its ring: writes that the file system cannot try, by a thread,
//! and page-cached reads that are alone, at once.

use std::sync::Arc;

use super::UringEngine;
use crate::io::{
    HostOp, Started, Token,
    uring_entry::{Kind, Target, read_entry},
    uring_lone::Lone,
    uring_writer::{Write, Writer},
};

impl UringEngine {
    pub(super) fn completions_at_hand(&mut self) -> bool {
        let written = self.writer.as_ref().is_some_and(Writer::has_results);
        written || self.lone.has_results() || !self.ring.completion().is_empty()
    }

    /// Hands over what does not go through the ring.
    pub(super) fn submit_beside(&mut self) {
        if let Some(writer) = &mut self.writer {
            if writer.try_lone(self.unfinished == 1) {
                if self.announced.get() {
                    self.notifier.signal();
                }
            } else {
                writer.submit();
            }
        }
        if let Some(read) = self.lone.try_held() {
            self.push_lone(&read);
        }
    }

    /// Lets the ring do a read that was held.
    pub(super) fn push_lone(&mut self, read: &Lone) {
        self.batch += 1;
        // SAFETY: whoever started the read keeps its segments.
        let segments = unsafe { &*read.segments };
        let result = match read_entry(read.target, &self.memory, read.offset, segments) {
            Ok(entry) => {
                let entry = entry.user_data(u64::from(read.slot));
                // SAFETY: whoever started the read keeps its memory.
                match unsafe { self.push(&entry) } {
                    true => return,
                    false => -libc::EAGAIN,
                }
            }
            Err(result) => result,
        };
        self.lone.failed(read.slot, result);
    }

    /// A read that is the first of its batch is held; the second operation brings it into the ring.
    ///
    /// # Safety
    /// As for [`Engine::start`].
    pub(super) unsafe fn hold(&mut self, op: &HostOp<'_>, slot: u32, target: Target) -> bool {
        let HostOp::Read {
            file,
            offset,
            segments,
        } = *op
        else {
            return false;
        };
        let Some(known) = self.files.get(file) else {
            return false;
        };
        if self.batch > 0 || self.announced.get() || !known.cached || !self.lone.wants() {
            return false;
        }
        let (fd, unit) = (known.fd, known.unit);
        // SAFETY: the caller keeps segments and memory.
        unsafe {
            self.lone.hold(Lone {
                slot,
                fd,
                unit,
                offset,
                segments,
                target,
            });
        }
        true
    }

    /// Starts a write on the thread beside the ring.
    ///
    /// # Safety
    /// As for [`Engine::start`].
    pub(super) unsafe fn start_on_writer(&mut self, token: Token, op: &HostOp<'_>) -> Started {
        let HostOp::Write {
            file,
            offset,
            segments,
            ..
        } = *op
        else {
            return Started::Done(-libc::EINVAL);
        };
        let (Some(writer), Some(known)) = (&mut self.writer, self.files.get(file)) else {
            return Started::Done(-libc::EBADF);
        };
        let Some(index) = self.free.pop() else {
            return Started::Full;
        };
        let write = Write {
            slot: index,
            file: Arc::clone(&known.file),
            unit: known.unit,
            offset,
            segments,
        };
        // SAFETY: the caller keeps segments and memory.
        unsafe { writer.start(write) };
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.kind = Kind::File;
        self.unfinished += 1;
        Started::Pending
    }

    /// Takes what was done beside the ring; returns how many operations ended.
    pub(super) fn drain_beside(&mut self, out: &mut Vec<(Token, i32)>) -> usize {
        if let Some(writer) = &self.writer {
            writer.take(&mut self.beside);
        }
        self.lone.take(&mut self.beside);
        let ended = self.beside.len();
        for (index, result) in self.beside.drain(..) {
            out.push((self.slots[index as usize].token, result));
            self.free.push(index);
        }
        self.unfinished -= ended;
        ended
    }
}
