//! A request that hits the map allocates nothing, once the vectors of its queue have grown.

#![allow(clippy::unwrap_used)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    path::Path,
};

use block::{
    AsyncDiskFile, DiskFile, Format, OpenOptions,
    formats::qcow2::create::{CreateOptions, create},
    io::{AlignedBuf, AsyncIo, Buffers, Completion, Request, RequestOp},
    offline::{self, OfflineOptions},
};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SIZE: u64 = 8 << 20;
const DEPTH: u64 = 32;

/// The allocations of this thread while `rounds` full batches go through the queue.
fn run(io: &mut dyn AsyncIo, spare: &mut Vec<Buffers>, write: bool, rounds: u64) -> usize {
    let mut batch: Vec<Request> = Vec::with_capacity(DEPTH as usize);
    let mut out: Vec<Completion> = Vec::with_capacity(DEPTH as usize);
    let before = ALLOCATIONS.get();
    for round in 0..rounds {
        while let Some(buffers) = spare.pop() {
            let id = spare.len() as u64;
            let offset = (round * DEPTH + id) * 77 % (SIZE / 4096) * 4096;
            let op = if write {
                RequestOp::Write {
                    offset,
                    buffers,
                    fua: false,
                }
            } else {
                RequestOp::Read { offset, buffers }
            };
            batch.push(Request { id, op });
        }
        io.submit(&mut batch);
        while io.in_flight() > 0 {
            io.wait(None).unwrap();
            io.reap(&mut out);
            for completion in out.drain(..) {
                completion.result.unwrap();
                spare.extend(completion.buffers);
            }
        }
    }
    ALLOCATIONS.get() - before
}

fn check(path: &Path, format: Format, direct: bool) {
    let disk = OpenOptions::new()
        .format(format)
        .direct(direct)
        .open_disk(path)
        .unwrap();
    let data = AlignedBuf::from_slice(&vec![7; 1 << 20]);
    for offset in (0..SIZE).step_by(data.len()) {
        disk.write_at(&data, offset).unwrap();
    }
    let mut io = disk.create_async_io(DEPTH as u32).unwrap();
    let mut spare: Vec<Buffers> = (0..DEPTH)
        .map(|_| Buffers::owned(AlignedBuf::zeroed(4096)))
        .collect();
    for write in [false, true] {
        // Enough to look at every table and to fill every vector.
        run(&mut *io, &mut spare, write, 80);
        let allocations = run(&mut *io, &mut spare, write, 80);
        assert_eq!(
            allocations,
            0,
            "{format}, direct {direct}, write {write}, {} requests",
            80 * DEPTH
        );
    }
}

#[test]
fn a_warm_request_allocates_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for direct in [false, true] {
        let raw = dir.path().join("raw");
        std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
        check(&raw, Format::Raw, direct);
        let qcow2 = dir.path().join("qcow2");
        let options = CreateOptions {
            size: SIZE,
            ..CreateOptions::default()
        };
        offline::with_file(&qcow2, OfflineOptions::create(), async |io, file| {
            create(io, file, &options).await
        })
        .unwrap();
        check(&qcow2, Format::Qcow2, direct);
    }
}
