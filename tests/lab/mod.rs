//! What the tests with real drivers and real clients share: the lab's programs, bounded runs of
//! programs, and the server under test.
//!
//! A missing lab fails a test; nothing is ever skipped. With `PLATTER_LAB_SERVER` set to
//! `qemu-storage-daemon`, that daemon takes the place of `platter serve`: if a test fails with both,
//! the test is wrong. With `PLATTER_LAB_PROGRAM` set to a path, that is the program under test.
#![allow(dead_code, reason = "each test program uses its part of this module")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub(crate) mod function;

/// How long a program may run that the host runs to its end.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);

/// How long a server may take to listen on its socket, or to end after it was asked to.
const SERVER_LIMIT: Duration = Duration::from_secs(90);

/// The folder of the prepared lab.
pub(crate) fn lab() -> PathBuf {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/lab");
    assert!(
        lab.join("guest.stamp").exists(),
        "the test lab is not prepared: run tests/lab/setup.sh (or ./test.sh setup)"
    );
    lab
}

/// A command that runs one of the lab's programs.
pub(crate) fn tool(name: &str) -> Command {
    let path = lab().join("bin").join(name);
    assert!(
        path.exists(),
        "the test lab has no {name}: run tests/lab/setup.sh --force"
    );
    Command::new(path)
}

/// A command that runs the program under test: that of this build, unless another one is named.
pub(crate) fn platter() -> Command {
    Command::new(
        std::env::var_os("PLATTER_LAB_PROGRAM")
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_platter").into()),
    )
}

/// Runs a command to its end and gives its standard output; any failure ends the test.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> String {
    let output = run_any(command);
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, whichever that is; only taking too long ends the test.
#[track_caller]
pub(crate) fn run_any(command: &mut Command) -> Output {
    // Files, because they never fill up as pipes do while nobody reads.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (out, err) = (folder.path().join("out"), folder.path().join("err"));
    let child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out).expect("a file for the output"))
        .stderr(File::create(&err).expect("a file for the messages"));
    let mut process = Process::start(child, &err);
    let status = process.wait(PROGRAM_LIMIT);
    Output {
        status,
        stdout: fs::read(&out).expect("the output"),
        stderr: fs::read(&err).expect("the messages"),
    }
}

/// Waits until `done` holds, looking again at growing intervals; false if it takes too long.
pub(crate) fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// A child process that never outlives its owner, nor the test program.
#[derive(Debug)]
pub(crate) struct Process {
    /// What the messages call it: the program's name.
    name: String,
    child: Child,
    /// Where its messages go.
    log: PathBuf,
}

impl Process {
    /// Starts `command`, whose messages have been directed to the file `log`.
    #[track_caller]
    fn start(command: &mut Command, log: &Path) -> Self {
        let die_with_the_test = || {
            // SAFETY: with this option the call takes a number and touches no memory.
            match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: the closure runs between fork and exec; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(die_with_the_test) };
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let name = Path::new(command.get_program())
            .file_name()
            .unwrap_or(command.get_program());
        Self {
            name: name.to_string_lossy().into_owned(),
            child,
            log: log.to_owned(),
        }
    }

    /// Starts `command` in the background, with everything it prints in the file `log`.
    #[track_caller]
    pub(crate) fn background(command: &mut Command, log: &Path) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a file for the messages");
        let other = file.try_clone().expect("the same file twice");
        Self::start(command.stdin(Stdio::null()).stdout(file).stderr(other), log)
    }

    /// How the process ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("the state of a child process")
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let in_time = wait_until(limit, || self.ended().is_some());
        assert!(
            in_time,
            "{} still runs after {limit:?}\n{}",
            self.name,
            self.messages()
        );
        self.ended().expect("the process has ended")
    }

    /// Sends SIGTERM.
    #[track_caller]
    pub(crate) fn terminate(&self) {
        let id = i32::try_from(self.child.id()).expect("process ids are small");
        // SAFETY: no memory is involved, and the child has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(id, libc::SIGTERM) };
        assert_eq!(
            result,
            0,
            "SIGTERM to {}: {}",
            self.name,
            io::Error::last_os_error()
        );
    }

    /// Sends SIGKILL and waits until the process is gone.
    pub(crate) fn kill(&mut self) {
        // Both fail only for a child that has ended, which is what is asked for.
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// The last lines the process printed.
    pub(crate) fn messages(&self) -> String {
        format!("--- {} printed:\n{}", self.name, tail(&self.log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a file, for messages.
pub(crate) fn tail(file: &Path) -> String {
    let content = fs::read(file).unwrap_or_default();
    last_lines(&String::from_utf8_lossy(&content))
}

/// The end of a text, which is where it says what went wrong.
pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// The folders of one test: images on a disk file system, sockets where paths are short.
#[derive(Debug)]
pub(crate) struct Workplace {
    images: TempDir,
    sockets: TempDir,
}

impl Workplace {
    /// Makes both folders; they disappear with the value.
    pub(crate) fn new() -> Self {
        Self {
            images: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for images"),
            sockets: tempfile::tempdir().expect("a folder for sockets"),
        }
    }

    /// The path of a file of this test.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    /// The path of a socket, or of another file that needs a short path.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// Makes an empty image with qemu-img and gives its path.
    #[track_caller]
    pub(crate) fn create(&self, name: &str, format: &str, size: &str) -> PathBuf {
        let image = self.file(name);
        run(tool("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg(size));
        image
    }

    /// Makes an empty qcow2 image over `backing` with qemu-img and gives its path.
    #[track_caller]
    pub(crate) fn create_overlay(&self, name: &str, backing: &Path, format: &str) -> PathBuf {
        let image = self.file(name);
        // By its name alone, as it stands in the same folder.
        run(tool("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .arg(backing.file_name().expect("a file"))
            .arg(&image));
        image
    }

    /// What the guest sees of an image, as a raw file: read by qemu-img, not by the program under test.
    #[track_caller]
    pub(crate) fn as_raw(&self, image: &Path, format: &str) -> PathBuf {
        let raw = self.file("as-seen-by-qemu-img.raw");
        run(tool("qemu-img")
            .args(["convert", "-f", format, "-O", "raw"])
            .arg(image)
            .arg(&raw));
        raw
    }
}

/// Both checkers find the image clean: the one under test, and the reference.
#[track_caller]
pub(crate) fn check_image(image: &Path, format: &str) {
    if format == "raw" {
        // Raw images have nothing that could be inconsistent.
        return;
    }
    let mut checkers = vec![tool("qemu-img")];
    if subject() == Subject::Platter {
        checkers.push(platter());
    }
    for mut checker in checkers {
        let text = run(checker.args(["check", "-f", format]).arg(image));
        assert!(text.contains("No errors were found"), "{checker:?}: {text}");
    }
}

/// Both checkers find no corruption. Leaked clusters, which an interrupted server may leave, are removed first.
#[track_caller]
pub(crate) fn check_image_after_kill(image: &Path, format: &str) {
    /// The exit code of a check that found leaked clusters and nothing worse.
    const LEAKS: i32 = 3;
    if format != "raw" {
        let found = run_any(tool("qemu-img").args(["check", "-f", format]).arg(image));
        let text = String::from_utf8_lossy(&found.stdout);
        match found.status.code() {
            Some(0) => {}
            Some(LEAKS) => {
                let mut repairer = match subject() {
                    Subject::Platter => platter(),
                    Subject::QemuStorageDaemon => tool("qemu-img"),
                };
                run(repairer
                    .args(["check", "-r", "leaks", "-f", format])
                    .arg(image));
            }
            _ => panic!("the image is corrupt: {text}"),
        }
    }
    check_image(image, format);
}

/// Which server the tests run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// `platter serve`, the server under test.
    Platter,
    /// qemu-storage-daemon, to prove the tests themselves.
    QemuStorageDaemon,
}

/// The server that this run is about.
pub(crate) fn subject() -> Subject {
    match std::env::var("PLATTER_LAB_SERVER").as_deref() {
        Err(_) | Ok("" | "platter") => Subject::Platter,
        Ok("qemu-storage-daemon") => Subject::QemuStorageDaemon,
        Ok(other) => panic!("PLATTER_LAB_SERVER names no server: {other}"),
    }
}

/// What becomes of writes that a guest has seen complete when the server is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// As on any disk: those that were not flushed may be lost.
    Plain,
    /// None is lost.
    Restartable,
}

/// A server process and the sockets it listens on.
#[derive(Debug)]
pub(crate) struct Daemon {
    process: Option<Process>,
    sockets: Vec<PathBuf>,
    log: PathBuf,
}

impl Daemon {
    /// A server that does not run yet, with the sockets it will listen on and the file for its messages.
    pub(crate) fn new(sockets: Vec<PathBuf>, log: PathBuf) -> Self {
        Self {
            process: None,
            sockets,
            log,
        }
    }

    /// Starts it; returns when it listens on all its sockets.
    #[track_caller]
    pub(crate) fn start(&mut self, command: &mut Command) {
        assert!(self.process.is_none(), "the server still runs");
        let mut process = Process::background(command, &self.log);
        let listening = wait_until(SERVER_LIMIT, || {
            if let Some(status) = process.ended() {
                panic!("{command:?} ended with {status}\n{}", process.messages());
            }
            self.sockets.iter().all(|socket| is_listening(socket))
        });
        assert!(
            listening,
            "{command:?} does not listen\n{}",
            process.messages()
        );
        self.process = Some(process);
    }

    /// The first of its sockets.
    pub(crate) fn socket(&self) -> &Path {
        &self.sockets[0]
    }

    /// What the server printed last.
    pub(crate) fn messages(&self) -> String {
        self.process
            .as_ref()
            .map_or_else(|| tail(&self.log), Process::messages)
    }

    /// Kills the server in the midst of whatever it does.
    #[track_caller]
    pub(crate) fn kill(&mut self) {
        self.process.take().expect("a running server").kill();
    }

    /// Asks the server to end, and expects it to do so in order.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        let mut process = self.process.take().expect("a running server");
        process.terminate();
        let status = process.wait(SERVER_LIMIT);
        assert!(
            status.success(),
            "the server ended with {status}\n{}",
            process.messages()
        );
    }
}

/// A vhost-user-blk server with two queues on one image.
#[derive(Debug)]
pub(crate) struct Server {
    daemon: Daemon,
    image: PathBuf,
    format: String,
    durability: Durability,
}

impl Server {
    /// Serves an image; returns when the server listens.
    #[track_caller]
    pub(crate) fn start(workplace: &Workplace, image: &Path, format: &str) -> Self {
        Self::start_with(workplace, image, format, Durability::Plain)
    }

    /// Serves an image with the given durability; returns when the server listens.
    #[track_caller]
    pub(crate) fn start_with(
        workplace: &Workplace,
        image: &Path,
        format: &str,
        durability: Durability,
    ) -> Self {
        let name = image
            .file_stem()
            .and_then(OsStr::to_str)
            .expect("a plain file name");
        let sockets = vec![workplace.socket(&format!("{name}.sock"))];
        let mut server = Self {
            daemon: Daemon::new(sockets, workplace.socket(&format!("{name}.log"))),
            image: image.to_owned(),
            format: format.to_owned(),
            durability,
        };
        server.start_again();
        server
    }

    /// The socket it listens on.
    pub(crate) fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// What the server printed last.
    pub(crate) fn messages(&self) -> String {
        self.daemon.messages()
    }

    /// Starts the server anew on the same image and socket, after it was killed or stopped.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        let mut command = match subject() {
            Subject::Platter => self.platter_command(),
            Subject::QemuStorageDaemon => {
                // It refuses a socket that its predecessor left.
                drop(fs::remove_file(self.socket()));
                self.daemon_command()
            }
        };
        self.daemon.start(&mut command);
    }

    fn platter_command(&self) -> Command {
        let mut command = platter();
        command
            .args(["serve", "vhost-user-blk", "--num-queues", "2", "--socket"])
            .arg(self.socket())
            .args(["-f", &self.format]);
        if self.durability == Durability::Restartable {
            command.arg("--restartable");
        }
        command.arg(&self.image);
        command
    }

    fn daemon_command(&self) -> Command {
        let file = format!(
            "driver=file,node-name=file,discard=unmap,filename={}",
            self.image.display()
        );
        let disk = format!(
            "driver={},node-name=disk,file=file,discard=unmap",
            self.format
        );
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
             addr.type=unix,addr.path={}",
            self.socket().display()
        );
        let mut command = tool("qemu-storage-daemon");
        command
            .args(["--blockdev", &file, "--blockdev", &disk])
            .args(["--export", &export]);
        command
    }

    /// Kills the server in the midst of whatever it does.
    #[track_caller]
    pub(crate) fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Asks the server to end, and expects it to do so in order.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.daemon.stop();
    }
}

/// Whether somebody listens on a Unix socket. Connecting would tell too, but would already be a front end.
fn is_listening(socket: &Path) -> bool {
    /// The flag in /proc/net/unix of a socket that accepts connections.
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel's list of sockets");
    let path = socket.to_str().expect("a plain path");
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(3) == Some(&ACCEPTS) && fields.last() == Some(&path)
    })
}
