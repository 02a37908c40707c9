//! Micro-benchmarks by criterion: hot paths on files in memory, and codecs.
//!
//! `cargo bench -p platter-benches --bench micro -- [TEXT]` times those with TEXT in their name.

#![expect(missing_docs, reason = "criterion's macros make public functions")]

use std::{path::Path, time::Duration};

use block::{
    DiskFile as _, Format, OpenOptions,
    formats::qcow2::{
        create::{CreateOptions, create},
        header::CompressionType,
    },
    offline::{OfflineOptions, with_file_on},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use platter_benches::{Result, cases::CASES, memory::MemoryHost, side::Stop};

/// Accesses of one iteration: whole batches.
const BATCH: u64 = 16_000;

/// Maps, queues and rings: 512 bytes, 32 in flight.
fn paths(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("path");
    group.throughput(Throughput::Elements(BATCH));
    for case in CASES {
        let mut load = case.load().expect("an image in memory");
        group.bench_function(case.name, |bencher| {
            bencher.iter(|| load.run(Stop::After(BATCH), 1).expect("accesses"));
        });
    }
    group.finish();
}

/// Clusters that are written compressed, and read where nothing keeps them.
fn codecs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(CLUSTER));
    for (name, codec) in [
        ("zlib", CompressionType::Zlib),
        ("zstd", CompressionType::Zstd),
    ] {
        let disk = compressed_disk(codec).expect("an image in memory");
        let mut cluster = cluster();
        group.bench_function(format!("{name} write and flush"), |bencher| {
            bencher.iter(|| {
                disk.write_compressed(&cluster, 0).expect("a write");
                // What was there before is free only after this.
                disk.flush().expect("a flush");
            });
        });
        let mut next = 0;
        group.bench_function(format!("{name} read"), |bencher| {
            bencher.iter(|| {
                disk.read_at(&mut cluster, next * CLUSTER).expect("a read");
                next = (next + 1) % CLUSTERS;
            });
        });
    }
    group.finish();
}

const CLUSTER: u64 = 64 << 10;

/// More than the decompressed clusters that are kept.
const CLUSTERS: u64 = 256;

/// Text-like data: compresses to about a third.
fn cluster() -> Vec<u8> {
    let mut random = platter_benches::load::Random::seeded(1);
    (0..CLUSTER / 8)
        .flat_map(|_| {
            [
                random.below(256) as u8,
                random.below(16) as u8,
                7,
                7,
                7,
                7,
                7,
                7,
            ]
        })
        .collect()
}

fn compressed_disk(codec: CompressionType) -> Result<block::Disk> {
    let host = MemoryHost::new(2 * (CLUSTER * CLUSTERS) as usize);
    let options = CreateOptions {
        size: CLUSTER * CLUSTERS,
        compression_type: codec,
        ..CreateOptions::default()
    };
    let path = Path::new("disk");
    with_file_on(
        host.clone(),
        path,
        OfflineOptions::create(),
        async |io, file| create(io, file, &options).await,
    )?;
    let disk = OpenOptions::new()
        .format(Format::Qcow2)
        .open_on(path, host)?;
    for number in 0..CLUSTERS {
        disk.write_compressed(&cluster(), number * CLUSTER)?;
    }
    Ok(disk)
}

criterion_group! {
    name = all;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = paths, codecs
}
criterion_main!(all);
