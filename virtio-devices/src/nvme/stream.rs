//! Commands whose data passes through memory of ours in pieces: Compare, Verify, and reads into
//! scatter gather lists with bit buckets.

use block::io::{AlignedBuf, Buffers, RequestOp};

use super::{
    Namespace, Status,
    command::Command,
    data,
    opcode::io as opcode,
    pieces::{Stream, StreamKind},
    queues::NvmeQueues,
    request::{check_marks, checked_range},
    slot::Step,
};
use crate::{MemorySource, memory::BatchMemory, stats::Op, worker::Batch};

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn start_stream(
        &mut self,
        index: u32,
        _place: usize,
        namespace: &Namespace,
        command: &Command,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        let kind = if command.opcode == opcode::COMPARE {
            StreamKind::Compare
        } else {
            StreamKind::Verify
        };
        let (offset, len) = match kind {
            StreamKind::Verify => checked_range(namespace, command)?,
            _ => self.transfer(namespace, command)?,
        };
        check_marks(namespace, offset, len)?;
        if kind == StreamKind::Compare {
            self.map_data(index, command, len, false, guest)?;
        }
        self.run_stream(index, Stream::new(kind, offset, len), batch)
    }

    /// Reads the first piece.
    pub(super) fn run_stream(
        &mut self,
        index: u32,
        stream: Stream,
        batch: &mut Batch,
    ) -> Result<(), Status> {
        if stream.kind != StreamKind::Scatter {
            // Not the guest's reads: it gets nothing.
            self.slots[index].op = Op::Other;
            self.slots[index].bytes = stream.len;
        }
        let buffers = Buffers::owned(AlignedBuf::zeroed(stream.piece() as usize));
        self.read_piece(index, Box::new(stream), buffers, batch);
        Ok(())
    }

    fn read_piece(&mut self, index: u32, stream: Box<Stream>, buffers: Buffers, batch: &mut Batch) {
        let offset = stream.offset + stream.done;
        self.slots[index].step = Step::Stream(stream);
        self.push_more(index, RequestOp::Read { offset, buffers }, batch);
    }

    /// A piece was read.
    pub(super) fn next_chunk(
        &mut self,
        index: u32,
        mut stream: Box<Stream>,
        buffers: Option<Buffers>,
        batch: &mut Batch,
    ) {
        let status = self.slots[index].status;
        let buffer = buffers.and_then(Buffers::into_owned);
        let Some(mut buffer) = buffer.filter(|_| status.is_success()) else {
            let read = Status::of_disk(block::ErrorKind::Io(libc::EIO), false);
            let write_fault = status == Status::WRITE_FAULT || status.is_success();
            self.end(index, if write_fault { read } else { status });
            return;
        };
        let piece = stream.piece();
        let bytes = &mut buffer[..piece as usize];
        let memory = &*self.memory;
        let segments = &self.slots[index].data;
        let result = match stream.kind {
            StreamKind::Verify => Ok(()),
            StreamKind::Scatter => data::scatter(memory, segments, stream.done, bytes),
            StreamKind::Compare => {
                let mut wanted = vec![0; bytes.len()];
                data::gather(memory, segments, stream.done, &mut wanted).and_then(|()| {
                    if *bytes == *wanted {
                        Ok(())
                    } else {
                        Err(Status::COMPARE_FAILURE)
                    }
                })
            }
        };
        stream.done += piece;
        match result {
            Err(status) => self.end(index, status),
            Ok(()) if stream.done == stream.len => self.end(index, Status::SUCCESS),
            Ok(()) => {
                let next = stream.piece() as usize;
                let buffers = if next == buffer.len() {
                    Buffers::owned(buffer)
                } else {
                    Buffers::owned(AlignedBuf::zeroed(next))
                };
                self.read_piece(index, stream, buffers, batch);
            }
        }
    }
}
