//! The program by the names qemu-img and qemu-io: texts and exit statuses, as the reference prints them.

mod cli_support;

use cli_support::{Lab, fails, ok};

#[test]
fn qemu_img_words_its_errors() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "raw", "a.raw", "1M"]));
    for (args, status, text) in [
        (
            &["info", "nope"][..],
            1,
            "Could not open 'nope': Could not open 'nope': No such file or directory",
        ),
        (
            &["info", "-f", "zork", "a.raw"],
            1,
            "Could not open 'a.raw': Unknown driver 'zork'",
        ),
        (
            &["info", "zork:a.raw"],
            1,
            "Could not open 'zork:a.raw': Unknown protocol 'zork'",
        ),
        (
            &["create", "-f", "qcow2", "x"],
            1,
            "x: Image creation needs a size parameter",
        ),
        (
            &["create", "-f", "qcow2", "x", "10X"],
            1,
            "Invalid image size specified: '10X'.",
        ),
        (
            &["create", "-f", "foo", "x", "1M"],
            1,
            "x: Unknown file format 'foo'",
        ),
        (
            &["create", "-f", "qcow2", "-o", "foo=bar", "x", "1M"],
            1,
            "x: Invalid parameter 'foo'",
        ),
        (
            &[
                "create",
                "-f",
                "qcow2",
                "-o",
                "lazy_refcounts=maybe",
                "x",
                "1M",
            ],
            1,
            "x: Parameter 'lazy_refcounts' expects 'on' or 'off'",
        ),
        (
            &[
                "create",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=1234",
                "x",
                "1M",
            ],
            1,
            "x: Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            &["create", "-f", "qcow2", "-o", "size=1G", "x", "1M"],
            1,
            "x: The image size must be specified only once",
        ),
        (
            &["create", "-f", "qcow2", "-b", "a.raw", "x"],
            1,
            "x: Backing file specified without backing format\nDetected format of raw.",
        ),
        (
            &["create", "-f", "qcow2", "-b", "nope", "-F", "raw", "x"],
            1,
            "x: Could not open 'nope': No such file or directory\nCould not open backing image.",
        ),
        (
            &["check", "a.raw"],
            63,
            "This image format does not support checks",
        ),
        (
            &["compare", "a.raw", "nope"],
            2,
            "Could not open 'nope': Could not open 'nope': No such file or directory",
        ),
        (
            &["convert", "-c", "-O", "raw", "a.raw", "x"],
            1,
            "Compression not supported for this file format",
        ),
        (
            &["convert", "-O", "raw", "a.raw"],
            1,
            "Must specify image file name",
        ),
        (
            &["convert", "-m", "99", "a.raw", "x"],
            1,
            "Invalid number of coroutines specified. Must be between 1 and 16.",
        ),
        (
            &["resize", "-f", "raw", "a.raw", "-1G"],
            1,
            "New image size must be positive",
        ),
        (
            &["snapshot", "-f", "raw", "-c", "foo", "a.raw"],
            1,
            "Could not create snapshot 'foo': Operation not supported",
        ),
        (
            &["measure"],
            1,
            "Either --size N or one filename must be specified.",
        ),
        (
            &["dd", "if=a.raw"],
            1,
            "Must specify both input and output files",
        ),
    ] {
        let told = fails(status, lab.qemu_img(args));
        assert_eq!(told, format!("qemu-img: {text}\n"), "{args:?}");
    }
    assert!(!lab.path("x").exists());
    let told = fails(1, lab.qemu_img(&["zork"]));
    assert_eq!(
        told,
        "qemu-img: Command not found: zork\nTry 'qemu-img --help' for more info\n"
    );
}

#[test]
fn qemu_img_compares_and_checks_with_their_statuses() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]));
    ok(lab.qemu_img(&["create", "-q", "-f", "raw", "b.raw", "2M"]));
    let same = ok(lab.qemu_img(&["compare", "a.qcow2", "b.raw"]));
    assert_eq!(
        same,
        "Warning: Image size mismatch!\nImages are identical.\n"
    );
    let output = lab.qemu_img(&["compare", "-s", "a.qcow2", "b.raw"]);
    assert_eq!(output.stdout, b"Strict mode: Image size mismatch!\n");
    assert_eq!(output.status.code(), Some(1));
    ok(lab.qemu_io(&["-f", "raw", "-c", "write -P 1 1500000 3", "b.raw"]));
    let output = lab.qemu_img(&["compare", "a.qcow2", "b.raw"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "Warning: Image size mismatch!\nContent mismatch at offset 1499648!\n"
    );
    assert_eq!(output.status.code(), Some(1));
    let report = ok(lab.qemu_img(&["check", "--output=json", "a.qcow2"]));
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["check-errors"], 0);
    // A cluster that is counted but used by nobody is a leak.
    let path = lab.path("a.qcow2");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[0x2_0000 + 2 * 5 + 1] = 1;
    bytes.resize(bytes.len().max(6 * 65536), 0);
    std::fs::write(&path, bytes).expect("write");
    let told = fails(3, lab.qemu_img(&["check", "a.qcow2"]));
    assert_eq!(told, "Leaked cluster 5 refcount=1 reference=0\n");
    let repaired = ok(lab.qemu_img(&["check", "-r", "leaks", "a.qcow2"]));
    assert!(
        repaired.contains("    1 leaked clusters\n    0 corruptions\n"),
        "{repaired}"
    );
    assert!(
        repaired.contains("No errors were found on the image."),
        "{repaired}"
    );
}

#[test]
fn qemu_io_speaks_its_language() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]));
    let output = lab.qemu_io(&[
        "-c",
        "write -qP 1 0 64k",
        "-c",
        "read -P 1 -s 1k -l 2k 0 4k -q",
        "-c",
        "read -P 2 0 1k -q",
        "-c",
        "write -u 0 1k",
        "-c",
        "read 0 8G",
        "-c",
        "read 5M 1k",
        "-c",
        "zork",
        "-c",
        "read 0",
        "-c",
        "alloc 0 1M",
        "-c",
        "length",
        "-c",
        "aio_write -qz 0 64k",
        "-c",
        "aio_flush",
        "-c",
        "read -qP 0 0 64k",
        "-c",
        "truncate 6M",
        "-c",
        "length",
        "-c",
        "write -s /nope 0 1k",
        "a.qcow2",
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "Pattern verification failed at offset 0, 1024 bytes\n\
         -u requires -z to be specified\n\
         length cannot exceed 2147483136, given 8G\n\
         read failed: Input/output error\n\
         65536/1048576 bytes allocated at offset 0 bytes\n\
         4 MiB\n\
         6 MiB\n"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "command \"zork\" not found\n\
         bad argument count 1 to read, expected at least 2 arguments\n\
         /nope: No such file or directory\n"
    );
}

#[test]
fn qemu_io_takes_commands_from_its_standard_input() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]));
    let program = lab.path("qemu-io");
    let text = ok(lab.run(&program, &["a.qcow2"], "length\n\nquit\nlength\n"));
    assert_eq!(text, "qemu-io> 4 MiB\nqemu-io> qemu-io> ");
    let text = ok(lab.run(
        env!("CARGO_BIN_EXE_platter"),
        &["io", "a.qcow2"],
        "length\n",
    ));
    assert_eq!(text, "4 MiB\n", "no prompt where nobody looks");
}

#[test]
fn qemu_io_opens_and_reopens() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]));
    let told = fails(
        1,
        lab.qemu_io(&[
            "-c",
            "length",
            "-c",
            "open -o cache-size=1M,l2-cache-size=2M a.qcow2",
            "-c",
            "open -r a.qcow2",
            "-c",
            "open a.qcow2",
            "-c",
            "write -q 0 1k",
            "-c",
            "reopen -w",
            "-c",
            "write -q 0 1k",
            "-c",
            "close",
            "-c",
            "open -o driver=raw a.qcow2",
            "-c",
            "read -q 0 1k",
            "-c",
            "close",
            "-c",
            "open nope",
        ]),
    );
    assert_eq!(
        told.lines()
            .filter(|line| !line.contains("WARNING"))
            .collect::<Vec<_>>(),
        [
            "no file open, try 'help open'",
            "qemu-io: can't open device a.qcow2: l2-cache-size may not exceed cache-size",
            "qemu-io: file open already, try 'help close'",
            "qemu-io: Block node is read-only",
            "qemu-io: can't open device nope: Could not open 'nope': No such file or directory",
        ]
    );
    let text = ok(lab.qemu_io(&[
        "--image-opts",
        "driver=qcow2,file.filename=a.qcow2",
        "-c",
        "length",
    ]));
    assert_eq!(text, "4 MiB\n");
    let json = "json:{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}";
    assert_eq!(ok(lab.qemu_io(&["-c", "length", json])), "4 MiB\n");
}

#[test]
fn a_snapshot_session_leaves_the_image_alone() {
    let lab = Lab::new();
    ok(lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]));
    ok(lab.qemu_io(&[
        "-s",
        "-c",
        "write -qP 7 0 1M",
        "-c",
        "read -qP 7 0 1M",
        "a.qcow2",
    ]));
    ok(lab.qemu_io(&["-c", "read -qP 0 0 1M", "a.qcow2"]));
}
