//! Requests of several queues on the same clusters.

use super::*;

#[test]
fn a_fua_write_after_the_death_of_another_process_is_durable() {
    for seed in 0..200 {
        let host = SimHost::new(SimConfig::seeded(seed));
        make(
            &host,
            &CreateOptions {
                size: 4 << 20,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        let mut io = disk.create_async_io(8).unwrap();
        submit(&mut *io, 1, write_op(0, &[1; 4096], false));
        finish(&host, &mut [&mut io]);
        submit(&mut *io, 2, RequestOp::Flush);
        // After its first sync, tables are on their way; the second never ends.
        let syncs = host.stats().syncs;
        // What was submitted is handed over by the second reap.
        io.reap(&mut Vec::new());
        while host.stats().syncs == syncs {
            io.reap(&mut Vec::new());
            assert!(host.step() || !host.idle());
        }
        host.hold(IMAGE, SimOp::Sync);
        for _ in 0..50 {
            io.reap(&mut Vec::new());
            let _ = host.step();
        }
        assert_eq!(io.in_flight(), 1);
        let next = host.kill();
        drop(io);
        drop(disk);
        let disk = open(&next);
        let mut io = disk.create_async_io(8).unwrap();
        submit(&mut *io, 3, write_op(0, &[2; 4096], true));
        assert!(finish(&next, &mut [&mut io])[0].1);
        let last = next.power_cut();
        drop(io);
        drop(disk);
        assert!(
            read(&open(&last), 0, 4096) == [2; 4096],
            "seed {seed}: not durable"
        );
    }
}

#[test]
fn a_write_into_a_cluster_that_another_just_took_survives_a_kill() {
    for seed in 0..60 {
        let host = SimHost::new(SimConfig::seeded(seed));
        make(&host, &small_clusters(1 << 20, 16));
        let disk = OpenOptions::new()
            .restartable(true)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        let mut first = disk.create_async_io(8).unwrap();
        let mut second = disk.create_async_io(8).unwrap();
        submit(&mut *first, 1, write_op(0, &[1; 256], false));
        submit(&mut *second, 2, write_op(256, &[2; 256], false));
        let mut out = Vec::new();
        while second.in_flight() > 0 {
            let _ = host.step();
            first.reap(&mut Vec::new());
            second.reap(&mut out);
        }
        assert_eq!(out[0].result, Ok(()));
        let after = host.kill();
        drop((first, second));
        drop(disk);
        let found = read(&open(&after), 256, 256);
        assert!(found == [2; 256], "seed {seed}: lost");
    }
}

/// A disk whose cluster 0 holds ones, durably, and a slow request of one queue on it.
fn slow_request(op: RequestOp) -> (SimHost, Disk, Box<dyn AsyncIo>, Box<dyn AsyncIo>) {
    let host = host();
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            cluster_size: 4096,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.flush().unwrap();
    let mut slow = disk.create_async_io(8).unwrap();
    let quick = disk.create_async_io(8).unwrap();
    let second = Duration::from_secs(1);
    host.configure(|config| (config.min_delay, config.max_delay) = (second, second));
    submit(&mut *slow, 1, op);
    let short = Duration::from_micros(10);
    host.configure(|config| (config.min_delay, config.max_delay) = (short, short));
    (host, disk, slow, quick)
}

/// Discards cluster 0, makes that durable, and writes twos elsewhere: nothing of that may reach the
/// slow request, nor the other way round. Then lets the slow request end.
fn reuse_meanwhile(
    host: &SimHost,
    slow: &mut Box<dyn AsyncIo>,
    quick: &mut Box<dyn AsyncIo>,
) -> Vec<u8> {
    submit(
        &mut **quick,
        2,
        RequestOp::Discard {
            offset: 0,
            len: 4096,
        },
    );
    finish(host, &mut [quick]);
    for round in 1..6u64 {
        submit(&mut **quick, 3, RequestOp::Flush);
        finish(host, &mut [quick]);
        submit(&mut **quick, 4, write_op(round * 4096, &[2; 4096], false));
        finish(host, &mut [quick]);
    }
    assert_eq!(slow.in_flight(), 1, "it ended too early for this test");
    finish(host, &mut [slow]).remove(0).2
}

#[test]
fn a_write_on_its_way_keeps_its_cluster() {
    let (host, disk, mut slow, mut quick) = slow_request(write_op(0, &[9; 4096], false));
    reuse_meanwhile(&host, &mut slow, &mut quick);
    drop((slow, quick));
    assert!(read(&disk, 4096, 5 * 4096) == vec![2; 5 * 4096]);
    let len = host.file(IMAGE).unwrap().content().len();
    // Now that it ended the cluster is used again.
    for _ in 0..3 {
        disk.flush().unwrap();
    }
    disk.write_at(&[3; 4096], 1 << 20).unwrap();
    disk.flush().unwrap();
    assert_eq!(host.file(IMAGE).unwrap().content().len(), len);
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn a_read_on_its_way_sees_no_other_data() {
    let (host, disk, mut slow, mut quick) = slow_request(read_op(0, 4096));
    let found = reuse_meanwhile(&host, &mut slow, &mut quick);
    assert!(found == [1; 4096], "{:?}", &found[..8]);
    drop((slow, quick));
    disk.close().unwrap();
    assert_clean(&host);
}
