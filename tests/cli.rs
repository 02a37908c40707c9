//! The program from outside: its own commands, their results and their exit statuses.

mod cli_support;

use cli_support::{Lab, fails, ok};

#[test]
fn an_image_is_made_filled_checked_and_copied() {
    let lab = Lab::new();
    let made = ok(lab.platter(&["create", "-f", "qcow2", "a.qcow2", "64M"]));
    assert!(made.starts_with("Formatting 'a.qcow2', fmt=qcow2 cluster_size=65536"));
    ok(lab.platter(&[
        "io",
        "-c",
        "write -P 1 0 1M",
        "-c",
        "write -P 2 9M 10k",
        "-c",
        "write -z 2M 64k",
        "a.qcow2",
    ]));
    for (target, args) in [
        ("b.raw", &["-O", "raw"][..]),
        ("c.qcow2", &["-O", "qcow2"]),
        (
            "d.qcow2",
            &["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
        ),
        ("e.raw", &["-S", "0", "-O", "raw", "-W"]),
        (
            "f.qcow2",
            &["-m", "1", "-c", "-O", "qcow2", "-o", "cluster_size=4k"],
        ),
        // By requests in flight instead of threads.
        ("g.raw", &["--engine", "io_uring", "-O", "raw"]),
        ("h.qcow2", &["-t", "none", "-T", "none", "-O", "qcow2"]),
        (
            "i.qcow2",
            &["--engine", "io_uring", "-m", "3", "-W", "-O", "qcow2"],
        ),
    ] {
        let mut all = vec!["convert"];
        all.extend(args);
        all.extend(["-f", "qcow2", "a.qcow2", target]);
        ok(lab.platter(&all));
        let same = ok(lab.platter(&["compare", "a.qcow2", target]));
        assert_eq!(same, "Images are identical.\n", "{target}");
        if target.ends_with("qcow2") {
            let checked = ok(lab.platter(&["check", target]));
            assert!(checked.starts_with("No errors were found on the image."));
        }
    }
    assert!(lab.allocated("b.raw") < 2 << 20, "zeroes were written");
    assert!(
        lab.allocated("e.raw") >= 64 << 20,
        "everything was to be written"
    );
}

#[test]
fn a_copy_lies_in_the_order_of_the_disk() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "raw", "a.raw", "32M"]));
    ok(lab.platter(&["io", "-f", "raw", "-c", "write -P 1 0 32M", "a.raw"]));
    for extra in [&["-m", "16"][..], &["--engine", "io_uring"]] {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(extra);
        args.extend(["a.raw", "b.qcow2"]);
        ok(lab.platter(&args));
        let map = ok(lab.platter(&["map", "--output=json", "b.qcow2"]));
        let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
        let offsets: Vec<u64> = map
            .as_array()
            .expect("runs")
            .iter()
            .filter_map(|run| run["offset"].as_u64())
            .collect();
        assert!(offsets.is_sorted() && !offsets.is_empty(), "{offsets:?}");
    }
}

#[test]
fn a_copy_that_fails_names_the_file() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]));
    ok(lab.platter(&["io", "-c", "write -P 1 0 64k", "a.qcow2"]));
    let path = lab.path("a.qcow2");
    let mut bytes = std::fs::read(&path).expect("the image");
    let word = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
    };
    let l1 = word(&bytes, 40) as usize;
    let l2 = (word(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 6] |= 2; // The data does not start at a cluster any more.
    std::fs::write(&path, bytes).expect("the image");
    for extra in [&["-O", "raw"][..], &["-c", "-O", "qcow2"]] {
        let mut args = vec!["convert", "-f", "qcow2"];
        args.extend(extra);
        args.extend(["a.qcow2", "b"]);
        let text = fails(1, lab.platter(&args));
        assert!(
            text.contains("a.qcow2") && text.contains("cluster boundary"),
            "{text}"
        );
        assert!(!lab.path("b").exists());
    }
}

#[test]
fn an_overlay_keeps_only_what_differs() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]));
    ok(lab.platter(&["io", "-c", "write -P 1 0 4M", "base.qcow2"]));
    ok(lab.platter(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "o.qcow2",
    ]));
    ok(lab.platter(&["io", "-c", "write -P 2 1M 64k", "o.qcow2"]));
    ok(lab.platter(&[
        "convert",
        "-O",
        "qcow2",
        "-B",
        "base.qcow2",
        "-F",
        "qcow2",
        "o.qcow2",
        "p.qcow2",
    ]));
    ok(lab.platter(&["compare", "o.qcow2", "p.qcow2"]));
    let map = ok(lab.platter(&["map", "p.qcow2"]));
    let here: Vec<_> = map
        .lines()
        .filter(|line| line.ends_with("p.qcow2"))
        .collect();
    assert_eq!(here.len(), 1, "{map}");
    assert!(here[0].starts_with("0x100000        0x10000"), "{map}");
    let info = ok(lab.platter(&["info", "--backing-chain", "--output", "json", "p.qcow2"]));
    let list: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    assert_eq!(list[0]["backing-filename"], "base.qcow2");
    assert_eq!(list[1]["virtual-size"], 8 << 20);
}

#[test]
fn what_could_not_be_completed_is_not_left_behind() {
    let lab = Lab::new();
    fails(
        1,
        lab.platter(&["create", "-f", "qcow2", "-o", "cluster_size=3k", "x", "1M"]),
    );
    fails(
        1,
        lab.platter(&[
            "create", "-f", "qcow2", "-b", "missing", "-F", "raw", "x", "1M",
        ]),
    );
    fails(1, lab.platter(&["convert", "-O", "qcow2", "missing", "x"]));
    assert!(!lab.path("x").exists());
    // A source that turns out to be broken while it is copied: its second table is nowhere.
    ok(lab.platter(&["create", "-q", "-f", "qcow2", "a.qcow2", "1G"]));
    ok(lab.platter(&["io", "-c", "write -P 1 0 8M", "a.qcow2"]));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(lab.path("a.qcow2"))
        .expect("opens");
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x80, 0, 0, 0, 0, 5, 2, 0], 0x3_0008)
        .expect("written");
    let text = fails(1, lab.platter(&["convert", "-O", "raw", "a.qcow2", "x"]));
    assert!(text.contains("reading"), "{text}");
    assert!(!lab.path("x").exists());
    // What was there before stays.
    std::fs::write(lab.path("kept"), b"kept").expect("write");
    fails(
        1,
        lab.platter(&["convert", "-O", "qcow2", "missing", "kept"]),
    );
    assert_eq!(std::fs::read(lab.path("kept")).expect("read"), b"kept");
}

#[test]
fn files_outside_the_folder_are_opened_for_qemu_alone() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("sub")).expect("folder");
    ok(lab.platter(&["create", "-q", "-f", "raw", "base.raw", "1M"]));
    ok(lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "../base.raw",
        "-F",
        "raw",
        "sub/o.qcow2",
    ]));
    let text = fails(
        1,
        lab.platter(&["io", "-r", "-c", "read 0 1k", "sub/o.qcow2"]),
    );
    assert!(text.contains("outside the folders"), "{text}");
    ok(lab.qemu_io(&["-r", "-c", "read 0 1k", "sub/o.qcow2"]));
    // Looking at the image itself opens nothing else.
    ok(lab.platter(&["info", "sub/o.qcow2"]));
}

#[test]
fn sizes_change_and_snapshots_bring_data_back() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]));
    assert_eq!(
        ok(lab.platter(&["resize", "a.qcow2", "+1M"])),
        "Image resized.\n"
    );
    assert_eq!(
        ok(lab.platter(&["io", "-c", "length", "a.qcow2"])),
        "2 MiB\n"
    );
    fails(1, lab.platter(&["resize", "a.qcow2", "-1M"]));
    ok(lab.platter(&["io", "-c", "write -P 1 0 64k", "a.qcow2"]));
    ok(lab.platter(&["snapshot", "-c", "one", "a.qcow2"]));
    ok(lab.platter(&["io", "-c", "write -P 2 0 64k", "a.qcow2"]));
    ok(lab.platter(&["convert", "-l", "one", "-O", "raw", "a.qcow2", "one.raw"]));
    ok(lab.platter(&["io", "-f", "raw", "-r", "-c", "read -P 1 0 64k", "one.raw"]));
    assert!(ok(lab.platter(&["snapshot", "-l", "a.qcow2"])).contains("one"));
    ok(lab.platter(&["snapshot", "-a", "one", "a.qcow2"]));
    ok(lab.platter(&["io", "-c", "read -P 1 0 64k", "a.qcow2"]));
    ok(lab.platter(&["snapshot", "-d", "one", "a.qcow2"]));
    assert_eq!(ok(lab.platter(&["snapshot", "-l", "a.qcow2"])), "");
    ok(lab.platter(&["check", "a.qcow2"]));
}

#[test]
fn a_part_is_copied_and_measured() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]));
    ok(lab.platter(&["io", "-c", "write -P 5 1M 1M", "a.qcow2"]));
    ok(lab.platter(&[
        "dd",
        "if=a.qcow2",
        "of=part.raw",
        "bs=1M",
        "skip=1",
        "count=1",
    ]));
    assert_eq!(
        std::fs::read(lab.path("part.raw")).expect("read"),
        vec![5; 1 << 20]
    );
    let sizes = ok(lab.platter(&["measure", "-O", "qcow2", "--output", "json", "a.qcow2"]));
    let sizes: serde_json::Value = serde_json::from_str(&sizes).expect("JSON");
    assert_eq!(sizes["required"], (5 * 65536) + (1 << 20));
}

#[test]
fn a_bench_verifies_and_reports() {
    let lab = Lab::new();
    let rows = ok(lab.platter(&[
        "bench",
        "--runtime",
        "0.1",
        "--size",
        "16M",
        "--engine",
        "sync",
        "--directory",
        ".",
        "--output",
        "json",
    ]));
    let rows: serde_json::Value = serde_json::from_str(&rows).expect("JSON");
    let rows = rows["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2 * 2 * 4, "formats, front ends, patterns");
    for row in rows {
        assert!(row["iops"].as_f64() > Some(0.0), "{row}");
        assert!(
            row["lat_ns"]["p999"].as_u64() >= row["lat_ns"]["p50"].as_u64(),
            "{row}"
        );
        let buckets = row["lat_hist_ns"].as_array().expect("buckets");
        let counted: Option<u64> = buckets.iter().map(|bucket| bucket["count"].as_u64()).sum();
        assert!(counted > Some(0), "{row}");
        assert_eq!(row.as_object().map(serde_json::Map::len), Some(12), "{row}");
    }
    assert_eq!(
        std::fs::read_dir(lab.path(".")).expect("folder").count(),
        2,
        "the two links"
    );
    ok(lab.platter(&["create", "-q", "-f", "raw", "a.raw", "8M"]));
    let table = ok(lab.platter(&[
        "bench",
        "a.raw",
        "-f",
        "raw",
        "--rw",
        "randrw",
        "--bs",
        "8k",
        "--iodepth",
        "4",
        "--numjobs",
        "2",
        "--runtime",
        "0.1",
        "--fsync",
        "16",
        "--verify",
        "--device",
        "both",
    ]));
    let (table, histograms) = table.split_once("\n\n").expect("histograms");
    assert_eq!(table.lines().count(), 3, "{table}");
    assert_eq!(histograms.matches("latency, ").count(), 2, "{histograms}");
    assert!(histograms.contains(" % #"), "{histograms}");
}

#[test]
fn a_bench_drives_every_device_at_any_depth() {
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "raw", "a.raw", "8M"]));
    for device in ["nvme", "ahci", "virtio-blk"] {
        for (depth, bytes) in [("1", "4k"), ("3", "64k"), ("32", "512")] {
            let load = [
                "bench",
                "a.raw",
                "-f",
                "raw",
                "--rw",
                "randrw",
                "--verify",
                "--runtime",
                "0.05",
            ];
            let more = ["--bs", bytes, "--iodepth", depth, "--device", device];
            let table = ok(lab.platter(&[&load[..], &more].concat()));
            assert!(table.contains(device), "{depth}: {table}");
        }
    }
}

#[test]
fn documentation_is_made() {
    let lab = Lab::new();
    assert!(ok(lab.platter(&["completions", "bash"])).contains("platter"));
    ok(lab.platter(&["man", "pages"]));
    for page in [
        "platter.1",
        "platter-convert.1",
        "platter-serve-vhost-user-blk.1",
    ] {
        assert!(lab.path("pages").join(page).exists(), "{page}");
    }
    for command in [
        "info", "create", "convert", "check", "compare", "map", "io", "bench", "resize",
        "snapshot", "dd", "measure",
    ] {
        let help = ok(lab.platter(&[command, "--help"]));
        assert!(help.contains("EXAMPLES"), "{command}");
    }
    fails(2, lab.platter(&["info", "--no-such-option"]));
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    use std::{process::Command, thread::sleep, time::Duration};
    let lab = Lab::new();
    ok(lab.platter(&["create", "-q", "-f", "raw", "a.raw", "64M"]));
    ok(lab.platter(&["io", "-f", "raw", "-c", "write -P 1 0 64M", "a.raw"]));
    for extra in [
        &["-O", "qcow2"][..],
        &["-c", "-O", "qcow2"],
        &["--engine", "io_uring", "-O", "qcow2"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_platter"))
            .args(["convert", "-r", "4M", "-f", "raw"])
            .args(extra)
            .args(["a.raw", "b.qcow2"])
            .current_dir(lab.path("."))
            .spawn()
            .expect("starts");
        while !lab.path("b.qcow2").exists() {
            sleep(Duration::from_millis(10));
        }
        sleep(Duration::from_millis(100));
        let pid = child.id().to_string();
        let kill = Command::new("kill").args(["-INT", &pid]).status();
        assert!(kill.expect("runs").success());
        assert_eq!(child.wait().expect("ends").code(), Some(130));
        assert!(!lab.path("b.qcow2").exists());
    }
}
