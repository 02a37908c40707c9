//! The corners of the qcow2 data path and of the protocol between queues, each forced by a test.

#![allow(clippy::unwrap_used)]

mod allocation;
mod faults;
mod growth;
mod queues;
mod resizes;
mod snapshots;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use block::{
    AsyncDiskFile, CacheMode, Disk, DiskFile, ErrorKind, Format, OpenOptions,
    formats::qcow2::{
        check::{CheckReport, Repair, check},
        create::{CreateOptions, Preallocation, create},
        header::Header,
    },
    io::{
        AlignedBuf, AsyncIo, Buffers, Host, Request, RequestOp,
        sim::{SimConfig, SimHost, SimOp},
    },
    offline::{OfflineOptions, with_file_on},
};

const IMAGE: &str = "disk.qcow2";

/// Runs a test that may hang.
fn within<T: Send + 'static>(seconds: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(Duration::from_secs(seconds)) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(worker.join().unwrap_err())
        }
    }
}

fn host() -> SimHost {
    SimHost::new(SimConfig::seeded(1))
}

fn make(host: &SimHost, options: &CreateOptions) {
    let host: Arc<dyn Host> = Arc::new(host.clone());
    with_file_on(
        host,
        Path::new(IMAGE),
        OfflineOptions::create(),
        async |io, file| create(io, file, options).await,
    )
    .unwrap();
}

fn small_clusters(size: u64, refcount_bits: u32) -> CreateOptions {
    CreateOptions {
        size,
        cluster_size: 512,
        refcount_bits,
        ..CreateOptions::default()
    }
}

fn open(host: &SimHost) -> Disk {
    OpenOptions::new()
        .open_on(IMAGE, Arc::new(host.clone()))
        .unwrap()
}

fn report(host: &SimHost) -> (CheckReport, Vec<String>) {
    let host: Arc<dyn Host> = Arc::new(host.clone());
    let mut lines = Vec::new();
    let report = with_file_on(
        host,
        Path::new(IMAGE),
        OfflineOptions::read(),
        async |io, file| {
            let mut header = Header::read_for_check(io, file).await?;
            check(io, file, &mut header, Repair::None, &mut |line| {
                lines.push(line.to_owned());
            })
            .await
        },
    )
    .unwrap();
    (report, lines)
}

fn assert_clean(host: &SimHost) {
    let (report, lines) = report(host);
    assert!(report.is_clean(), "{lines:#?}");
}

fn read(disk: &dyn DiskFile, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len];
    disk.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// Bytes that do not repeat.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            z ^= z << 13;
            z ^= z >> 7;
            z ^= z << 17;
            z as u8
        })
        .collect()
}

/// Submits one request; its id is given back by the completion.
fn submit(io: &mut dyn AsyncIo, id: u64, op: RequestOp) {
    assert_eq!(io.submit(&mut vec![Request { id, op }]), 1);
}

fn write_op(offset: u64, bytes: &[u8], fua: bool) -> RequestOp {
    RequestOp::Write {
        offset,
        buffers: Buffers::owned(AlignedBuf::from_slice(bytes)),
        fua,
    }
}

fn read_op(offset: u64, len: usize) -> RequestOp {
    RequestOp::Read {
        offset,
        buffers: Buffers::owned(AlignedBuf::zeroed(len)),
    }
}

/// Moves queues on until all is done; returns what they completed: id, result, bytes.
fn finish(host: &SimHost, queues: &mut [&mut Box<dyn AsyncIo>]) -> Vec<(u64, bool, Vec<u8>)> {
    let mut out = Vec::new();
    for _ in 0..1_000_000 {
        for queue in &mut *queues {
            queue.reap(&mut out);
        }
        if queues.iter().all(|queue| queue.in_flight() == 0) {
            return out
                .into_iter()
                .map(|done| {
                    let bytes = done.buffers.and_then(Buffers::into_owned);
                    let bytes = bytes.map(|bytes| bytes.to_vec()).unwrap_or_default();
                    (done.id, done.result.is_ok(), bytes)
                })
                .collect();
        }
        let _ = host.step();
    }
    panic!("hangs");
}

fn qemu(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
