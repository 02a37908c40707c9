//! Commands that change images as a whole: rebase, commit, amend, resize with preallocation, and convert
//! where it is awkward. What they refuse leaves everything as it was.

mod cli_support;

use cli_support::{Lab, fails, ok};

fn create(lab: &Lab, args: &[&str]) {
    let mut all = vec!["create", "-q", "-f", "qcow2"];
    all.extend(args);
    ok(lab.platter(&all));
}

fn io(lab: &Lab, image: &str, commands: &[&str]) -> String {
    let mut all = vec!["io"];
    for command in commands {
        all.extend(["-c", command]);
    }
    all.push(image);
    let text = ok(lab.platter(&all));
    assert!(!text.contains("verification failed"), "{image}: {text}");
    text
}

fn sound(lab: &Lab, image: &str) {
    let checked = ok(lab.platter(&["check", image]));
    assert!(
        checked.starts_with("No errors were found on the image."),
        "{checked}"
    );
}

/// base (1) <- mid (2 in the second MiB) <- top (3 in the third, zeroes in the fourth).
fn chain(lab: &Lab) {
    create(lab, &["base.qcow2", "8M"]);
    io(lab, "base.qcow2", &["write -P 1 0 6M"]);
    create(lab, &["-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"]);
    io(lab, "mid.qcow2", &["write -P 2 1M 1M"]);
    create(lab, &["-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "10M"]);
    io(lab, "top.qcow2", &["write -P 3 2M 1M", "write -z 3M 1M"]);
}

const WHOLE: [&str; 6] = [
    "read -P 1 0 1M",
    "read -P 2 1M 1M",
    "read -P 3 2M 1M",
    "read -P 0 3M 1M",
    "read -P 1 4M 2M",
    "read -P 0 6M 4M",
];

#[test]
fn a_commit_keeps_the_disk_and_empties_the_overlay() {
    let lab = Lab::new();
    chain(&lab);
    assert_eq!(
        ok(lab.platter(&["commit", "top.qcow2"])),
        "Image committed.\n"
    );
    io(&lab, "top.qcow2", &WHOLE);
    io(&lab, "mid.qcow2", &WHOLE);
    let map = ok(lab.platter(&["map", "--output", "json", "top.qcow2"]));
    assert!(!map.contains("\"depth\": 0"), "the overlay is empty: {map}");
    for image in ["base.qcow2", "mid.qcow2", "top.qcow2"] {
        sound(&lab, image);
    }
}

#[test]
fn a_commit_goes_through_the_chain() {
    let lab = Lab::new();
    chain(&lab);
    let text = fails(
        1,
        lab.platter(&["commit", "-b", "other.qcow2", "top.qcow2"]),
    );
    assert!(
        text.contains("Did not find 'other.qcow2' in the backing chain"),
        "{text}"
    );
    let text = fails(1, lab.platter(&["commit", "base.qcow2"]));
    assert!(text.contains("backing"), "{text}");
    ok(lab.platter(&["commit", "-q", "-b", "base.qcow2", "top.qcow2"]));
    io(&lab, "base.qcow2", &WHOLE);
    // -b implies -d.
    let map = ok(lab.platter(&["map", "--output", "json", "top.qcow2"]));
    assert!(map.contains("\"depth\": 0"), "{map}");
    sound(&lab, "base.qcow2");
}

#[test]
fn a_rebase_keeps_the_disk() {
    let lab = Lab::new();
    chain(&lab);
    create(&lab, &["new.qcow2", "4M"]);
    io(
        &lab,
        "new.qcow2",
        &["write -P 1 0 512k", "write -P 9 512k 3M"],
    );
    ok(lab.platter(&["rebase", "-b", "new.qcow2", "-F", "qcow2", "top.qcow2"]));
    io(&lab, "top.qcow2", &WHOLE);
    let info = ok(lab.platter(&["info", "top.qcow2"]));
    assert!(info.contains("backing file: new.qcow2"), "{info}");
    sound(&lab, "top.qcow2");
    // Down to no backing file at all, compressed.
    ok(lab.platter(&["rebase", "-c", "-b", "", "top.qcow2"]));
    io(&lab, "top.qcow2", &WHOLE);
    let info = ok(lab.platter(&["info", "top.qcow2"]));
    assert!(!info.contains("backing file"), "{info}");
    sound(&lab, "top.qcow2");
}

#[test]
fn a_rebase_that_is_refused_changes_nothing() {
    let lab = Lab::new();
    chain(&lab);
    let before = std::fs::read(lab.path("top.qcow2")).expect("reads");
    for (args, text) in [
        (
            &["-b", "nowhere.qcow2", "-F", "qcow2"][..],
            "Could not open new backing file",
        ),
        (&["-b", "base.qcow2", "-F", "zork"], "Unknown driver 'zork'"),
        (
            &["-u", "-b", "base.qcow2"],
            "backing format must be specified",
        ),
    ] {
        let mut all = vec!["rebase"];
        all.extend(args);
        all.push("top.qcow2");
        let said = fails(1, lab.platter(&all));
        assert!(said.contains(text), "{said}");
        let after = std::fs::read(lab.path("top.qcow2")).expect("reads");
        assert!(before == after, "{args:?} changed the image");
    }
    let said = fails(1, lab.platter(&["rebase", "top.qcow2"]));
    assert!(said.contains("-b"), "{said}");
}

#[test]
fn versions_and_widths_change_and_content_stays() {
    let lab = Lab::new();
    chain(&lab);
    ok(lab.platter(&["snapshot", "-c", "s", "top.qcow2"]));
    io(
        &lab,
        "top.qcow2",
        &["write -P 4 5M 64k", "write -P 1 5M 64k"],
    );
    for (options, shown) in [
        ("refcount_bits=64,lazy_refcounts=on", "refcount bits: 64"),
        ("refcount_bits=2", "refcount bits: 2"),
        (
            "refcount_bits=16,compat=0.10,lazy_refcounts=off",
            "compat: 0.10",
        ),
        ("compat=1.1", "compat: 1.1"),
    ] {
        ok(lab.platter(&["amend", "-o", options, "top.qcow2"]));
        let info = ok(lab.platter(&["info", "top.qcow2"]));
        assert!(info.contains(shown), "{options}: {info}");
        io(&lab, "top.qcow2", &WHOLE);
        sound(&lab, "top.qcow2");
    }
    ok(lab.platter(&["snapshot", "-a", "s", "top.qcow2"]));
    io(&lab, "top.qcow2", &WHOLE);
    sound(&lab, "top.qcow2");
}

#[test]
fn what_an_image_cannot_become_is_refused() {
    let lab = Lab::new();
    chain(&lab);
    ok(lab.platter(&["snapshot", "-c", "s", "top.qcow2"]));
    for (options, text) in [
        (
            "refcount_bits=1",
            "Cannot decrease refcount entry width to 1 bits",
        ),
        ("refcount_bits=3", "must be a power of two"),
        (
            "compat=0.10,lazy_refcounts=on",
            "Lazy refcounts only supported",
        ),
        ("compat=0.42", "Unknown compatibility level 0.42"),
        ("cluster_size=4k", "only supported for image creation"),
        ("backing_file=other.qcow2", "rebase"),
        ("zork=1", "Invalid parameter 'zork'"),
        ("data_file=x", "data-file can only be set"),
        ("data_file_raw=on", "data-file-raw cannot be set"),
    ] {
        let said = fails(1, lab.platter(&["amend", "-o", options, "top.qcow2"]));
        assert!(said.contains(text), "{options}: {said}");
        io(&lab, "top.qcow2", &WHOLE);
        sound(&lab, "top.qcow2");
    }
}

#[test]
fn growth_claims_its_space_and_reads_as_zeroes() {
    let lab = Lab::new();
    for mode in ["metadata", "falloc", "full"] {
        create(&lab, &["a.qcow2", "100k"]);
        io(&lab, "a.qcow2", &["write -P 7 0 100k"]);
        ok(lab.platter(&["resize", "--preallocation", mode, "a.qcow2", "4M"]));
        io(
            &lab,
            "a.qcow2",
            &["read -P 7 0 100k", "read -P 0 100k 3996k"],
        );
        sound(&lab, "a.qcow2");
        let full = lab.allocated("a.qcow2") >= 4 << 20;
        assert_eq!(full, mode != "metadata", "{mode}");
        let length = std::fs::metadata(lab.path("a.qcow2")).expect("there").len();
        io(&lab, "a.qcow2", &["write -P 8 1M 2M"]);
        let after = std::fs::metadata(lab.path("a.qcow2")).expect("there").len();
        assert_eq!(length, after, "{mode}");
        std::fs::remove_file(lab.path("a.qcow2")).expect("removed");
    }
    create(&lab, &["a.qcow2", "4M"]);
    let said = fails(
        1,
        lab.platter(&["resize", "--preallocation", "zork", "a.qcow2", "8M"]),
    );
    assert!(said.contains("zork"), "{said}");
}

#[test]
fn sources_that_end_inside_a_cluster_are_compressed_together() {
    let lab = Lab::new();
    for (name, size, pattern) in [
        ("a.raw", "100k", "5"),
        ("b.raw", "3k", "6"),
        ("c.raw", "90k", "7"),
    ] {
        ok(lab.platter(&["create", "-q", "-f", "raw", name, size]));
        let write = format!("write -P {pattern} 0 {size}");
        ok(lab.platter(&["io", "-f", "raw", "-c", &write, name]));
    }
    ok(lab.platter(&[
        "convert",
        "-f",
        "raw",
        "-c",
        "-O",
        "qcow2",
        "a.raw",
        "b.raw",
        "c.raw",
        "all.qcow2",
    ]));
    let reads = [
        "read -P 5 0 100k",
        "read -P 6 100k 3k",
        "read -P 7 103k 90k",
    ];
    io(&lab, "all.qcow2", &reads);
    let map = ok(lab.platter(&["map", "--output", "json", "all.qcow2"]));
    assert!(!map.contains("\"compressed\": false"), "{map}");
}

#[test]
fn faults_come_as_the_rules_say() {
    let lab = Lab::new();
    create(&lab, &["a.qcow2", "4M"]);
    std::fs::write(
        lab.path("rules"),
        "[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\nonce = \"on\"\n",
    )
    .expect("written");
    let output = lab.qemu_io(&[
        "-c",
        "write -P 1 0 64k",
        "-c",
        "write -P 2 0 64k",
        "blkdebug:rules:a.qcow2",
    ]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("write failed: No space left on device"),
        "{text}"
    );
    assert!(
        text.contains("wrote 65536/65536 bytes at offset 0"),
        "{text}"
    );
    io(&lab, "a.qcow2", &["read -P 2 0 64k"]);
    sound(&lab, "a.qcow2");
    std::fs::write(lab.path("rules"), "[inject-error]\nevent = \"zork\"\n").expect("written");
    let said = fails(1, lab.qemu_io(&["-c", "length", "blkdebug:rules:a.qcow2"]));
    assert!(said.contains("zork"), "{said}");
}
