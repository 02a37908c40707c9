//! Options of images and of `measure`: each has its effect, or is refused.

mod cli_support;

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
};

use cli_support::{Lab, fails, ok};

/// What `measure` prints, as qemu-img 10.0.13 does.
fn sizes(required: u64, full: u64) -> String {
    format!("required size: {required}\nfully allocated size: {full}\n")
}

#[test]
fn measure_knows_every_option_of_create() {
    let lab = Lab::new();
    for (options, size, required, full) in [
        ("compat=1.1", "1G", 393_216, 1_074_135_040),
        ("data_file=x", "1G", 393_216, 1_074_135_040),
        (
            "data_file=x,data_file_raw=on,preallocation=full",
            "1G",
            1_074_135_040,
            1_074_135_040,
        ),
        ("extended_l2=on", "1G", 524_288, 1_074_266_112),
        ("refcount_bits=1", "9T", 1_227_227_136, 9_896_831_877_120),
        ("lazy_refcounts=on", "1000", 327_680, 393_216),
    ] {
        let measured = ok(lab.qemu_img(&["measure", "-O", "qcow2", "-o", options, "--size", size]));
        assert_eq!(measured, sizes(required, full), "{options}");
    }
    let raw = ok(lab.qemu_img(&["measure", "-O", "raw", "--size", "1000"]));
    assert_eq!(raw, sizes(1024, 1024));
    for (args, text) in [
        (
            &["-o", "zork=1", "--size", "1G"][..],
            "Invalid parameter 'zork'",
        ),
        (
            &["-o", "extended_l2=on,cluster_size=4k", "--size", "1G"],
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (&["-o", ",", "--size", "1G"], "Invalid option list: ,"),
        (
            &["--size", "7E"],
            "The image size is too large (try using a larger cluster size)",
        ),
        (
            &["-l", "one"],
            "--image-opts, -f, and -l require a filename argument.",
        ),
        (&["a", "b"], "At most one filename argument is allowed."),
        (
            &["--output", "xml", "--size", "1"],
            "--output must be used with human or json as argument.",
        ),
    ] {
        let args: Vec<&str> = ["measure", "-O", "qcow2"]
            .iter()
            .chain(args)
            .copied()
            .collect();
        let complaint = fails(1, lab.qemu_img(&args));
        assert_eq!(
            complaint.trim_end(),
            format!("qemu-img: {text}"),
            "{args:?}"
        );
    }
}

#[test]
fn measure_looks_at_a_snapshot() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1G"]));
    ok(lab.qemu_io(&["-f", "qcow2", "-c", "write 0 128k", "a"]));
    ok(lab.qemu_img(&["snapshot", "-c", "one", "a"]));
    ok(lab.qemu_io(&["-f", "qcow2", "-c", "write 128M 64k", "a"]));
    for (args, required) in [
        (&["a"][..], 589_824),
        (&["-l", "one", "a"], 524_288),
        (&["-l", "snapshot.name=one", "a"], 524_288),
        // Nothing is taken to be in the backing file.
        (&["-o", "backing_file=x", "a"], 1_074_135_040),
    ] {
        let args: Vec<&str> = ["measure", "-O", "qcow2"]
            .iter()
            .chain(args)
            .copied()
            .collect();
        let expected = format!("{}bitmaps size: 0\n", sizes(required, 1_074_135_040));
        assert_eq!(ok(lab.qemu_img(&args)), expected, "{args:?}");
    }
}

/// `json:{…}` for a qcow2 image below a filter with such rules.
fn below_filter(image: &str, rules: &str) -> String {
    format!(
        "json:{{'driver':'blkdebug','image':{{'driver':'qcow2','file':{{'driver':'file',\
         'filename':'{image}'}}}},'inject-error':[{rules}]}}"
    )
}

#[test]
fn salvage_loses_single_sectors() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a", "4M"]));
    ok(lab.qemu_io(&["-f", "qcow2", "-c", "write -P 7 0 4M", "a"]));
    let rule = |kind: &str, sector: u64| {
        format!("{{'event':'none','iotype':'{kind}','errno':5,'sector':{sector}}}")
    };
    let rules = [
        rule("read", 3),
        rule("read", 5000),
        rule("block-status", 128),
    ]
    .join(",");
    let source = below_filter("a", &rules);
    let complaint = fails(1, lab.qemu_img(&["convert", "-O", "raw", &source, "b"]));
    assert!(
        complaint.contains("error while reading block status"),
        "{complaint}"
    );
    // Rules above the format are about the disk, wherever its bytes are in the file.
    let output = lab.qemu_img(&["convert", "--salvage", "-O", "raw", &source, "b"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ok(output);
    let status =
        "qemu-img: warning: error while reading block status at offset 65536: Input/output error\n";
    let read = |offset: u64| {
        format!("qemu-img: warning: error while reading offset {offset}: Input/output error\n")
    };
    // QEMU counts what there is to do first.
    assert_eq!(
        told,
        format!("{status}{}{status}{}", read(3 * 512), read(5000 * 512))
    );
    let bytes = std::fs::read(lab.path("b")).expect("the copy");
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        let expected = if [3, 5000].contains(&sector) { 0 } else { 7 };
        assert!(
            bytes.iter().all(|byte| *byte == expected),
            "sector {sector}"
        );
    }
    let args = ["convert", "--salvage", "-c", "-O", "qcow2", &source, "c"];
    ok(lab.qemu_img(&args));
    ok(lab.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "b", "c"]));
}

#[test]
fn faults_of_a_data_file_are_its_own() {
    let lab = Lab::new();
    ok(lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d",
        "a",
        "1M",
    ]));
    let spec = "driver=qcow2,file.filename=a,data-file.driver=raw,data-file.file.driver=blkdebug,\
                data-file.file.image.filename=d,data-file.file.inject-error.0.event=write_aio,\
                data-file.file.inject-error.0.iotype=write";
    let output = lab.qemu_io(&["--image-opts", "-c", "write 0 64k", spec]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "write failed: Input/output error\n"
    );
    ok(lab.qemu_img(&["check", "-q", "a"]));
    let complaint = fails(
        1,
        lab.qemu_io(&[
            "--image-opts",
            "driver=qcow2,file.filename=a,data-file.driver=zork",
        ]),
    );
    assert!(complaint.contains("Unknown driver 'zork'"), "{complaint}");
}

#[test]
fn what_works_on_a_whole_image_refuses_options_for_open_disks_that_are_wrong() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1M"]));
    std::fs::write(lab.path("rules"), "").expect("written");
    for command in [
        &["check"][..],
        &["snapshot", "-c", "one"],
        &["amend", "-o", "compat=0.10"],
    ] {
        let args = |name: &'static str, opts: bool| -> Vec<&str> {
            let opts = opts.then_some("--image-opts");
            command.iter().copied().chain(opts).chain([name]).collect()
        };
        let complaint = fails(1, lab.qemu_img(&args("blkdebug:rules:a", false)));
        assert!(
            complaint.contains("'blkdebug' has no effect"),
            "{complaint}"
        );
        let name = "driver=qcow2,file.filename=a,zork=1";
        let complaint = fails(1, lab.qemu_img(&args(name, true)));
        assert!(
            complaint.contains("does not support the option 'zork'"),
            "{complaint}"
        );
        ok(lab.qemu_img(&args(
            "driver=qcow2,file.filename=a,overlap-check=all",
            true,
        )));
    }
}

#[test]
fn discards_are_passed_on_as_the_options_say() {
    let lab = Lab::new();
    let written = |name: &str, options: &str| {
        ok(lab.platter(&["create", "-q", "-f", "qcow2", name, "8M"]));
        ok(lab.platter(&["io", "-c", "write -P 1 0 8M", name]));
        let spec = format!("driver=qcow2,file.filename={name}{options}");
        ok(lab.platter(&["io", "--image-opts", "-c", "discard 0 8M", &spec]));
        ok(lab.platter(&["check", "-q", name]));
        lab.allocated(name)
    };
    assert!(written("on", "") < 2 << 20);
    assert!(written("off", ",pass-discard-request=off") > 8 << 20);

    // What is replaced: compressed clusters, here.
    let mut noise = Vec::new();
    let mut state = 1u64;
    while noise.len() < 8 << 20 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        write!(noise, "{state:016x}").expect("memory");
    }
    std::fs::write(lab.path("noise"), noise).expect("written");
    let replaced = |name: &str, options: &str| {
        ok(lab.platter(&["convert", "-c", "-f", "raw", "-O", "qcow2", "noise", name]));
        let spec = format!("driver=qcow2,file.filename={name}{options}");
        let write = ["io", "--image-opts", "-c", "write -P 1 0 8M", &spec];
        ok(lab.platter(&write));
        ok(lab.platter(&["check", "-q", name]));
        lab.allocated(name)
    };
    let kept = replaced("kept", "");
    let passed = replaced("passed", ",pass-discard-other=on");
    assert!(passed + (2 << 20) < kept, "{passed} of {kept}");
    let complaint = fails(
        1,
        lab.platter(&[
            "io",
            "--image-opts",
            "driver=qcow2,file.filename=on,pass-discard-other=x",
        ]),
    );
    assert!(
        complaint.contains("'pass-discard-other' expects 'on' or 'off'"),
        "{complaint}"
    );
}

#[test]
fn a_deleted_snapshot_gives_its_space_back() {
    let lab = Lab::new();
    let with_snapshot = |name: &str| {
        ok(lab.platter(&["create", "-q", "-f", "qcow2", name, "8M"]));
        ok(lab.platter(&["io", "-c", "write -P 1 0 8M", name]));
        ok(lab.platter(&["snapshot", "-c", "one", name]));
        // One cluster stays shared.
        ok(lab.platter(&["io", "-c", "write -P 2 64k 8128k", name]));
        assert!(lab.allocated(name) > 16 << 20);
    };
    for (name, action, pattern) in [("a", "-d", 2), ("b", "-a", 1)] {
        with_snapshot(name);
        ok(lab.platter(&["snapshot", action, "one", name]));
        assert!(lab.allocated(name) < 9 << 20, "{}", lab.allocated(name));
        ok(lab.platter(&["check", "-q", name]));
        let rest = format!("read -P {pattern} 64k 8128k");
        ok(lab.platter(&["io", "-c", "read -P 1 0 64k", "-c", &rest, name]));
    }
    let spec = "driver=qcow2,file.filename=b,pass-discard-snapshot=off";
    let complaint = fails(
        1,
        lab.platter(&["snapshot", "--image-opts", "-d", "one", spec]),
    );
    assert!(complaint.contains("pass-discard-snapshot"), "{complaint}");
}

/// An image whose snapshot has an L2 table that is counted as free.
fn with_lost_table(lab: &Lab, name: &str) {
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", name, "1G"]));
    ok(lab.qemu_io(&["-f", "qcow2", "-c", "write 0 64k", name]));
    ok(lab.qemu_img(&["snapshot", "-c", "one", name]));
    ok(lab.qemu_io(&["-f", "qcow2", "-c", "write 0 64k", name]));
    let file = OpenOptions::new()
        .write(true)
        .open(lab.path(name))
        .expect("the image");
    // The fifth cluster: after header, reference counts and L1 table.
    file.write_all_at(&[0, 0], 0x20000 + 4 * 2)
        .expect("written");
}

#[test]
fn the_overlap_check_checks_what_it_is_told_to() {
    let lab = Lab::new();
    with_lost_table(&lab, "a");
    let write = |options: &str| {
        let spec = format!("driver=qcow2,file.filename=a{options}");
        lab.qemu_io(&["--image-opts", "-c", "write 512M 64k", &spec])
    };
    let output = write(",overlap-check.inactive-l2=on");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "write failed: Input/output error\n"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "qcow2: Marking image as corrupt: Preventing invalid write on metadata (overlaps with inactive \
         L2 table); further corruption events will be suppressed\n"
    );
    // Without the check it goes through, as in QEMU.
    with_lost_table(&lab, "a");
    ok(write(""));
    let complaint = fails(1, write(",overlap-check=most"));
    assert!(complaint.contains("Allowed are any of the following: none, constant, cached, all"));
}

#[test]
fn reopen_changes_nothing_where_an_option_is_wrong() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a", "64M"]));
    for (options, text) in [
        (
            "-r -o read-only=on",
            "Cannot set both -r/-w and 'read-only'",
        ),
        (
            "-c none -o cache.direct=on",
            "Cannot set both -c and the cache options",
        ),
        ("-o driver=raw", "Cannot change the option 'driver'"),
        (
            "-o lazy-refcounts=42",
            "Parameter 'lazy-refcounts' expects 'on' or 'off'",
        ),
        ("-o refcount-cache-size=256T", "Refcount cache size too big"),
        ("-o cache-clean-interval=-1", "Cache clean interval too big"),
        (
            "-o overlap-check=none,overlap-check.template=all",
            "Conflicting values for qcow2 options 'overlap-check' ('none') and \
             'overlap-check.template' ('all')",
        ),
    ] {
        let reopen = format!("reopen {options}");
        let output = lab.qemu_io(&["-f", "qcow2", "-c", &reopen, "-c", "write -q 0 64k", "a"]);
        let complaint = fails(1, output);
        assert_eq!(
            complaint.trim_end(),
            format!("qemu-io: {text}"),
            "{options}"
        );
    }
    // What follows replaces what contradicts it.
    ok(lab.qemu_io(&[
        "-f",
        "qcow2",
        "-c",
        "reopen -o overlap-check=all",
        "-c",
        "reopen -o overlap-check.template=none",
        "-c",
        "reopen -o driver=qcow2,lazy-refcounts=on",
        "a",
    ]));
}

#[test]
fn a_luks_volume_is_filled_in_advance() {
    let lab = Lab::new();
    let secret = "secret,id=k,data=x";
    for (mode, filled) in [("off", false), ("falloc", true), ("full", true)] {
        let options = format!("key-secret=k,iter-time=10,preallocation={mode}");
        let args = [
            "create", "-q", "--object", secret, "-f", "luks", "-o", &options, mode, "16M",
        ];
        ok(lab.platter(&args));
        assert_eq!(lab.allocated(mode) >= 16 << 20, filled, "{mode}");
        let read = format!("driver=luks,key-secret=k,file.filename={mode}");
        ok(lab.platter(&[
            "io",
            "--object",
            secret,
            "--image-opts",
            "-c",
            "read 0 16M",
            &read,
        ]));
    }
}

#[test]
fn an_overlay_of_an_encrypted_image_has_its_key() {
    let lab = Lab::new();
    let secret = "secret,id=k,data=x";
    let options = "key-secret=k,iter-time=10";
    ok(lab.platter(&[
        "create", "-q", "--object", secret, "-f", "luks", "-o", options, "a", "1M",
    ]));
    let spec = "driver=luks,key-secret=k,file.filename=a";
    let io = ["io", "--object", secret, "--image-opts", "--snapshot"];
    let write = ["-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", spec];
    let before = std::fs::read(lab.path("a")).expect("the volume");
    ok(lab.platter(&io.iter().chain(&write).copied().collect::<Vec<_>>()));
    assert!(before == std::fs::read(lab.path("a")).expect("the volume"));
}

#[test]
fn the_first_block_of_a_raw_image_has_its_place_under_qemus_name() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "raw", "a", "1G"]));
    ok(lab.platter(&["create", "-q", "-f", "raw", "b", "1G"]));
    assert_eq!((lab.allocated("a"), lab.allocated("b")), (4096, 0));
    let file = File::open(lab.path("a")).expect("the image");
    assert_eq!(file.metadata().expect("metadata").len(), 1 << 30);
}
