//! Raw disks through synchronous calls and through queues.

#![allow(clippy::unwrap_used)]

use block::{
    AsyncDiskFile, DiskFile, ErrorKind, OpenOptions,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, EngineKind, Request, RequestOp},
};
use std::{fs, path::PathBuf, time::Duration};

/// An image file on a disk file system, gone when dropped.
struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image(name: &str, content: &[u8]) -> Image {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    Image { _dir: dir, path }
}

fn engines() -> impl Iterator<Item = (EngineKind, OpenOptions)> {
    EngineKind::ALL.into_iter().map(|kind| {
        let options = OpenOptions::new()
            .engine(kind)
            .direct(kind == EngineKind::LinuxAio);
        (kind, options)
    })
}

fn run(io: &mut dyn AsyncIo, op: RequestOp) -> Completion {
    let mut batch = vec![Request { id: 7, op }];
    assert_eq!(io.submit(&mut batch), 1);
    let mut out = Vec::new();
    while out.is_empty() {
        io.wait(Some(Duration::from_secs(10))).unwrap();
        io.reap(&mut out);
    }
    assert_eq!(out.len(), 1);
    out.remove(0)
}

#[test]
fn synchronous_calls_move_any_bytes() {
    let image = image("a.raw", &[0; 8192]);
    let disk = OpenOptions::new().open(&image.path).unwrap();
    assert_eq!(disk.size(), 8192);
    disk.write_at(b"hello", 511 + 512).unwrap();
    let mut buf = [0; 7];
    disk.read_at(&mut buf, 510 + 512).unwrap();
    assert_eq!(&buf, b"\0hello\0");
    disk.flush().unwrap();
    let error = disk.read_at(&mut buf, 8190).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    assert!(error.to_string().contains("8192"), "{error}");
}

#[test]
fn every_engine_drives_a_queue() {
    for (kind, options) in engines() {
        let image = image("a.raw", &[0; 1 << 20]);
        let disk = options.open(&image.path).unwrap();
        let mut io = disk.create_async_io(32).unwrap();
        let buffers = Buffers::owned(AlignedBuf::from_slice(&[0x5a; 4096]));
        let written = run(
            &mut *io,
            RequestOp::Write {
                offset: 8192,
                buffers,
                fua: true,
            },
        );
        assert_eq!(written.result, Ok(()), "{kind}");
        assert_eq!(run(&mut *io, RequestOp::Flush).result, Ok(()), "{kind}");
        let read = run(
            &mut *io,
            RequestOp::Read {
                offset: 4096,
                buffers: Buffers::owned(AlignedBuf::zeroed(12288)),
            },
        );
        assert_eq!(read.result, Ok(()), "{kind}");
        let bytes = read.buffers.unwrap().into_owned().unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 0), "{kind}");
        assert!(bytes[4096..8192].iter().all(|b| *b == 0x5a), "{kind}");
        let zeroed = run(
            &mut *io,
            RequestOp::WriteZeroes {
                offset: 8192,
                len: 512,
                may_unmap: true,
            },
        );
        assert_eq!(zeroed.result, Ok(()), "{kind}");
        drop(io);
        let mut back = [1; 1024];
        disk.read_at(&mut back, 8192).unwrap();
        assert!(back[..512].iter().all(|b| *b == 0), "{kind}");
        assert!(back[512..].iter().all(|b| *b == 0x5a), "{kind}");
    }
}

#[test]
fn a_truncated_file_fails_reads_and_nothing_else() {
    for (kind, options) in engines() {
        let image = image("a.raw", &[1; 1 << 16]);
        let disk = options.open(&image.path).unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&image.path)
            .unwrap();
        file.set_len(4096).unwrap();
        let mut io = disk.create_async_io(4).unwrap();
        let read = |offset| RequestOp::Read {
            offset,
            buffers: Buffers::owned(AlignedBuf::zeroed(4096)),
        };
        assert_eq!(run(&mut *io, read(0)).result, Ok(()), "{kind}");
        let short = run(&mut *io, read(8192)).result;
        assert_eq!(short, Err(ErrorKind::ShortTransfer), "{kind}");
        assert_eq!(run(&mut *io, read(0)).result, Ok(()), "{kind}");
    }
}

#[test]
fn a_guessed_raw_disk_does_not_become_an_image() {
    let image = image("a.raw", &[0; 1 << 16]);
    let guessed = OpenOptions::new().open(&image.path).unwrap();
    guessed.write_at(b"QFI", 0).unwrap();
    let refused = guessed.write_at(b"\xfb", 3).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied);
    let refused = guessed.write_at(b"conectix", (1 << 16) - 512).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied);
    guessed.write_at(b"conectix", 4096).unwrap();
    drop(guessed);
    let named = block::RawSync::open(&image.path, &OpenOptions::new()).unwrap();
    named.write_at(b"\xfb", 3).unwrap();
}

#[test]
fn a_writer_excludes_others() {
    let image = image("a.raw", &[0; 4096]);
    let writer = OpenOptions::new().open(&image.path).unwrap();
    let error = OpenOptions::new().open(&image.path).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("a.raw"), "{error}");
    let reader = OpenOptions::new().read_only(true);
    assert!(reader.open(&image.path).is_err());
    assert!(reader.clone().force_share(true).open(&image.path).is_ok());
    drop(writer);
    let first = reader.open(&image.path).unwrap();
    let second = reader.open(&image.path).unwrap();
    assert!(OpenOptions::new().open(&image.path).is_err());
    drop((first, second));
    assert!(OpenOptions::new().open(&image.path).is_ok());
}

#[test]
fn a_blocking_call_that_would_wait_for_itself_is_refused() {
    let image = image("a.raw", &[0; 4096]);
    let disk = OpenOptions::new()
        .engine(EngineKind::Sync)
        .open(&image.path)
        .unwrap();
    let mut io = disk.create_async_io(4).unwrap();
    let mut batch = vec![Request {
        id: 1,
        op: RequestOp::Flush,
    }];
    io.submit(&mut batch);
    let mut byte = [0];
    let error = disk.read_at(&mut byte, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
    let mut out = Vec::new();
    io.reap(&mut out);
    disk.read_at(&mut byte, 0).unwrap();
}

#[test]
fn requests_wait_while_the_disk_is_drained() {
    let image = image("a.raw", &[0; 4096]);
    let disk = OpenOptions::new()
        .engine(EngineKind::Sync)
        .open_disk(&image.path)
        .unwrap();
    let mut io = disk.create_async_io(4).unwrap();
    let guard = disk.drain().unwrap();
    let mut batch = vec![Request {
        id: 1,
        op: RequestOp::Flush,
    }];
    assert_eq!(io.submit(&mut batch), 1);
    let mut out = Vec::new();
    assert_eq!(io.reap(&mut out), 0);
    drop(guard);
    assert!(io.wait(Some(Duration::from_secs(10))).unwrap());
    assert_eq!(io.reap(&mut out), 1);
    assert_eq!(out[0].result, Ok(()));
}

/// Whether a descriptor is readable, or becomes so in that many milliseconds.
fn is_readable(fd: std::os::fd::BorrowedFd<'_>, milliseconds: i32) -> bool {
    use std::os::fd::AsRawFd;
    let mut list = [libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    // SAFETY: an array of one entry, which outlives the call.
    unsafe { libc::poll(list.as_mut_ptr(), 1, milliseconds) == 1 }
}

#[test]
fn a_queue_is_told_of_what_another_of_its_thread_has_found() {
    for (kind, options) in engines() {
        let image = image("a.raw", &[7; 1 << 16]);
        let disk = options.open(&image.path).unwrap();
        let mut first = disk.create_async_io(4).unwrap();
        let mut second = disk.create_async_io(4).unwrap();
        let mut out = Vec::new();
        // Asked for before anything is started; what that announced is taken away.
        let _ = (first.notifier(), second.notifier());
        second.reap(&mut out);
        let buffers = Buffers::owned(AlignedBuf::zeroed(4096));
        let op = RequestOp::Read { offset: 0, buffers };
        assert_eq!(first.submit(&mut vec![Request { id: 1, op }]), 1);
        assert!(is_readable(first.notifier(), 10_000), "{kind}");
        // Both have one engine: this finds the completion, and it is not its own.
        assert_eq!(second.reap(&mut out), 0, "{kind}");
        assert!(is_readable(first.notifier(), 0), "{kind}");
        assert_eq!(first.reap(&mut out), 1, "{kind}");
        assert_eq!(out[0].result, Ok(()), "{kind}");
    }
}

#[test]
fn a_queue_waits_for_others_of_its_thread() {
    for (kind, options) in engines() {
        let image = image("a.raw", &[7; 1 << 16]);
        let disk = options.open(&image.path).unwrap();
        let mut first = disk.create_async_io(4).unwrap();
        let mut second = disk.create_async_io(4).unwrap();
        assert!(first.sleeps_in().is_some(), "{kind}");
        assert_eq!(first.sleeps_in(), second.sleeps_in(), "{kind}");
        let mut out = Vec::new();
        for id in 0..3 {
            let buffers = Buffers::owned(AlignedBuf::zeroed(4096));
            let op = RequestOp::Read { offset: 0, buffers };
            assert_eq!(first.submit(&mut vec![Request { id, op }]), 1);
            // Without a limit: it has to end by what the other one has.
            assert!(second.wait_for_any(None).unwrap(), "{kind}");
            assert_eq!(second.reap(&mut out), 0, "{kind}");
            assert!(second.wait_for_any(None).unwrap(), "{kind}: still there");
            assert_eq!(first.reap(&mut out), 1, "{kind}");
            assert_eq!(out.pop().unwrap().result, Ok(()), "{kind}");
        }
        let soon = Some(Duration::from_millis(1));
        assert!(!second.wait_for_any(soon).unwrap(), "{kind}");
    }
}
