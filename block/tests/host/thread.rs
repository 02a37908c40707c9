//! `HostDisk`: futures served by a thread.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
    thread,
    time::Duration,
};

use block::{
    AsyncDiskFile, DiskFile, ErrorKind, HostDisk, OpenOptions,
    host::{AlignedBuf, IoBuf, IoBufMut},
};

use crate::{
    executor::{NameOfWaker, Panicking, block_on, join_all, poll_once},
    rig::{pattern, qcow2, raw},
};

fn needs_send<T: Send>(value: T) -> T {
    value
}

#[test]
fn moves_bytes_on_every_engine() {
    for image in [raw(1 << 20), qcow2(1 << 20)] {
        image.each_engine(|disk| {
            let disk = HostDisk::new(disk).unwrap();
            assert_eq!(disk.size(), 1 << 20);
            block_on(needs_send(async {
                let written = disk.write_at(pattern(1, 5000), 3000).await.unwrap();
                disk.flush().await.unwrap();
                let read = disk.read_at(vec![0; 5000], 3000).await.unwrap();
                assert_eq!(read, written);

                disk.write_at(AlignedBuf::from_slice(&[9; 4096]), 65536)
                    .await
                    .unwrap();
                let read = disk.read_at(AlignedBuf::zeroed(8192), 65536).await.unwrap();
                assert!(read[..4096].iter().all(|byte| *byte == 9));

                disk.write_zeroes(3000, 1000, false).await.unwrap();
                disk.discard(65536, 65536).await.unwrap();
                let read = disk.read_at(vec![1; 1000], 3000).await.unwrap();
                assert_eq!(read, [0; 1000]);
                let read = disk.read_at(vec![1; 1000], 4000).await.unwrap();
                assert_eq!(read, pattern(1, 5000)[1000..2000]);

                let shared: Arc<[u8]> = Arc::from([7; 512].as_slice());
                let shared = disk.write_at(shared, 0).await.unwrap();
                disk.write_at(b"static".as_slice(), 512).await.unwrap();
                let read = disk.read_at(vec![0; 518], 0).await.unwrap();
                assert_eq!(read[..512], *shared);
                assert_eq!(&read[512..], b"static");
                assert!(disk.read_at(Vec::new(), 0).await.unwrap().is_empty());
            }));
        });
    }
}

#[test]
fn a_boxed_disk_does_as_well() {
    let image = raw(4096);
    let boxed: Box<dyn AsyncDiskFile> = block::open_disk_file(&image.path).unwrap();
    let disk = HostDisk::new(boxed).unwrap();
    assert_eq!(disk.disk_file().topology().logical_block_size, 512);
    assert_eq!(block_on(disk.read_at(vec![1; 2], 4094)).unwrap(), [0; 2]);
}

#[test]
fn many_futures_of_many_threads_beyond_the_depth() {
    const THREADS: usize = 4;
    const FUTURES: usize = 100;
    const LEN: usize = 1536;
    for image in [raw(4 << 20), qcow2(4 << 20)] {
        image.each_engine(|disk| {
            let disk = HostDisk::with_depth(disk, 3).unwrap();
            thread::scope(|scope| {
                for thread in 0..THREADS {
                    let disk = &disk;
                    scope.spawn(move || {
                        let place = |index: usize| ((index * THREADS + thread) * LEN) as u64;
                        block_on(async {
                            for round in 0..2 {
                                let writes = (0..FUTURES)
                                    .map(|i| disk.write_at(pattern(i + round, LEN), place(i)));
                                for written in join_all(writes).await {
                                    written.unwrap();
                                }
                                disk.flush().await.unwrap();
                                let reads =
                                    (0..FUTURES).map(|i| disk.read_at(vec![0; LEN], place(i)));
                                for (i, read) in join_all(reads).await.into_iter().enumerate() {
                                    assert_eq!(read.unwrap(), pattern(i + round, LEN));
                                }
                            }
                        });
                    });
                }
            });
        });
    }
}

#[test]
fn futures_dropped_in_flight_keep_their_buffers() {
    for image in [raw(4 << 20), qcow2(4 << 20)] {
        image.each_engine(|disk| {
            let disk = HostDisk::with_depth(disk, 16).unwrap();
            let source: Arc<[u8]> = pattern(5, 8192).into();
            for round in 0..50 {
                let offset = round * 8192;
                {
                    let mut write = pin!(disk.write_at(Arc::clone(&source), offset));
                    assert!(poll_once(write.as_mut()).is_pending());
                    // Never polled at all: nothing happens.
                    let _unpolled = disk.write_at(vec![0xff; 100], offset);
                }
                let mut read = pin!(disk.read_at(vec![0; 4096], offset));
                assert!(poll_once(read.as_mut()).is_pending());
            }
            // Each write was made whole or not at all.
            block_on(async {
                for round in 0..50 {
                    let read = disk.read_at(vec![0; 8192], round * 8192).await.unwrap();
                    assert!(read == *source || read.iter().all(|byte| *byte == 0));
                }
            });
            drop(disk);
            assert_eq!(
                Arc::strong_count(&source),
                1,
                "every request let go of its buffer"
            );
        });
    }
}

#[test]
fn what_waits_in_line_is_taken_back_at_once() {
    let image = raw(1 << 20);
    let file = image.open();
    let disk = HostDisk::with_depth(file.clone(), 1).unwrap();
    let source: Arc<[u8]> = Arc::from([3; 512].as_slice());
    let drained = file.drain().unwrap();
    // The first is started, and held by the drain; the others wait for its place.
    let mut first = Box::pin(disk.write_at(Arc::clone(&source), 0));
    assert!(poll_once(first.as_mut()).is_pending());
    while Arc::strong_count(&source) < 2 {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(50));
    let mut others: Vec<_> = (1..1000)
        .map(|i| Box::pin(disk.write_at(Arc::clone(&source), i * 512)))
        .collect();
    for other in &mut others {
        assert!(poll_once(other.as_mut()).is_pending());
    }
    let last = others.pop().unwrap();
    assert!(Arc::strong_count(&source) > 1000);
    drop(others);
    assert!(
        Arc::strong_count(&source) <= 6,
        "{}",
        Arc::strong_count(&source)
    );
    drop(drained);
    block_on(async {
        first.await.unwrap();
        last.await.unwrap();
        let read = disk.read_at(vec![9; 512], 999 * 512).await.unwrap();
        assert_eq!(read, [3; 512]);
        let read = disk.read_at(vec![9; 512 * 998], 512).await.unwrap();
        assert_eq!(read, vec![0; 512 * 998]);
    });
}

#[test]
fn dropping_the_disk_waits_for_what_was_made() {
    let image = raw(1 << 20);
    let file = image.open();
    let disk = HostDisk::with_depth(file.clone(), 2).unwrap();
    let drained = file.drain().unwrap();
    let mut writes: Vec<_> = (0..10)
        .map(|i| Box::pin(disk.write_at(vec![i as u8 + 1; 512], i * 512)))
        .collect();
    for write in &mut writes {
        assert!(poll_once(write.as_mut()).is_pending());
    }
    let late = disk.flush();
    let gone = Arc::new(AtomicBool::new(false));
    let dropper = {
        let gone = Arc::clone(&gone);
        thread::spawn(move || {
            drop(disk);
            gone.store(true, Ordering::Release);
        })
    };
    thread::sleep(Duration::from_millis(50));
    assert!(!gone.load(Ordering::Acquire), "requests are in flight");
    drop(drained);
    dropper.join().unwrap();
    for (i, write) in writes.into_iter().enumerate() {
        assert_eq!(block_on(write).unwrap(), vec![i as u8 + 1; 512]);
    }
    assert_eq!(block_on(late).unwrap_err().kind(), ErrorKind::Cancelled);
    let mut byte = [0];
    file.read_at(&mut byte, 9 * 512).unwrap();
    assert_eq!(byte, [10]);
}

#[test]
fn dropping_the_disk_closes_the_image() {
    let image = qcow2(1 << 20);
    for byte in 1..4 {
        let disk = HostDisk::new(image.open()).unwrap();
        block_on(disk.write_at(vec![byte; 512], 0)).unwrap();
        drop(disk);
        // The image is locked no more, and complete.
        let disk = HostDisk::new(image.open()).unwrap();
        assert_eq!(
            block_on(disk.read_at(vec![0; 512], 0)).unwrap(),
            [byte; 512]
        );
    }
}

#[test]
fn errors_say_everything() {
    let image = raw(1 << 20);
    let disk = HostDisk::new(image.open()).unwrap();
    let error = block_on(disk.read_at(vec![0; 512], (1 << 20) - 511)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    let text = error.to_string();
    for part in ["disk.raw: ", "read at offset 0xffe01", "1048576 bytes"] {
        assert!(text.contains(part), "{text}");
    }
    let error = block_on(disk.discard(u64::MAX, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    drop(disk);

    let read_only = OpenOptions::new()
        .read_only(true)
        .open(&image.path)
        .unwrap();
    let disk = HostDisk::new(read_only).unwrap();
    let error = block_on(disk.write_at(vec![0; 512], 512)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(
        error.to_string().contains("write at offset 0x200"),
        "{error}"
    );
    let error = block_on(disk.write_zeroes(0, 512, true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    drop(disk);

    let error = HostDisk::with_depth(image.open(), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    // Nothing of the failed one keeps the image locked.
    HostDisk::new(image.open()).unwrap();
}

#[test]
fn a_file_that_shrinks_is_an_error_of_its_requests_alone() {
    let image = raw(1 << 20);
    let disk = HostDisk::new(image.open()).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    block_on(async {
        let error = disk.read_at(vec![0; 512], 8192).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ShortTransfer);
        assert!(
            error.to_string().contains("read at offset 0x2000"),
            "{error}"
        );
        disk.read_at(vec![0; 512], 0).await.unwrap();
    });
}

#[test]
fn the_thread_has_a_name_and_wakes_the_last_waker() {
    let image = raw(1 << 20);
    let file = image.open();
    let disk = HostDisk::new(file.clone()).unwrap();
    let drained = file.drain().unwrap();
    let name = Arc::new(NameOfWaker::default());
    let mut read = pin!(disk.read_at(vec![0; 512], 0));
    assert!(poll_once(read.as_mut()).is_pending());
    let waker = Waker::from(Arc::clone(&name));
    assert!(
        read.as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    drop(drained);
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while name.0.lock().unwrap().is_none() {
        assert!(std::time::Instant::now() < end, "nobody was woken");
        thread::yield_now();
    }
    assert_eq!(name.0.lock().unwrap().as_deref(), Some("platter-host"));
    assert!(poll_once(read.as_mut()).is_ready());
}

#[test]
fn a_waker_that_panics_hangs_nobody() {
    let image = raw(1 << 20);
    let file = image.open();
    let disk = HostDisk::new(file.clone()).unwrap();
    let drained = file.drain().unwrap();
    let mut read = pin!(disk.read_at(vec![0; 512], 0));
    let waker = Waker::from(Arc::new(Panicking));
    assert!(
        read.as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    let mut other = pin!(disk.read_at(vec![0; 512], 512));
    assert!(poll_once(other.as_mut()).is_pending());
    drop(drained);
    // It was answered before the thread ended, or when it did.
    match block_on(other) {
        Ok(bytes) => assert_eq!(bytes, [0; 512]),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled),
    }
    loop {
        match block_on(disk.read_at(vec![0; 512], 0)) {
            Ok(_) => thread::yield_now(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Cancelled);
                break;
            }
        }
    }
    drop(disk);
    file.flush().unwrap();
}

#[test]
fn blocking_calls_go_on_beside_the_thread() {
    let image = qcow2(8 << 20);
    let file = image.open();
    let disk = HostDisk::new(file.clone()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            block_on(async {
                for i in 0..64 {
                    disk.write_at(pattern(i, 4096), i as u64 * 65536)
                        .await
                        .unwrap();
                }
            });
        });
        for i in 0..20 {
            file.write_at(&pattern(i, 512), i as u64 * 65536 + 8192)
                .unwrap();
        }
        file.resize(16 << 20).unwrap();
    });
    assert_eq!(disk.size(), 16 << 20);
    block_on(async {
        for i in 0..64 {
            let read = disk.read_at(vec![0; 4096], i as u64 * 65536).await.unwrap();
            assert_eq!(read, pattern(i, 4096));
        }
    });
}

/// A buffer of somebody else.
struct Fixed(Box<[u8; 64]>);

// SAFETY: the bytes are on the heap, initialised and alone.
unsafe impl IoBuf for Fixed {
    fn stable_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }
    fn buf_len(&self) -> usize {
        64
    }
}

// SAFETY: as above.
unsafe impl IoBufMut for Fixed {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

#[test]
fn buffers_of_other_types() {
    let image = raw(4096);
    let disk = HostDisk::new(image.open()).unwrap();
    block_on(async {
        let written = disk.write_at(Fixed(Box::new([4; 64])), 100).await.unwrap();
        let read = disk.read_at(Fixed(Box::new([0; 64])), 100).await.unwrap();
        assert_eq!(read.0, written.0);
    });
}
