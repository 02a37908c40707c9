//! Backing files that are not there, not theirs, or never end.

use super::*;

#[test]
fn backing_files_are_followed_with_care() {
    let dir = scratch();
    let inside = dir.path().join("images");
    fs::create_dir(&inside).unwrap();
    fs::write(dir.path().join("secret.raw"), vec![9; 65536]).unwrap();
    fs::write(inside.join("base.raw"), vec![1; 65536]).unwrap();
    symlink(dir.path().join("secret.raw"), inside.join("link.raw")).unwrap();
    symlink(dir.path(), inside.join("up")).unwrap();
    let top: PathBuf = inside.join("top.qcow2");
    let name = top.to_str().unwrap();
    let open = |options: OpenOptions| options.open_disk(&top);
    let over = |backing: &str| {
        let _ = fs::remove_file(&top);
        qemu(
            "qemu-img",
            &[
                "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name, "64k",
            ],
        );
        fs::read(&top).unwrap()
    };
    over("base.raw");
    open(OpenOptions::new()).unwrap();

    let secret = dir.path().join("secret.raw");
    let denied = [
        secret.to_str().unwrap(),
        "../secret.raw",
        "link.raw",
        "up/secret.raw",
        "./../images/../secret.raw",
        "/etc/hostname",
        "/proc/self/exe",
    ];
    for backing in denied {
        let before = over(backing);
        let error = open(OpenOptions::new()).err().expect(backing);
        assert_eq!(error.kind(), ErrorKind::Denied, "{backing}: {error}");
        let message = error.to_string();
        assert!(message.contains("top.qcow2"), "{backing}: {message}");
        assert!(message.contains("backing file"), "{backing}: {message}");
        assert!(fs::read(&top).unwrap() == before, "{backing}: written to");
    }
    // The caller may allow more.
    over(secret.to_str().unwrap());
    let folders = FileGate::Folders(vec![dir.path().to_owned()]);
    open(OpenOptions::new().gate(folders)).unwrap();
    open(OpenOptions::new().gate(FileGate::Everything)).unwrap();
    over("base.raw");
    let error = open(OpenOptions::new().gate(FileGate::Nothing))
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::Denied);
    open(OpenOptions::new().gate(FileGate::Nothing).no_backing(true)).unwrap();

    for (backing, kind) in [
        ("json:{\"driver\":\"raw\"}", ErrorKind::Unsupported),
        ("nbd://localhost/x", ErrorKind::Unsupported),
        ("fat:rw:/tmp", ErrorKind::Unsupported),
        ("missing.raw", ErrorKind::NotFound),
        (".", ErrorKind::InvalidArgument),
    ] {
        let before = over(backing);
        let error = open(OpenOptions::new()).err().expect(backing);
        let message = error.to_string();
        if backing != "." {
            assert_eq!(error.kind(), kind, "{backing}: {message}");
        }
        assert!(message.contains("top.qcow2"), "{backing}: {message}");
        assert!(fs::read(&top).unwrap() == before, "{backing}: written to");
    }
    // A pipe does not make opening wait.
    let pipe = inside.join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    over("pipe");
    assert!(open(OpenOptions::new()).is_err());
}

#[test]
fn chains_that_never_end_are_refused() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let over = |name: &str, backing: &str| {
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-b",
                backing,
                "-F",
                "qcow2",
                path(name).to_str().unwrap(),
                "64k",
            ],
        );
    };
    over("self.qcow2", "self.qcow2");
    over("a.qcow2", "b.qcow2");
    over("b.qcow2", "a.qcow2");
    for name in ["self.qcow2", "a.qcow2"] {
        for read_only in [false, true] {
            let before = fs::read(path(name)).unwrap();
            let error = OpenOptions::new()
                .read_only(read_only)
                .open_disk(path(name))
                .err()
                .expect(name);
            let message = error.to_string();
            assert!(
                message.contains("already in the chain"),
                "{name}: {message}"
            );
            assert!(fs::read(path(name)).unwrap() == before);
        }
    }
    // A long chain: read through all of it, and refused where it is too long. The link is a copy.
    over("0.qcow2", "1.qcow2");
    let template = fs::read(path("0.qcow2")).unwrap();
    let link = |number: u32, last: u32| {
        let mut bytes = template.clone();
        let at = be64(&bytes, 8) as usize;
        let name = format!("{:04}.raw", number + 1);
        put(&mut bytes, 16, &(name.len() as u32).to_be_bytes());
        put(&mut bytes, at, name.as_bytes());
        if number == last {
            put(&mut bytes, 8, &[0; 8]);
            put(&mut bytes, 16, &[0; 4]);
        }
        fs::write(path(&format!("{number:04}.raw")), bytes).unwrap();
    };
    for (last, opens) in [(150, true), (260, false)] {
        for number in 0..=last {
            link(number, last);
        }
        let opened = OpenOptions::new()
            .format(Format::Qcow2)
            .open_disk(path("0000.raw"));
        match (opened, opens) {
            (Ok(disk), true) => {
                let mut bytes = vec![1; 65536];
                disk.read_at(&mut bytes, 0).unwrap();
                assert!(bytes.iter().all(|byte| *byte == 0));
            }
            (Err(error), false) => {
                assert!(error.to_string().contains("backing chain"), "{error}");
            }
            (Ok(_), false) => panic!("a chain of {last} opens"),
            (Err(error), true) => panic!("a chain of {last}: {error}"),
        }
    }
}
