//! Image locks, both ways with QEMU's programs.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::{
    fmt::Debug,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use block::{
    DiskFile, ErrorKind, FileGate, Format, Locking, OpenOptions,
    io::sim::{SimConfig, SimHost},
};
use qcow2_support::{qemu_create, temp_dir, tool, try_tool};

/// A qemu-io that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once the image is open.
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answer = lines.next().unwrap().unwrap();
        assert!(answer.contains("MiB"), "{answer}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn reading() -> OpenOptions {
    OpenOptions::new()
        .read_only(true)
        .gate(FileGate::Everything)
}

fn writing() -> OpenOptions {
    OpenOptions::new().gate(FileGate::Everything)
}

fn locked(options: &OpenOptions, path: &Path) -> String {
    let error = options.open_disk(path).err().expect("a locked image");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    error.message()
}

fn opens(options: &OpenOptions, path: &Path) {
    options.open_disk(path).unwrap().close().unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What QEMU says when it tries to open the image.
fn qemu(path: &Path, args: &[&str]) -> Result<(), String> {
    let mut all = args.to_vec();
    all.extend(["-c", "length", text(path)]);
    let output = try_tool("qemu-io", &all);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() && said.is_empty() {
        Ok(())
    } else {
        Err(said)
    }
}

#[test]
fn qemu_is_seen() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    {
        let _writer = Holder::new(&path, &["-f", "qcow2"]);
        assert!(locked(&reading(), &path).contains("shared \"write\" lock"));
        assert!(locked(&writing(), &path).contains("get \"write\" lock"));
        opens(&reading().force_share(true), &path);
        opens(&reading().locking(Locking::Off), &path);
    }
    {
        let _reader = Holder::new(&path, &["-r", "-f", "qcow2"]);
        opens(&reading(), &path);
        assert!(locked(&writing(), &path).contains("get \"write\" lock"));
        opens(&writing().locking(Locking::Off), &path);
    }
    {
        let _without = Holder::new(&path, &["-r", "-U", "-f", "qcow2"]);
        opens(&writing(), &path);
    }
    opens(&writing(), &path);
}

#[test]
fn qemu_sees_us() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    let writer = writing().open_disk(&path).unwrap();
    assert!(
        qemu(&path, &["-r"])
            .unwrap_err()
            .contains("shared \"write\" lock")
    );
    assert!(qemu(&path, &[]).unwrap_err().contains("\"write\" lock"));
    qemu(&path, &["-r", "-U"]).unwrap();
    writer.close().unwrap();
    let reader = reading().open_disk(&path).unwrap();
    qemu(&path, &["-r"]).unwrap();
    assert!(qemu(&path, &[]).unwrap_err().contains("\"write\" lock"));
    for args in [
        &["resize", text(&path), "8M"][..],
        &["snapshot", "-c", "s", text(&path)],
        &["bitmap", "--add", text(&path), "b"],
    ] {
        assert!(!try_tool("qemu-img", args).status.success(), "{args:?}");
    }
    reader.close().unwrap();
    qemu(&path, &[]).unwrap();
    let shared = reading().force_share(true).open_disk(&path).unwrap();
    qemu(&path, &[]).unwrap();
    shared.close().unwrap();
    assert!(writing().force_share(true).open_disk(&path).is_err());
}

#[test]
fn a_backing_file_in_use_cannot_be_written() {
    let dir = temp_dir();
    let base = qemu_create(&dir, "base.qcow2", "", "4M");
    let raw = dir.path().join("base.raw");
    std::fs::write(&raw, vec![0; 4 << 20]).unwrap();
    let over = qemu_create(
        &dir,
        "a.qcow2",
        "backing_file=base.qcow2,backing_fmt=qcow2",
        "4M",
    );
    let over_raw = qemu_create(
        &dir,
        "b.qcow2",
        "backing_file=base.raw,backing_fmt=raw",
        "4M",
    );
    let disk = writing().open_disk(&over).unwrap();
    let other = reading().open_disk(&over_raw).unwrap();
    assert!(qemu(&base, &[]).unwrap_err().contains("\"write\" lock"));
    assert!(
        qemu(&raw, &["-f", "raw"])
            .unwrap_err()
            .contains("\"write\" lock")
    );
    locked(&writing(), &base);
    qemu(&base, &["-r"]).unwrap();
    opens(&reading(), &base);
    disk.close().unwrap();
    other.close().unwrap();
    qemu(&base, &[]).unwrap();
    // And the other way round.
    let holder = Holder::new(&over, &["-f", "qcow2"]);
    locked(&writing(), &base);
    drop(holder);
    let holder = Holder::new(&base, &["-f", "qcow2"]);
    locked(&reading(), &over);
    let alone = reading().no_backing(true);
    opens(&alone, &over);
    drop(holder);
}

#[test]
fn a_storage_daemon_and_we_exclude_each_other() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    let node = |read_only: &str| {
        format!(
            "driver=qcow2,node-name=disk,read-only={read_only},file.driver=file,file.filename={}",
            text(&path)
        )
    };
    let socket = dir.path().join("qmp");
    let start = |read_only: &str| {
        let _ = std::fs::remove_file(&socket);
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node(read_only)])
            .args([
                "--chardev",
                &format!("socket,id=qmp,path={},server=on,wait=off", text(&socket)),
            ])
            .args(["--monitor", "chardev=qmp"])
            .spawn()
            .unwrap();
        // The socket is there when the image is open or refused.
        for _ in 0..500 {
            if socket.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        daemon
    };
    let stop = |mut daemon: Child| {
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    };
    let daemon = start("off");
    locked(&writing(), &path);
    locked(&reading(), &path);
    stop(daemon);
    opens(&writing(), &path);
    let daemon = start("on");
    locked(&writing(), &path);
    opens(&reading(), &path);
    stop(daemon);
    let disk = writing().open_disk(&path).unwrap();
    let output = try_tool(
        "qemu-storage-daemon",
        &["--blockdev", &node("on"), "--pidfile", "/nonexistent/x"],
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("lock"), "{said}");
    disk.close().unwrap();
}

#[test]
fn a_killed_holder_is_waited_for_a_moment() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    let mut holder = Holder::new(&path, &["-f", "qcow2"]);
    let waiting = {
        let path = path.clone();
        std::thread::spawn(move || writing().open_disk(&path).map(|_| ()))
    };
    std::thread::sleep(std::time::Duration::from_millis(50));
    holder.0.kill().unwrap();
    waiting.join().unwrap().unwrap();
    tool("qemu-img", &["check", "-q", text(&path)]);
}

/// Counts warnings.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_file_system_without_locks_warns_or_refuses() {
    for errno in [libc::ENOLCK, libc::ENOSYS, libc::EINVAL, libc::EOPNOTSUPP] {
        for read_only in [false, true] {
            let mut config = SimConfig::seeded(1);
            config.lock_errno = Some(errno);
            let host = SimHost::new(config);
            host.create("disk.img", &[0; 65536]);
            let options = OpenOptions::new().format(Format::Raw).read_only(read_only);
            let open = |locking| {
                let options = options.clone().locking(locking);
                options.open_on("disk.img", Arc::new(host.clone()))
            };
            let warnings = Arc::new(Warnings::default());
            let opened = tracing::subscriber::with_default(Arc::clone(&warnings), || {
                open(Locking::Auto).unwrap().close()
            });
            opened.unwrap();
            let told = warnings.0.lock().unwrap().clone();
            assert!(
                told.len() == 1 && told[0].contains("disk.img") && told[0].contains("no locks"),
                "{errno}: {told:?}"
            );
            let error = open(Locking::On).err().unwrap();
            let text = error.to_string();
            assert!(text.contains("disk.img: lock: "), "{errno}: {text}");
            let warnings = Arc::new(Warnings::default());
            tracing::subscriber::with_default(Arc::clone(&warnings), || {
                open(Locking::Off).unwrap().close().unwrap();
            });
            assert!(warnings.0.lock().unwrap().is_empty(), "{errno}");
        }
    }
    // A host that fails otherwise is an error, whatever was asked for.
    let mut config = SimConfig::seeded(1);
    config.lock_errno = Some(libc::EIO);
    let host = SimHost::new(config);
    host.create("disk.img", &[0; 65536]);
    for locking in [Locking::Auto, Locking::On] {
        let options = OpenOptions::new().format(Format::Raw).locking(locking);
        let error = options
            .open_on("disk.img", Arc::new(host.clone()))
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Io(libc::EIO), "{error}");
    }
}
