//! `TokioUringDisk`: futures served by a task of a tokio-uring runtime.

use std::{pin::pin, rc::Rc};

use block::{DiskFile, ErrorKind, host::TokioUringDisk};
use tokio_uring::buf::BoundedBuf;

use crate::{
    executor::{join_all, poll_once},
    rig::{pattern, qcow2, raw},
};

#[test]
fn moves_bytes_on_every_engine() {
    for image in [raw(1 << 20), qcow2(1 << 20)] {
        image.each_engine(|disk| {
            tokio_uring::start(async move {
                let disk = TokioUringDisk::new(disk).unwrap();
                assert_eq!(disk.size(), 1 << 20);
                let (result, written) = disk.write_at(pattern(1, 5000), 3000).await;
                assert_eq!(result.unwrap(), 5000);
                disk.flush().await.unwrap();
                let (result, read) = disk.read_at(Vec::with_capacity(5000), 3000).await;
                assert_eq!(result.unwrap(), read.len());
                assert_eq!(read[..5000], written);
                disk.write_zeroes(3000, 1000, true).await.unwrap();
                disk.discard(0, 65536).await.unwrap();
                let (result, read) = disk.read_at(vec![1; 1000], 3000).await;
                assert_eq!(result.unwrap(), 1000);
                assert_eq!(read, [0; 1000]);
                disk.close().await.unwrap();
            });
        });
    }
}

#[test]
fn many_tasks_beyond_the_depth() {
    for image in [raw(4 << 20), qcow2(4 << 20)] {
        image.each_engine(|disk| {
            tokio_uring::start(async move {
                let disk = Rc::new(TokioUringDisk::with_depth(disk, 3).unwrap());
                let tasks = (0..200).map(|i| {
                    let disk = Rc::clone(&disk);
                    tokio_uring::spawn(async move {
                        let offset = i as u64 * 8192 + 512;
                        let (result, _) = disk.write_at(pattern(i, 3000), offset).await;
                        result.unwrap();
                        let (result, read) = disk.read_at(vec![0; 3000], offset).await;
                        result.unwrap();
                        assert_eq!(read, pattern(i, 3000));
                    })
                });
                let tasks: Vec<_> = tasks.collect();
                for task in tasks {
                    task.await.unwrap();
                }
            });
        });
    }
}

#[test]
fn slices_and_buffers_that_are_not_send() {
    let image = raw(1 << 20);
    let disk = image.open();
    tokio_uring::start(async move {
        let disk = TokioUringDisk::new(disk).unwrap();
        let (result, slice) = disk.write_at(pattern(3, 100).slice(10..20), 0).await;
        assert_eq!(result.unwrap(), 10);
        assert_eq!(slice.into_inner(), pattern(3, 100));
        let (result, slice) = disk.read_at(vec![0; 100].slice(..12), 0).await;
        assert_eq!(result.unwrap(), 12);
        let read = slice.into_inner();
        assert_eq!(read[..10], pattern(3, 100)[10..20]);
        assert_eq!(read[10..], [0; 90]);
        // Buffers of tokio-uring's registry hold an `Rc`.
        let registry = tokio_uring::buf::fixed::FixedBufRegistry::new([vec![8; 512]]);
        let (result, buf) = disk.write_at(registry.check_out(0).unwrap(), 4096).await;
        assert_eq!(result.unwrap(), 512);
        drop(buf);
        let (result, slice) = disk
            .read_at(Vec::with_capacity(600).slice(..512), 4096)
            .await;
        result.unwrap();
        assert_eq!(slice.into_inner(), [8; 512]);
        let (result, read) = disk.read_at(vec![0; 512], 4096).await;
        result.unwrap();
        assert_eq!(read, [8; 512]);
    });
}

#[test]
fn errors_give_the_buffer_back() {
    let image = raw(1 << 20);
    let disk = image.open();
    tokio_uring::start(async move {
        let disk = TokioUringDisk::new(disk).unwrap();
        let (result, buf) = disk.read_at(vec![5; 512], 1 << 20).await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert!(
            error
                .to_string()
                .contains("disk.raw: read at offset 0x100000"),
            "{error}"
        );
        assert_eq!(buf, [5; 512]);
        let (result, buf) = disk.write_at(vec![6; 1], u64::MAX).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(buf, [6]);
        let late = disk.write_at(vec![7; 1], 0);
        drop(disk);
        let (result, buf) = late.await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(buf, [7]);
    });
}

#[test]
fn futures_dropped_in_flight_keep_their_buffers() {
    for image in [raw(4 << 20), qcow2(4 << 20)] {
        image.each_engine(|disk| {
            tokio_uring::start(async move {
                let disk = TokioUringDisk::with_depth(disk, 8).unwrap();
                for round in 0..30u64 {
                    {
                        let mut write = pin!(disk.write_at(vec![1; 8192], round * 8192));
                        assert!(poll_once(write.as_mut()).is_pending());
                        if round % 2 == 0 {
                            tokio::task::yield_now().await;
                        }
                    }
                    let mut read = pin!(disk.read_at(vec![0; 4096], round * 8192));
                    assert!(poll_once(read.as_mut()).is_pending());
                }
                let reads = (0..30u64).map(|round| disk.read_at(vec![0; 8192], round * 8192));
                for (result, read) in join_all(reads).await {
                    result.unwrap();
                    assert!(read.iter().all(|byte| *byte == read[0]));
                }
                disk.close().await.unwrap();
            });
        });
    }
}

#[test]
fn a_runtime_that_ends_leaves_nothing_in_flight() {
    let image = qcow2(4 << 20);
    for _ in 0..5 {
        let disk = image.open();
        tokio_uring::start(async move {
            let disk = TokioUringDisk::new(disk).unwrap();
            let mut write = pin!(disk.write_at(vec![1; 8192], 65536));
            assert!(poll_once(write.as_mut()).is_pending());
            tokio::task::yield_now().await;
        });
    }
    image.open().close().unwrap();
}

#[test]
fn closing_unlocks_the_image() {
    let image = qcow2(1 << 20);
    for byte in 1..4 {
        let disk = image.open();
        tokio_uring::start(async {
            let disk = TokioUringDisk::new(disk).unwrap();
            let (result, _) = disk.write_at(vec![byte; 512], 0).await;
            result.unwrap();
            disk.close().await.unwrap();
            let mut read = [0; 512];
            image.open().read_at(&mut read, 0).unwrap();
            assert_eq!(read, [byte; 512]);
        });
    }
}

#[test]
fn a_blocking_call_that_would_wait_for_itself_is_refused() {
    let image = raw(1 << 20);
    let file = image.open();
    tokio_uring::start(async move {
        let disk = TokioUringDisk::new(file.clone()).unwrap();
        let drained = file.drain().unwrap();
        let mut read = Box::pin(disk.read_at(vec![0; 512], 0));
        assert!(poll_once(read.as_mut()).is_pending());
        tokio::task::yield_now().await;
        let error = disk.disk_file().flush().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
        drop(drained);
        let (result, _) = read.await;
        result.unwrap();
        disk.disk_file().flush().unwrap();
    });
}
