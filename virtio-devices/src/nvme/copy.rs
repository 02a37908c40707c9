//! Copy: data moves inside a namespace, through memory of ours in pieces.

use block::io::{AlignedBuf, Buffers, RequestOp};

use super::{
    Namespace, Status,
    command::{Command, le32, le64},
    pieces::CopyState,
    queues::NvmeQueues,
    request::check_marks,
    slot::Step,
};
use crate::{MemorySource, memory::BatchMemory, stats::Op, worker::Batch};

/// MSRC: the most source ranges.
pub(super) const MAX_RANGES: u32 = 128;
/// MSSRL: the most blocks of a source range.
pub(super) const MAX_RANGE_BLOCKS: u16 = 4096;
/// MCL: the most blocks in all.
pub(super) const MAX_BLOCKS: u32 = 65536;

/// Bytes of a source range entry of descriptor format 0.
const ENTRY: u64 = 32;

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn start_copy(
        &mut self,
        index: u32,
        _place: usize,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let count = (command.cdw12() & 0xff) + 1;
        if command.cdw12() >> 8 & 15 != 0 {
            // Only descriptor format 0, as Identify says.
            return Err(Status::INVALID_FIELD);
        }
        if count > MAX_RANGES {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let bytes = self.read_data(index, command, u64::from(count) * ENTRY, guest)?;
        self.slots[index].data.clear();
        let mut sources = std::collections::VecDeque::with_capacity(count as usize);
        let mut blocks = 0;
        for entry in bytes.chunks_exact(ENTRY as usize) {
            let slba = le64(entry, 8);
            let range = (le32(entry, 16) & 0xffff) + 1;
            if range > u32::from(MAX_RANGE_BLOCKS) {
                return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
            }
            blocks += range;
            sources.push_back(
                namespace
                    .range(slba, u64::from(range))
                    .ok_or(Status::LBA_OUT_OF_RANGE)?,
            );
        }
        if blocks > MAX_BLOCKS {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let (to, len) = namespace
            .range(command.slba(), u64::from(blocks))
            .ok_or(Status::LBA_OUT_OF_RANGE)?;
        for (offset, len) in &sources {
            check_marks(namespace, *offset, *len)?;
        }
        if !self.enter(index, namespace) {
            return Ok(());
        }
        namespace.mark(|marks| marks.clear(to, len));
        self.slots[index].op = Op::Other;
        self.slots[index].bytes = len;
        let copy = Box::new(CopyState {
            sources,
            to,
            writing: false,
        });
        self.read_source(index, copy, batch);
        Ok(())
    }

    fn read_source(&mut self, index: u32, mut copy: Box<CopyState>, batch: &mut Batch) {
        let Some((offset, len)) = copy.piece() else {
            let flush = self.slots[index].command.cdw12() & 1 << 30 != 0
                || self
                    .core
                    .hot
                    .write_through
                    .load(std::sync::atomic::Ordering::Relaxed);
            if flush {
                self.push_more(index, RequestOp::Flush, batch);
            } else {
                self.end(index, Status::SUCCESS);
            }
            return;
        };
        copy.writing = false;
        self.slots[index].step = Step::Copy(copy);
        let buffers = Buffers::owned(AlignedBuf::zeroed(len as usize));
        self.push_more(index, RequestOp::Read { offset, buffers }, batch);
    }

    /// A piece was read, or written.
    pub(super) fn next_copy(
        &mut self,
        index: u32,
        mut copy: Box<CopyState>,
        buffers: Option<Buffers>,
        batch: &mut Batch,
    ) {
        let status = self.slots[index].status;
        let Some(buffers) = buffers.filter(|_| status.is_success()) else {
            let failed = if status.is_success() {
                Status::INTERNAL_ERROR
            } else {
                status
            };
            self.end(index, failed);
            return;
        };
        if copy.writing {
            copy.step(buffers.len());
            self.read_source(index, copy, batch);
            return;
        }
        copy.writing = true;
        let offset = copy.to;
        self.slots[index].step = Step::Copy(copy);
        let op = RequestOp::Write {
            offset,
            buffers,
            fua: false,
        };
        self.push_more(index, op, batch);
    }
}
