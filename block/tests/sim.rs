//! The simulation itself: determinism, time, durability, faults.

#![allow(clippy::unwrap_used)] // A test ends where something unexpected happens.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use block::io::{
    AlignedBuf, Buffers, Engine, EngineFile, EngineKind, FallocateMode, FileOptions, Host, HostOp,
    SimulatedFile, Started, Token,
    sim::{SimConfig, SimFault, SimHost, SimOp},
};

const SECTOR: usize = 512;

/// One engine of a host with one file open.
struct Disk {
    host: SimHost,
    engine: Box<dyn Engine>,
    file: EngineFile,
    next: u64,
    done: Vec<(Token, i32)>,
    buffers: Vec<Buffers>,
}

impl Disk {
    fn new(host: &SimHost) -> Self {
        let options = FileOptions {
            write: true,
            create: true,
            ..FileOptions::default()
        };
        let mut engine = host.engine(EngineKind::IoUring, 64).unwrap();
        let file = Arc::new(host.open(Path::new("disk"), options).unwrap());
        let file = engine.register(&file).unwrap();
        Self {
            host: host.clone(),
            engine,
            file,
            next: 0,
            done: Vec::new(),
            buffers: Vec::new(),
        }
    }

    fn start(&mut self, op: HostOp<'_>) -> Token {
        self.next += 1;
        let token = Token(self.next);
        // SAFETY: buffers are kept until the disk is dropped, which drops the engine first.
        let started = unsafe { self.engine.start(token, op) };
        match started {
            Started::Done(result) => self.done.push((token, result)),
            Started::Pending => {}
            Started::Full => panic!("full"),
        }
        self.engine.submit().unwrap();
        token
    }

    fn start_write(&mut self, offset: u64, bytes: &[u8], dsync: bool) -> Token {
        let buffers = Buffers::owned(AlignedBuf::from_slice(bytes));
        let token = self.start(HostOp::Write {
            file: self.file,
            offset,
            segments: buffers.segments(),
            dsync,
        });
        self.buffers.push(buffers);
        token
    }

    fn start_sync(&mut self) -> Token {
        self.start(HostOp::Sync { file: self.file })
    }

    fn finish(&mut self, token: Token) -> i32 {
        loop {
            self.engine.reap(&mut self.done);
            if let Some(at) = self.done.iter().position(|(done, _)| *done == token) {
                return self.done.remove(at).1;
            }
            assert!(!self.host.idle(), "would wait for ever");
            self.engine.wait(None).unwrap();
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        let token = self.start_write(offset, bytes, false);
        self.finish(token)
    }

    fn sync(&mut self) -> i32 {
        let token = self.start_sync();
        self.finish(token)
    }

    fn read(&mut self, offset: u64, len: usize) -> i32 {
        let buffers = Buffers::owned(AlignedBuf::zeroed(len));
        let token = self.start(HostOp::Read {
            file: self.file,
            offset,
            segments: buffers.segments(),
        });
        self.buffers.push(buffers);
        self.finish(token)
    }
}

fn content(host: &SimHost) -> Vec<u8> {
    host.file("disk").unwrap().content()
}

/// The value of each sector; panics when a sector is mixed, which no disk does.
fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(SECTOR)
        .map(|sector| {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "a torn sector"
            );
            sector[0]
        })
        .collect()
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = |seed| {
        let host = SimHost::new(SimConfig {
            p_short: 0.2,
            p_eintr: 0.1,
            p_error: 0.05,
            p_inline: 0.2,
            ..SimConfig::seeded(seed)
        });
        let mut disk = Disk::new(&host);
        let mut results = Vec::new();
        for round in 0..50u64 {
            let tokens: Vec<_> = (0..4)
                .map(|i| disk.start_write((round + i) * 700, &[round as u8; 1500], i == 3))
                .collect();
            for token in tokens {
                results.push(disk.finish(token));
            }
            results.push(disk.read(round * 700, 9000));
            results.push(disk.sync());
        }
        let after = host.power_cut();
        (
            results,
            host.trace(),
            host.now(),
            content(&host),
            content(&after),
        )
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).1, run(2).1);
}

#[test]
fn operations_end_in_any_order_and_overlapping_writes_in_any_state() {
    let mut orders = BTreeSet::new();
    let mut contents = BTreeSet::new();
    for seed in 0..64 {
        let host = SimHost::new(SimConfig::seeded(seed));
        let mut disk = Disk::new(&host);
        let tokens: Vec<_> = (1..=3)
            .map(|value| disk.start_write(0, &[value; SECTOR], false))
            .collect();
        for token in &tokens {
            while !disk.done.iter().any(|(done, _)| done == token) {
                disk.engine.wait(None).unwrap();
                disk.engine.reap(&mut disk.done);
            }
        }
        orders.insert(
            disk.done
                .iter()
                .map(|(token, _)| token.0)
                .collect::<Vec<_>>(),
        );
        contents.insert(content(&host)[0]);
    }
    assert_eq!(orders.len(), 6);
    assert_eq!(contents, BTreeSet::from([1, 2, 3]));
}

#[test]
fn nothing_starts_before_it_is_submitted() {
    let host = SimHost::new(SimConfig::default());
    let mut disk = Disk::new(&host);
    let buffers = Buffers::owned(AlignedBuf::zeroed(SECTOR));
    let op = HostOp::Write {
        file: disk.file,
        offset: 0,
        segments: buffers.segments(),
        dsync: false,
    };
    // SAFETY: the buffers live until the end of the test, and the operation is waited for.
    unsafe { disk.engine.start(Token(9), op) };
    assert!(!host.step());
    disk.engine.submit().unwrap();
    assert!(host.step());
    assert_eq!(disk.finish(Token(9)), 512);
}

#[test]
fn a_write_takes_its_bytes_when_it_ends() {
    let host = SimHost::new(SimConfig::default());
    let mut disk = Disk::new(&host);
    let token = disk.start_write(0, &[1; SECTOR], false);
    disk.buffers[0].copy_in(0, &[2; SECTOR]);
    disk.finish(token);
    assert_eq!(content(&host), [2; SECTOR]);
}

#[test]
fn engines_share_a_clock() {
    let host = SimHost::new(SimConfig::default());
    let (mut one, mut two) = (Disk::new(&host), Disk::new(&host));
    let late = one.start(HostOp::Timer {
        after: Duration::from_secs(2),
    });
    let early = two.start(HostOp::Timer {
        after: Duration::from_secs(1),
    });
    assert_eq!(one.finish(late), 0);
    assert_eq!(host.now(), Duration::from_secs(2));
    // The other engine's operation ended on the way.
    two.engine.reap(&mut two.done);
    assert_eq!(two.done, [(early, 0)]);
    assert!(host.idle());
    one.engine.wait(Some(Duration::from_secs(3))).unwrap();
    assert_eq!(host.now(), Duration::from_secs(5));
    one.engine.wait(None).unwrap();
    assert_eq!(host.now(), Duration::from_secs(5));
}

#[test]
fn a_sync_covers_exactly_what_had_ended() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..200 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[0; 4 * SECTOR]);
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; SECTOR]);
        // In flight when the sync starts: not covered, whichever ends first.
        let during = disk.start_write(512, &[2; SECTOR], false);
        let sync = disk.start_sync();
        disk.finish(during);
        assert_eq!(disk.finish(sync), 0);
        // And later ones are not either.
        disk.write(1024, &[3; SECTOR]);
        let after = sectors(&content(&host.power_cut()));
        assert_eq!(after[0], 1, "seed {seed}");
        assert!([0, 2].contains(&after[1]));
        assert!([0, 3].contains(&after[2]));
        if after[1] == 0 {
            lost += 1;
        } else {
            kept += 1;
        }
    }
    assert!(lost > 20 && kept > 20, "{lost} {kept}");
}

#[test]
fn a_power_cut_tears_between_sectors_and_keeps_older_data_older() {
    let mut torn = 0;
    for seed in 0..200 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[9; 8 * SECTOR]);
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; 8 * SECTOR]);
        // A durable write on top: what was written before it must not come back.
        let durable = disk.start_write(2048, &[2; SECTOR], true);
        assert_eq!(disk.finish(durable), 512);
        let flying = disk.start_write(512, &[3; 2 * SECTOR], false);
        let after = host.power_cut();
        let state = sectors(&content(&after));
        assert_eq!(state.len(), 8);
        assert_eq!(state[4], 2, "seed {seed}");
        for (index, value) in state.iter().enumerate() {
            let allowed: &[u8] = match index {
                1 | 2 => &[9, 1, 3],
                4 => &[2],
                _ => &[9, 1],
            };
            assert!(allowed.contains(value), "seed {seed}: {state:?}");
        }
        if state[5..].windows(2).any(|pair| pair[0] != pair[1]) {
            torn += 1;
        }
        // The old host is dead, and says so.
        assert_eq!(disk.finish(flying), -libc::EIO);
        assert_eq!(disk.write(0, &[7; SECTOR]), -libc::EIO);
        assert!(
            host.open(Path::new("disk"), FileOptions::default())
                .is_err()
        );
        assert_eq!(sectors(&content(&after)), state);
        // What survived is durable now.
        assert_eq!(sectors(&content(&after.power_cut())), state);
    }
    assert!(torn > 20, "{torn}");
}

#[test]
fn a_small_write_takes_its_whole_sector_along() {
    for seed in 0..100 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[0; SECTOR]);
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; 10]);
        disk.write(100, &[2; 10]);
        let after = content(&host.power_cut());
        // The second write carries the first: page cache and disk hold one sector.
        assert!(after[100] != 2 || after[0] == 1, "seed {seed}");
    }
}

#[test]
fn a_file_grows_in_order_or_not_at_all() {
    let mut lengths = BTreeSet::new();
    for seed in 0..200 {
        let host = SimHost::new(SimConfig::seeded(seed));
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; 2 * SECTOR]);
        assert_eq!(disk.sync(), 0);
        disk.write(1024, &[2; SECTOR]);
        disk.write(4096, &[3; SECTOR]);
        host.file("disk").unwrap().set_len(8192).unwrap();
        let after = content(&host.power_cut());
        lengths.insert(after.len());
        let state = sectors(&after);
        assert_eq!(state[..2], [1, 1]);
        for (index, value) in state.iter().enumerate().skip(2) {
            let allowed: &[u8] = match index {
                2 => &[0, 2],
                8 => &[0, 3],
                _ => &[0],
            };
            assert!(allowed.contains(value), "seed {seed}: {state:?}");
        }
    }
    assert_eq!(lengths, BTreeSet::from([1024, 1536, 4608, 8192]));
}

#[test]
fn a_durable_write_brings_the_length_it_needs() {
    for seed in 0..100 {
        let host = SimHost::new(SimConfig::seeded(seed));
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; 8 * SECTOR]);
        let durable = disk.start_write(2048, &[2; SECTOR], true);
        disk.finish(durable);
        let after = sectors(&content(&host.power_cut()));
        assert_eq!(after.len(), 8, "seed {seed}");
        assert_eq!(after[4], 2, "seed {seed}");
    }
}

#[test]
fn punched_ranges_are_not_durable_before_a_sync() {
    let mut states = BTreeSet::new();
    for seed in 0..100 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[1; 4 * SECTOR]);
        let mut disk = Disk::new(&host);
        let punch = |disk: &mut Disk, offset| {
            let token = disk.start(HostOp::Fallocate {
                file: disk.file,
                mode: FallocateMode::PunchHole,
                offset,
                len: 512,
            });
            assert_eq!(disk.finish(token), 0);
        };
        punch(&mut disk, 0);
        disk.sync();
        punch(&mut disk, 1024);
        states.insert(sectors(&content(&host.power_cut())));
    }
    assert_eq!(states, BTreeSet::from([vec![0, 1, 0, 1], vec![0, 1, 1, 1]]));
}

#[test]
fn a_failed_sync_loses_data_for_good() {
    let mut lost = 0;
    for seed in 0..100 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[0; 8 * SECTOR]);
        host.inject(SimFault {
            path: Some("disk".into()),
            op: SimOp::Sync,
            skip: 1,
            count: 1,
            errno: libc::EIO,
        });
        let mut disk = Disk::new(&host);
        assert_eq!(disk.sync(), 0);
        for index in 0..8u64 {
            disk.write(index * 512, &[1; SECTOR]);
        }
        assert_eq!(disk.sync(), -libc::EIO);
        assert_eq!(disk.sync(), 0);
        assert_eq!(sectors(&content(&host)), [1; 8]);
        let after = host.power_cut();
        lost += sectors(&content(&after))
            .iter()
            .filter(|value| **value == 0)
            .count();
    }
    assert!((200..600).contains(&lost), "{lost}");
}

#[test]
fn a_killed_process_loses_only_what_was_in_flight() {
    let mut done = 0;
    for seed in 0..100 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create("disk", &[0; 4 * SECTOR]);
        let mut disk = Disk::new(&host);
        disk.write(0, &[1; SECTOR]);
        disk.start_write(512, &[2; SECTOR], false);
        let after = host.kill();
        let state = sectors(&content(&after));
        assert_eq!(state[0], 1);
        done += usize::from(state[1] == 2);
        assert_eq!(disk.write(0, &[1; SECTOR]), -libc::EIO);
        // It is the page cache that survived, not the disk.
        assert!(after.file("disk").unwrap().unsynced() > 0);
        assert_eq!(
            after.file("disk").unwrap().durable_content(),
            [0; 4 * SECTOR]
        );
    }
    assert!((20..80).contains(&done), "{done}");
}

#[test]
fn planned_faults_hit_what_was_planned() {
    let host = SimHost::new(SimConfig::default());
    host.create("other", &[]);
    host.inject(SimFault {
        path: None,
        op: SimOp::Write,
        skip: 2,
        count: 1,
        errno: libc::ENOSPC,
    });
    let mut disk = Disk::new(&host);
    let results: Vec<_> = (0..4u64)
        .map(|i| disk.write(i * 512, &[1; SECTOR]))
        .collect();
    assert_eq!(results, [512, 512, -libc::ENOSPC, 512]);
    assert_eq!(sectors(&content(&host)), [1, 1, 0, 1]);
    assert_eq!(host.stats().writes, 4);
}

#[test]
fn held_operations_end_when_released() {
    let host = SimHost::new(SimConfig::default());
    let mut disk = Disk::new(&host);
    host.hold("disk", SimOp::Write);
    let held = disk.start_write(0, &[1; SECTOR], false);
    assert_eq!(disk.sync(), 0);
    assert!(host.idle());
    assert_eq!(host.in_flight(), 1);
    assert!(content(&host).is_empty());
    host.release("disk", SimOp::Write);
    assert_eq!(disk.finish(held), 512);
    assert_eq!(content(&host).len(), 512);
    // Dropping an engine waits for what is held too.
    host.hold("disk", SimOp::Write);
    disk.start_write(0, &[2; SECTOR], false);
    drop(disk);
    assert_eq!(content(&host)[0], 2);
}

#[test]
fn transfers_are_short_interrupted_and_failed() {
    let host = SimHost::new(SimConfig {
        p_short: 0.3,
        p_eintr: 0.1,
        p_error: 0.1,
        p_enospc: 0.3,
        ..SimConfig::seeded(5)
    });
    let mut disk = Disk::new(&host);
    let mut seen = BTreeSet::new();
    for round in 0..300u64 {
        let result = disk.write(round * 4096, &[1; 4096]);
        seen.insert(if result > 0 {
            assert!(result <= 4096);
            i32::from(result == 4096)
        } else {
            result
        });
    }
    let all = [1, 0, -libc::EINTR, -libc::EAGAIN, -libc::EIO, -libc::ENOSPC];
    assert_eq!(seen, BTreeSet::from(all));
}

#[test]
fn direct_files_demand_alignment() {
    let host = SimHost::new(SimConfig::default());
    host.create("disk", &[1; 8192]);
    let options = FileOptions {
        write: true,
        direct: true,
        ..FileOptions::default()
    };
    let file = Arc::new(host.open(Path::new("disk"), options).unwrap());
    assert!(file.is_direct());
    let mut disk = Disk::new(&host);
    disk.file = disk.engine.register(&file).unwrap();
    assert_eq!(disk.read(0, 4096), 4096);
    assert_eq!(disk.read(100, 512), -libc::EINVAL);
    assert_eq!(disk.read(0, 100), -libc::EINVAL);
    host.configure(|config| config.p_short = 1.0);
    for _ in 0..50 {
        assert_eq!(disk.read(0, 4096) % 512, 0);
    }
}

#[test]
fn files_of_another_host_are_refused() {
    let (one, two) = (
        SimHost::new(SimConfig::default()),
        SimHost::new(SimConfig::default()),
    );
    one.create("disk", b"x");
    let file = Arc::new(one.open(Path::new("disk"), FileOptions::default()).unwrap());
    let error = two
        .engine(EngineKind::Sync, 1)
        .unwrap()
        .register(&file)
        .unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
    let missing = one
        .open(Path::new("missing"), FileOptions::default())
        .unwrap_err();
    assert_eq!(missing.kind(), block::ErrorKind::NotFound);
}

#[test]
fn a_file_is_saved_for_other_programs() {
    let host = SimHost::new(SimConfig::default());
    let file = host.create("disk", b"hello");
    file.set_len(1 << 20).unwrap();
    file.poke((1 << 20) - 2, b"x");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved");
    file.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), file.content());
    assert_eq!(host.paths(), [Path::new("disk")]);
}
