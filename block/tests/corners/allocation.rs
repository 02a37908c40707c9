//! Where clusters and tables are found a place.

use super::*;

#[test]
fn free_space_is_found_behind_more_full_refcount_blocks_than_are_kept() {
    within(60, || {
        let host = host();
        make(
            &host,
            &CreateOptions {
                size: 33 << 30,
                refcount_bits: 64,
                preallocation: Preallocation::Metadata,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        disk.resize(34 << 30).unwrap();
        disk.write_at(&[7; 4096], 33 << 30).unwrap();
        assert_eq!(read(&disk, 33 << 30, 4096), [7; 4096]);
        disk.close().unwrap();
    });
}

#[test]
fn the_refcount_table_grows_as_often_as_it_must_before_a_flush() {
    within(60, || {
        let host = host();
        make(&host, &small_clusters(64 << 20, 64));
        let disk = open(&host);
        let bytes = noise(1, 12 << 20);
        disk.write_at(&bytes, 0).unwrap();
        assert!(read(&disk, 0, bytes.len()) == bytes);
        disk.flush().unwrap();
        disk.write_at(&bytes, 20 << 20).unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert!(read(&disk, 20 << 20, bytes.len()) == bytes);
    });
}

#[test]
fn an_l1_table_longer_than_a_refcount_block_counts_is_moved() {
    within(60, || {
        let host = host();
        make(&host, &small_clusters(1 << 20, 64));
        let disk = open(&host);
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.resize(200 << 20).unwrap();
        disk.write_at(&[2; 4096], (200 << 20) - 4096).unwrap();
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert_eq!(read(&disk, (200 << 20) - 4096, 4096), [2; 4096]);
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
    });
}

#[test]
fn a_refcount_table_longer_than_a_refcount_block_counts_is_moved() {
    within(120, || {
        let host = host();
        make(
            &host,
            &CreateOptions {
                preallocation: Preallocation::Metadata,
                ..small_clusters(125 << 20, 64)
            },
        );
        let disk = open(&host);
        disk.resize(160 << 20).unwrap();
        let bytes = noise(2, 1 << 20);
        for at in 0..16 {
            disk.write_at(&bytes, (126 + at) << 20).unwrap();
        }
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert!(read(&disk, 130 << 20, bytes.len()) == bytes);
    });
}

#[test]
fn compressed_data_is_not_packed_into_a_cluster_that_was_given_away() {
    let host = host();
    let size = 65536;
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_compressed(&vec![1; size], 0).unwrap();
    disk.write_at(&noise(3, size), 0).unwrap();
    // The cluster of the compressed data is free now.
    for _ in 0..3 {
        disk.flush().unwrap();
    }
    let mut expected = vec![(0, noise(3, size))];
    for cluster in 1..4u64 {
        let bytes = noise(10 + cluster, size);
        disk.write_at(&bytes, cluster * size as u64).unwrap();
        expected.push((cluster, bytes));
    }
    disk.write_compressed(&vec![2; size], 8 * size as u64)
        .unwrap();
    expected.push((8, vec![2; size]));
    for (cluster, bytes) in &expected {
        let found = read(&disk, cluster * size as u64, size);
        assert!(found == *bytes, "cluster {cluster}");
    }
    disk.close().unwrap();
    assert_clean(&host);
    let disk = open(&host);
    for (cluster, bytes) in &expected {
        let found = read(&disk, cluster * size as u64, size);
        assert!(found == *bytes, "cluster {cluster}, read again");
    }
}

#[test]
fn the_header_is_never_allocated() {
    let host = host();
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let file = host.file(IMAGE).unwrap();
    let before = file.content();
    // The first count of the first block: the block follows header and table.
    let at =
        |offset: usize| u64::from_be_bytes(before[offset..offset + 8].try_into().unwrap()) as usize;
    let table = at(48);
    let block = at(table);
    assert_eq!(before[block..block + 2], [0, 1]);
    file.poke(block as u64, &[0, 0]);
    let disk = open(&host);
    let result = disk.write_at(&noise(6, 65536), 0);
    let _ = disk.close();
    assert_eq!(host.file(IMAGE).unwrap().content()[..4], *b"QFI\xfb");
    if let Err(error) = result {
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn space_that_a_failed_growth_took_comes_back() {
    use block::io::sim::SimFault;
    for skip in 0..8 {
        let host = host();
        make(&host, &small_clusters(1 << 20, 16));
        let disk = open(&host);
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.flush().unwrap();
        host.inject(SimFault {
            path: None,
            op: SimOp::Write,
            skip,
            count: 1,
            errno: libc::ENOSPC,
        });
        while let Err(error) = disk.resize(40 << 20) {
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            assert_eq!(disk.size(), 1 << 20);
        }
        while let Err(error) = disk.resize(60 << 20) {
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
        disk.write_at(&[2; 4096], 50 << 20).unwrap();
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
        disk.close().unwrap();
        assert_clean(&host);
    }
}

#[test]
fn a_disk_that_was_full_goes_on_when_there_is_space() {
    use block::io::sim::SimFault;
    for skip in 0..12 {
        let host = host();
        make(&host, &small_clusters(4 << 20, 16));
        let disk = open(&host);
        host.inject(SimFault {
            path: None,
            op: SimOp::Write,
            skip,
            count: 1 + skip % 4,
            errno: libc::ENOSPC,
        });
        let mut failed = 0;
        for round in 0..8u64 {
            let bytes = noise(round, 10_000);
            failed += u32::from(disk.write_at(&bytes, round * 20_000 + 100).is_err());
            failed += u32::from(disk.flush().is_err());
        }
        assert!(failed > 0);
        for round in 0..8u64 {
            disk.write_at(&noise(round, 10_000), round * 20_000 + 100)
                .unwrap();
        }
        disk.flush().unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        for round in 0..8u64 {
            assert!(read(&disk, round * 20_000 + 100, 10_000) == noise(round, 10_000));
        }
    }
}
