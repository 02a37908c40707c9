//! Checking and repairing qcow2 images, against `qemu-img check`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::{fs, path::Path};

use block::{
    Result,
    formats::qcow2::{
        check::{CheckReport, Repair, check},
        header::{Header, Incompatible},
        repair::repair_dirty,
    },
    io::EngineKind,
    offline::{OfflineOptions, with_file},
};
use qcow2_support::{
    Random, assert_clean, header, on, qemu_check, qemu_create, qemu_io, temp_dir, tool, try_tool,
};
use tempfile::TempDir;

/// Checks an image: the report and the lines.
fn run(path: &Path, repair: Repair) -> Result<(CheckReport, Vec<String>)> {
    let mut lines = Vec::new();
    let report = on(path, async |io, file| {
        let mut header = Header::read_for_check(io, file).await?;
        check(io, file, &mut header, repair, &mut |line| {
            lines.push(line.to_owned());
        })
        .await
    })?;
    Ok((report, lines))
}

/// Images with everything that takes clusters.
fn samples(dir: &TempDir) -> Vec<std::path::PathBuf> {
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![0x5a; 2 << 20]).unwrap();
    let mut samples = Vec::new();
    for (n, options) in [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=8",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2M",
        "compat=0.10,cluster_size=1k",
        "refcount_bits=1,cluster_size=4k",
        "refcount_bits=2,cluster_size=4k",
        "preallocation=metadata,cluster_size=4k",
        "compression_type=zstd,cluster_size=16k",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
    ]
    .into_iter()
    .enumerate()
    {
        let mut options = options.to_owned();
        if n % 3 == 1 && n != 7 {
            options += &format!(",backing_file={},backing_fmt=raw", base.display());
        }
        let path = qemu_create(dir, &format!("s{n}.qcow2"), &options, "8M");
        let text = path.to_str().unwrap();
        qemu_io(
            &path,
            &[
                "write -P 1 0 300k",
                "write -P 2 2M 70k",
                "discard 4M 128k",
                "write -c -P 3 4M 64k",
                "write -c -P 4 4160k 64k",
                "write -z 5M 128k",
                "write -z -u 6M 64k",
                "discard 2M 32k",
            ]
            .map(|command| {
                // Compressed writes are whole clusters.
                if options.contains("2M") {
                    command.replace("64k", "2M").replace("4160k", "6M")
                } else {
                    command.to_owned()
                }
            })
            .each_ref()
            .map(String::as_str),
        );
        if !options.contains("refcount_bits=1,") && !options.contains("refcount_bits=2") {
            // Narrow reference counts refuse it.
            try_tool("qemu-img", &["snapshot", "-c", "one", text]);
            qemu_io(&path, &["write -P 5 64k 128k", "write -P 6 7M 64k"]);
            // Narrow reference counts refuse it.
            try_tool("qemu-img", &["snapshot", "-c", "two", text]);
            qemu_io(&path, &["write -P 7 0 64k"]);
        }
        if !options.contains("0.10") {
            tool("qemu-img", &["bitmap", "--add", "-g", "64k", text, "b0"]);
            qemu_io(&path, &["write -P 8 1M 64k"]);
            tool("qemu-img", &["bitmap", "--add", "--disable", text, "b1"]);
        }
        samples.push(path);
    }
    samples
}

/// The fields of a report that the formats have in common.
const FIELDS: [&str; 8] = [
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "check-errors",
    "corruptions",
    "leaks",
];

#[test]
fn clean_images_are_clean_and_counted_alike() {
    let dir = temp_dir();
    for path in samples(&dir) {
        let before = fs::read(&path).unwrap();
        let (report, lines) = run(&path, Repair::None).unwrap();
        assert!(
            report.is_clean() && lines.is_empty(),
            "{path:?}: {report:?} {lines:?}"
        );
        let (status, theirs) = qemu_check(&path);
        assert_eq!(status, 0);
        let ours = serde_json::to_value(&report).unwrap();
        for field in FIELDS {
            assert_eq!(ours[field], theirs[field], "{field}: {ours} {theirs}");
        }
        for repair in [Repair::Leaks, Repair::All] {
            let (report, lines) = run(&path, repair).unwrap();
            assert!(
                report.is_clean() && lines.is_empty(),
                "{path:?}: {report:?}"
            );
        }
        assert!(fs::read(&path).unwrap() == before, "{path:?} changed");
        let options = OfflineOptions {
            engine: EngineKind::IoUring,
            ..OfflineOptions::read()
        };
        let uring = with_file(&path, options, async |io, file| {
            let mut header = Header::read_for_check(io, file).await?;
            check(io, file, &mut header, Repair::None, &mut |_| {}).await
        });
        assert_eq!(uring.unwrap(), report_of(&path));
    }
}

#[test]
fn counts_above_a_byte() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "cluster_size=4k", "1M");
    qemu_io(&path, &["write -P 1 0 300k", "write -c -P 2 512k 64k"]);
    for n in 0..260 {
        tool(
            "qemu-img",
            &["snapshot", "-c", &n.to_string(), path.to_str().unwrap()],
        );
    }
    let (report, lines) = run(&path, Repair::None).unwrap();
    assert!(report.is_clean(), "{lines:?}");
    poke(&path, 48, &[0; 12]);
    let (report, lines) = run(&path, Repair::All).unwrap();
    assert!(report.is_clean(), "{lines:?}");
    assert_clean(&path, "rebuilt");
}

fn report_of(path: &Path) -> CheckReport {
    run(path, Repair::None).unwrap().0
}

/// Whether something is wrong: corruptions or errors, and leaks.
fn verdict(report: &CheckReport) -> (bool, bool) {
    (
        report.corruptions + report.check_errors > 0 || report.stopped,
        report.leaks > 0,
    )
}

/// Where metadata is, to damage it.
fn metadata(path: &Path) -> Vec<u64> {
    let bytes = fs::read(path).unwrap();
    let header = header(path);
    let be64 = |at: u64| {
        bytes
            .get(at as usize..at as usize + 8)
            .map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
    };
    let mask = 0x00ff_ffff_ffff_fe00;
    let mut places = Vec::new();
    let mut add = |start: u64, len: u64| {
        // Entries in use and some that are not.
        for at in (start..start + len).step_by(8) {
            if be64(at) != 0 || at % 1024 == 0 {
                places.extend(at..at + 8);
            }
        }
    };
    add(header.l1_table_offset, u64::from(header.l1_size) * 8);
    add(header.refcount_table_offset, header.cluster_size());
    for n in 0..u64::from(header.l1_size) {
        let table = be64(header.l1_table_offset + n * 8) & mask;
        if table != 0 {
            add(table, header.cluster_size());
        }
    }
    for n in 0..header.cluster_size() / 8 {
        let block = be64(header.refcount_table_offset + n * 8);
        if block != 0 {
            add(block, header.cluster_size());
        }
    }
    if header.nb_snapshots > 0 {
        add(header.snapshots_offset, 200);
    }
    places
}

#[test]
fn damaged_images_get_the_same_verdict_and_repair() {
    let dir = temp_dir();
    let rounds: u64 = std::env::var("ROUNDS").map_or(6, |rounds| rounds.parse().unwrap());
    let mut random =
        Random(std::env::var("SEED").map_or(0x9e37_79b9, |seed| seed.parse().unwrap()));
    let damaged = dir.path().join("damaged.qcow2");
    let mut corrupt = 0;
    for sample in samples(&dir) {
        let original = fs::read(&sample).unwrap();
        let places = metadata(&sample);
        for _ in 0..rounds {
            let mut bytes = original.clone();
            let mut flips = Vec::new();
            for _ in 0..1 + random.below(3) {
                let at = places[random.below(places.len() as u64) as usize];
                let bit = random.below(8);
                if (at as usize) < bytes.len() {
                    bytes[at as usize] ^= 1 << bit;
                    flips.push((at, bit));
                }
            }
            fs::write(&damaged, &bytes).unwrap();
            let what = format!("{sample:?} with bits {flips:x?} flipped");
            corrupt += u64::from(compare(&damaged, &what));
        }
    }
    assert!(corrupt > rounds, "damage was found: {corrupt}");
}

/// Compares verdicts, then repairs. Returns whether the image was corrupt.
fn compare(damaged: &Path, what: &str) -> bool {
    let bytes = fs::read(damaged).unwrap();
    let text = damaged.to_str().unwrap();
    let theirs = try_tool("qemu-img", &["check", "-f", "qcow2", "--output=json", text]);
    let status = theirs.status.code().unwrap_or(-1);
    let json: serde_json::Value =
        serde_json::from_slice(&theirs.stdout).unwrap_or(serde_json::Value::Null);
    let ours = run(damaged, Repair::None);
    assert!(fs::read(damaged).unwrap() == bytes, "{what}: a check wrote");
    let (report, lines) = match ours {
        Ok(ours) => ours,
        Err(error) => {
            assert_eq!(status, 1, "{what}: {error}, {json}");
            return true;
        }
    };
    let (corrupt, leaks) = verdict(&report);
    let stderr = String::from_utf8_lossy(&theirs.stderr);
    let detail = format!("{what}\nours {report:?}\n{lines:#?}\ntheirs {status} {json}\n{stderr}");
    let their_corrupt = status == 1 || json["corruptions"].as_u64().unwrap_or(0) > 0;
    assert_eq!(corrupt, their_corrupt, "{detail}");
    if status != 1 && !report.stopped {
        assert_eq!(leaks, json["leaks"].as_u64().unwrap_or(0) > 0, "{detail}");
    }

    let copy = damaged.with_extension("copy");
    fs::copy(damaged, &copy).unwrap();
    let (fixed, fix_lines) = run(&copy, Repair::All).unwrap();
    let (again, again_lines) = run(&copy, Repair::None).unwrap();
    let (theirs_after, json_after) = qemu_check(&copy);
    let detail = format!(
        "{detail}\nrepair {fixed:?}\n{fix_lines:#?}\nagain {again:?}\n{again_lines:#?}\n\
         theirs after {theirs_after} {json_after}"
    );
    if fixed.is_clean() && !fixed.stopped {
        assert!(again.is_clean(), "{detail}");
        assert_eq!(theirs_after, 0, "{detail}");
    }
    // Where QEMU repairs, so do we.
    fs::copy(damaged, &copy).unwrap();
    let repaired = try_tool(
        "qemu-img",
        &["check", "-f", "qcow2", "-r", "all", copy.to_str().unwrap()],
    );
    // QEMU 10.0.2 loses all snapshots when it repairs an image with bitmaps: that is no measure.
    let kept = nb_snapshots(&copy) == bytes[60..64];
    // It also makes the file as long as a block outside of it demands.
    let sane = copy.metadata().unwrap().len() < 1 << 30;
    if kept && sane && repaired.status.success() && qemu_check(&copy).0 == 0 {
        assert!(
            fixed.is_clean(),
            "{detail}\n{}",
            String::from_utf8_lossy(&repaired.stderr)
        );
    }
    corrupt
}

fn nb_snapshots(path: &Path) -> [u8; 4] {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 4];
    fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, 60)
        .unwrap();
    bytes
}

/// Overwrites bytes of a file.
fn poke(path: &Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, at)
        .unwrap();
}

#[test]
fn says_what_qemu_says() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "", "4M");
    qemu_io(&path, &["write 0 1M", "write -c 1M 64k"]);
    let header = header(&path);
    let block = header.refcount_table_offset + header.cluster_size();
    poke(&path, block + 8, &[0, 2]);
    poke(&path, block + 18, &[0, 3]);
    let (report, lines) = run(&path, Repair::None).unwrap();
    let theirs = try_tool("qemu-img", &["check", path.to_str().unwrap()]);
    let stderr = String::from_utf8_lossy(&theirs.stderr).into_owned();
    let their_lines: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("ERROR") || line.starts_with("Leaked"))
        .collect();
    assert_eq!(lines, their_lines);
    assert_eq!((report.leaks, report.corruptions), (2, 2), "{lines:?}");

    let (report, lines) = run(&path, Repair::Leaks).unwrap();
    assert_eq!(report.leaks_fixed, 2);
    assert!(
        lines.contains(&"Repairing cluster 4 refcount=2 reference=1".to_owned()),
        "{lines:?}"
    );
    assert_clean(&path, "leaks repaired");
}

#[test]
fn rebuilds_reference_counts_from_nothing() {
    let dir = temp_dir();
    for sample in samples(&dir) {
        let sample_header = header(&sample);
        let damage: [(&str, u64, Vec<u8>); 4] = [
            ("no table", 48, vec![0; 12]),
            (
                "table entry misaligned",
                sample_header.refcount_table_offset,
                vec![0xff; 8],
            ),
            (
                "table entry gone",
                sample_header.refcount_table_offset,
                vec![0; 8],
            ),
            ("table outside", 48, (1u64 << 40).to_be_bytes().to_vec()),
        ];
        for (what, at, bytes) in damage {
            let path = dir.path().join("x.qcow2");
            fs::copy(&sample, &path).unwrap();
            poke(&path, at, &bytes);
            let (report, _) = run(&path, Repair::Leaks).unwrap();
            assert!(
                report.stopped && report.check_errors == 1,
                "{what}: {report:?}"
            );
            let (report, lines) = run(&path, Repair::All).unwrap();
            assert!(report.is_clean(), "{sample:?} {what}: {report:?} {lines:?}");
            assert!(lines.contains(&"Rebuilding refcount structure".to_owned()));
            assert_clean(&path, what);
            let again = report_of(&path);
            assert!(again.is_clean(), "{again:?}");
            let text = path.to_str().unwrap();
            tool("qemu-img", &["compare", sample.to_str().unwrap(), text]);
        }
    }
}

#[test]
fn dirty_images_are_repaired() {
    let dir = temp_dir();
    for (n, sample) in samples(&dir).into_iter().enumerate() {
        let mut header = header(&sample);
        if header.version < 3 {
            continue;
        }
        header.incompatible_features.insert(Incompatible::DIRTY);
        on(&sample, async |io, file| {
            header.write_features(io, file).await
        })
        .unwrap();
        // As after a crash with lazy reference counts: the block says nothing.
        let block = {
            let bytes = fs::read(&sample).unwrap();
            let at = header.refcount_table_offset as usize;
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        if n % 2 == 0 {
            poke(&sample, block + 16, &[0; 40]);
        }
        let (report, _) = run(&sample, Repair::None).unwrap();
        assert_eq!(n % 2 == 0, report.corruptions > 0);
        on(&sample, async |io, file| {
            let mut header = Header::read(io, file).await?;
            repair_dirty(io, file, &mut header).await?;
            assert!(!header.has(Incompatible::DIRTY));
            assert!(header.to_bytes()? == Header::read(io, file).await?.to_bytes()?);
            Ok(())
        })
        .unwrap();
        assert_clean(&sample, "dirty");
    }
}

#[test]
fn a_corrupt_bit_goes_only_when_nothing_is_wrong() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "", "4M");
    qemu_io(&path, &["write 0 1M"]);
    poke(&path, 72, &2u64.to_be_bytes());
    let (report, _) = run(&path, Repair::None).unwrap();
    assert!(report.is_clean());
    assert!(header(&path).has(Incompatible::CORRUPT));
    let l2 = 4 * 65536;
    let entry = fs::read(&path).unwrap()[l2..l2 + 8].to_vec();
    // A data cluster far outside the file cannot be repaired.
    poke(&path, l2 as u64, &(1u64 << 50 | 1 << 63).to_be_bytes());
    let (report, lines) = run(&path, Repair::All).unwrap();
    assert!(report.corruptions > 0, "{lines:?}");
    assert!(header(&path).has(Incompatible::CORRUPT));
    assert!(
        on(&path, async |io, file| {
            let mut header = Header::read(io, file).await?;
            header.incompatible_features.insert(Incompatible::DIRTY);
            repair_dirty(io, file, &mut header).await
        })
        .is_err()
    );
    poke(&path, l2 as u64, &entry);
    let (report, lines) = run(&path, Repair::All).unwrap();
    assert!(report.is_clean(), "{lines:?}");
    assert!(!header(&path).has(Incompatible::CORRUPT));
    assert_clean(&path, "restored");
}

#[test]
fn hostile_tables_cost_little() {
    // 65536 snapshots that share one huge L1 table whose entries all name one L2 table.
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "cluster_size=64k", "4M");
    qemu_io(&path, &["write 0 1M"]);
    let l1_entries = 1u32 << 20;
    let table = 1u64 << 30;
    let l1 = (1u64 << 30) + (8 << 20);
    let l2 = fs::read(&path).unwrap()[0x3_0000..0x3_0008].to_vec();
    let mut bytes = Vec::new();
    for n in 0u32..65_536 {
        bytes.extend(l1.to_be_bytes());
        bytes.extend(l1_entries.to_be_bytes());
        bytes.extend([0, 4, 0, 0]);
        bytes.extend([0; 20]);
        bytes.extend(16u32.to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend(n.to_be_bytes());
        bytes.extend([0; 4]);
    }
    poke(&path, table, &bytes);
    poke(&path, l1, &l2.repeat(l1_entries as usize));
    poke(&path, 60, &65_536u32.to_be_bytes());
    poke(&path, 64, &table.to_be_bytes());
    let start = std::time::Instant::now();
    let (report, _) = run(&path, Repair::None).unwrap();
    assert!(report.corruptions > 0);
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

/// Prints the time of a check beside qemu-img's: `cargo test --release … -- --ignored`.
#[test]
#[ignore = "a measurement"]
fn speed_beside_qemu() {
    let dir = temp_dir();
    for (options, size) in [
        ("preallocation=metadata", "1T"),
        ("preallocation=metadata,cluster_size=4k", "16G"),
        (
            "preallocation=metadata,cluster_size=2M,refcount_bits=1",
            "64T",
        ),
    ] {
        let path = qemu_create(&dir, "speed.qcow2", options, size);
        for round in 0..2 {
            let start = std::time::Instant::now();
            let report = report_of(&path);
            let ours = start.elapsed();
            assert!(report.is_clean());
            let start = std::time::Instant::now();
            assert_clean(&path, options);
            let theirs = start.elapsed();
            println!("{options} {size} round {round}: {ours:?}, qemu-img {theirs:?}");
        }
        fs::remove_file(&path).unwrap();
    }
}
