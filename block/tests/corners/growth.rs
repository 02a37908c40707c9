//! What a flush costs while an image grows, and what a crash leaves then.

use super::*;
use block::io::sim::SimFault;

const CLUSTER: u64 = 4096;

fn image(size: u64) -> CreateOptions {
    CreateOptions {
        size,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    }
}

/// Writes a cluster and flushes, for each of the guest clusters; returns the syncs.
fn write_each(host: &SimHost, disk: &Disk, clusters: impl IntoIterator<Item = u64>) -> u64 {
    let before = host.stats().syncs;
    for cluster in clusters {
        disk.write_at(&noise(cluster + 1, CLUSTER as usize), cluster * CLUSTER)
            .unwrap();
        disk.flush().unwrap();
    }
    host.stats().syncs - before
}

#[test]
fn new_clusters_in_the_place_of_zeroes_cost_one_sync_a_flush() {
    let host = host();
    make(&host, &image(2 << 20));
    let disk = open(&host);
    write_each(&host, &disk, 0..200);
    // One in 64 finds nothing reserved, and a few that the file does not reach so far.
    let syncs = write_each(&host, &disk, 200..456);
    assert!((256..=280).contains(&syncs), "{syncs}");
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn data_is_durable_before_the_table_where_something_else_was_read() {
    let host = host();
    make(&host, &image(2 << 20));
    let disk = open(&host);
    write_each(&host, &disk, 0..200);
    // Clusters that are given back are used again: they have old data.
    disk.discard(0, 100 * CLUSTER).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    let syncs = write_each(&host, &disk, 300..350);
    assert_eq!(syncs, 2 * 50, "clusters with old data");
    disk.close().unwrap();

    let options = CreateOptions {
        backing_file: Some(IMAGE.into()),
        backing_format: Some("qcow2".into()),
        ..image(2 << 20)
    };
    let over: Arc<dyn Host> = Arc::new(host.clone());
    let path = Path::new("over.qcow2");
    with_file_on(over, path, OfflineOptions::create(), async |io, file| {
        create(io, file, &options).await
    })
    .unwrap();
    let disk = OpenOptions::new()
        .open_on(path, Arc::new(host.clone()))
        .unwrap();
    write_each(&host, &disk, 0..100);
    let syncs = write_each(&host, &disk, 100..200);
    assert!(syncs >= 2 * 100, "clusters with data below: {syncs}");
    let syncs = write_each(&host, &disk, 500..505);
    assert_eq!(
        syncs,
        2 * 5,
        "inside the backing file, though it has no data there"
    );
    disk.close().unwrap();
}

#[test]
fn a_crash_leaks_what_was_counted_ahead_and_no_more() {
    let mut most = 0;
    for written in 300..310 {
        let host = host();
        make(&host, &image(2 << 20));
        let disk = open(&host);
        write_each(&host, &disk, 0..written);
        let after = host.power_cut();
        drop(disk);
        let (report, lines) = report(&after);
        assert_eq!(report.corruptions, 0, "{lines:#?}");
        assert!(report.leaks <= 64, "{lines:#?}");
        most = most.max(report.leaks);
        let disk = open(&after);
        for cluster in 0..written {
            let there = read(&disk, cluster * CLUSTER, CLUSTER as usize);
            assert!(there == noise(cluster + 1, CLUSTER as usize), "{cluster}");
        }
    }
    assert!(most > 0);
}

#[test]
fn a_small_image_leaks_nothing() {
    let host = host();
    make(&host, &image(2 << 20));
    let disk = open(&host);
    write_each(&host, &disk, 0..10);
    let after = host.power_cut();
    drop(disk);
    assert_clean(&after);
}

#[test]
fn power_cuts_between_writes_and_flushes_show_old_or_new() {
    for seed in 0..400 {
        let flushed = 150 + seed % 67;
        let host = SimHost::new(SimConfig::seeded(seed));
        make(&host, &image(2 << 20));
        let disk = open(&host);
        if seed % 2 == 1 {
            // The file is as long as what was written.
            host.inject(SimFault {
                path: None,
                op: SimOp::Fallocate,
                skip: 0,
                count: u64::MAX,
                errno: libc::EOPNOTSUPP,
            });
        }
        write_each(&host, &disk, 0..flushed);
        for cluster in flushed..flushed + 6 {
            disk.write_at(&noise(cluster + 1, CLUSTER as usize), cluster * CLUSTER)
                .unwrap();
        }
        let mut io = disk.create_async_io(4).unwrap();
        submit(&mut *io, 1, RequestOp::Flush);
        for _ in 0..seed % 11 {
            let mut out = Vec::new();
            io.reap(&mut out);
            let _ = host.step();
        }
        let after = host.power_cut();
        finish(&host, &mut [&mut io]);
        drop(io);
        drop(disk);
        let (report, lines) = report(&after);
        assert_eq!(report.corruptions, 0, "seed {seed}: {lines:#?}");
        let disk = open(&after);
        for cluster in 0..flushed + 6 {
            let there = read(&disk, cluster * CLUSTER, CLUSTER as usize);
            let wanted = noise(cluster + 1, CLUSTER as usize);
            let mut sectors = there.chunks(512).zip(wanted.chunks(512));
            let right = |(there, wanted): (&[u8], &[u8])| {
                there == wanted || (cluster >= flushed && there.iter().all(|byte| *byte == 0))
            };
            assert!(sectors.all(right), "seed {seed}, {cluster}");
        }
    }
}

#[test]
fn writes_that_grow_the_file_together_lie_in_their_order() {
    let host = host();
    make(&host, &image(2 << 20));
    let disk = open(&host);
    // Some are reserved by now, fewer than the writes need.
    write_each(&host, &disk, 0..60);
    let mut io = disk.create_async_io(8).unwrap();
    for start in (60..460).step_by(50) {
        let bytes = noise(start, 50 * CLUSTER as usize);
        submit(&mut *io, start, write_op(start * CLUSTER, &bytes, false));
    }
    assert!(finish(&host, &mut [&mut io]).iter().all(|done| done.1));
    drop(io);
    let mut host_offset = 0;
    for cluster in 60..460 {
        let status = disk.block_status(cluster * CLUSTER, CLUSTER).unwrap();
        let offset = status.offset.unwrap().0;
        assert!(offset > host_offset, "{cluster}");
        host_offset = offset;
    }
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn zeroes_go_ahead_of_clusters_that_are_flushed_a_few_at_a_time() {
    let host = host();
    make(&host, &image(4 << 20));
    let disk = open(&host);
    write_each(&host, &disk, 0..200);
    let before = host.stats();
    write_each(&host, &disk, 200..456);
    let after = host.stats();
    // Data, its table, and zeroes: a cluster each, and what the last zeroes are ahead.
    let written = (after.bytes_written - before.bytes_written) / CLUSTER;
    assert!(
        (3 * 256 - 16..=3 * 256 + 80).contains(&written),
        "{written}"
    );
    assert!(after.writes - before.writes <= 2 * 256 + 16, "many at once");

    // As many as these come without a flush: the flushes before say nothing about them.
    let before = host.stats();
    for cluster in 456..712 {
        disk.write_at(&noise(cluster, CLUSTER as usize), cluster * CLUSTER)
            .unwrap();
    }
    let written = (host.stats().bytes_written - before.bytes_written) / CLUSTER;
    assert!(written <= 256 + 80, "{written}");

    let before = host.stats();
    for cluster in 712..968 {
        disk.write_at(&noise(cluster, CLUSTER as usize), cluster * CLUSTER)
            .unwrap();
        if cluster % 8 == 7 {
            disk.flush().unwrap();
        }
    }
    let written = (host.stats().bytes_written - before.bytes_written) / CLUSTER;
    assert!(
        written <= 256 + 256 / 8 + 80,
        "none where there are more: {written}"
    );
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn zeroes_that_cannot_be_written_ahead_harm_nobody() {
    let mut harmless = 0;
    for written in 200..280 {
        let host = host();
        make(&host, &image(2 << 20));
        let disk = open(&host);
        write_each(&host, &disk, 0..written);
        host.inject(SimFault {
            path: None,
            op: SimOp::Write,
            skip: 0,
            count: 1,
            errno: libc::EIO,
        });
        // What fails is the data, once zeroes.
        let data = noise(written + 1, CLUSTER as usize);
        match disk.write_at(&data, written * CLUSTER) {
            Ok(()) => harmless += 1,
            Err(_) => disk.write_at(&data, written * CLUSTER).unwrap(),
        }
        write_each(&host, &disk, written + 1..400);
        for cluster in 0..400 {
            let there = read(&disk, cluster * CLUSTER, CLUSTER as usize);
            assert!(there == noise(cluster + 1, CLUSTER as usize), "{cluster}");
        }
        disk.close().unwrap();
        assert_clean(&host);
    }
    assert!((1..=3).contains(&harmless), "{harmless}");
}

#[test]
fn zeroes_ahead_overwrite_nothing() {
    const QUEUES: u64 = 3;
    for seed in 0..60 {
        let host = SimHost::new(SimConfig::seeded(seed));
        // Small tables: new blocks of reference counts and new L2 tables lie among the data.
        let mut options = image(4 << 20);
        options.cluster_size = 512;
        make(&host, &options);
        let disk = open(&host);
        let mut queues: Vec<_> = (0..QUEUES)
            .map(|_| disk.create_async_io(4).unwrap())
            .collect();
        let mut next = 0;
        let mut flushing = vec![false; QUEUES as usize];
        let mut rng = seed;
        while next < 1500 {
            for (queue, flushing) in queues.iter_mut().zip(&mut flushing) {
                rng = rng.wrapping_mul(6364136223846793005).wrapping_add(1);
                if queue.in_flight() == 0 && rng >> 62 != 0 {
                    *flushing = !*flushing;
                    if *flushing {
                        submit(&mut **queue, 0, RequestOp::Flush);
                    } else {
                        let bytes = noise(next + 1, 512);
                        submit(&mut **queue, next, write_op(next * 512, &bytes, false));
                        next += 1;
                    }
                }
                let mut done = Vec::new();
                queue.reap(&mut done);
                assert!(done.iter().all(|done| done.result.is_ok()), "seed {seed}");
            }
            let _ = host.step();
        }
        let mut queues: Vec<_> = queues.iter_mut().collect();
        assert!(finish(&host, &mut queues).iter().all(|done| done.1));
        for cluster in 0..next {
            let there = read(&disk, cluster * 512, 512);
            assert!(there == noise(cluster + 1, 512), "seed {seed}, {cluster}");
        }
        drop(queues);
        disk.close().unwrap();
        assert_clean(&host);
    }
}
