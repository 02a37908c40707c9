//! Micro-benchmarks by criterion: hot paths on files in memory, map lookups, rings, batches and codecs.
//!
//! `cargo bench -p platter-benches --bench micro -- [TEXT]` times those with TEXT in their name.

#![expect(missing_docs, reason = "criterion's macros make public functions")]

use std::{path::Path, time::Duration};

use block::{
    DiskFile as _, Format, OpenOptions,
    codec::{self, Inflate as _, MinizOxide, ZlibRs},
    formats::qcow2::{
        create::{CreateOptions, create},
        header::CompressionType,
    },
    offline::{OfflineOptions, with_file_on},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use platter_benches::{
    Result, Work,
    cases::CASES,
    load::{Random, Straight, Virtio},
    memory::MemoryHost,
    side::{Load as _, Stop},
};
use virtio_devices::testing::NullDisk;

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

/// Lookups in a map alone: what is at an offset, cluster by cluster in no order.
fn maps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map lookup");
    for case in CASES {
        if !matches!(case.name, "raw read" | "qcow2 read" | "subcluster read") {
            continue;
        }
        let disk = case.disk().expect("an image in memory");
        let clusters = disk.size() / CLUSTER;
        let mut random = Random::seeded(1);
        group.bench_function(case.name.trim_end_matches(" read"), |bencher| {
            bencher.iter(|| {
                let offset = random.below(clusters) * CLUSTER;
                disk.block_status(offset, 512).expect("a status")
            });
        });
    }
    group.finish();
}

/// Rings alone: the driver's side and the device's, on a disk that does nothing.
fn rings(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(BATCH));
    for depth in [1, 32, 128] {
        let work = Work {
            depth,
            ..CASES[0].work()
        };
        let disk = Box::new(NullDisk(work.size));
        let mut load = Virtio::new(disk, work, false).expect("a device");
        group.bench_function(format!("{depth} requests at a time"), |bencher| {
            bencher.iter(|| load.run(Stop::After(BATCH), 1).expect("requests"));
        });
    }
    group.finish();
}

/// Batches through a queue, by their size.
fn submits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("submit");
    group.throughput(Throughput::Elements(BATCH));
    let disk = CASES[0].disk().expect("an image in memory");
    for depth in [1, 8, 32, 128] {
        let work = Work {
            depth,
            ..CASES[0].work()
        };
        let mut load = Straight::new(&*disk, work).expect("a queue");
        group.bench_function(format!("batch of {depth}"), |bencher| {
            bencher.iter(|| load.run(Stop::After(BATCH), 1).expect("accesses"));
        });
    }
    group.finish();
}

/// Codecs alone, a cluster at a time.
fn bare_codecs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bare codec");
    group.throughput(Throughput::Bytes(CLUSTER));
    let plain = cluster();
    let mut output = vec![0; plain.len()];
    let limit = plain.len();
    let deflated = codec::deflate(&plain, limit).expect("it compresses");
    let frame = codec::zstd_compress(&plain, limit).expect("it compresses");
    group.bench_function("deflate", |bencher| {
        bencher.iter(|| codec::deflate(&plain, limit));
    });
    group.bench_function("inflate, zlib-rs", |bencher| {
        bencher.iter(|| ZlibRs.inflate(&deflated, &mut output).expect("a stream"));
    });
    group.bench_function("inflate, miniz_oxide", |bencher| {
        bencher.iter(|| {
            MinizOxide
                .inflate(&deflated, &mut output)
                .expect("a stream");
        });
    });
    group.bench_function("zstd compress", |bencher| {
        bencher.iter(|| codec::zstd_compress(&plain, limit));
    });
    group.bench_function("zstd decompress", |bencher| {
        bencher.iter(|| codec::zstd_decompress(&frame, &mut output).expect("a frame"));
    });
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
    let mut random = Random::seeded(1);
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
    targets = paths, maps, rings, submits, bare_codecs, codecs
}
criterion_main!(all);
