//! A server of PCI functions over vfio-user.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Daemon, Workplace, platter, run};

/// Tells a running server what to do, with `platter ctl`; gives its answer.
#[track_caller]
pub(crate) fn ctl(socket: &Path, words: &[&str]) -> serde_json::Value {
    let text = run(platter().arg("ctl").arg(socket).args(words));
    serde_json::from_str(&text).expect("the answer is JSON")
}

/// `platter serve nvme` or `platter serve ahci`, or another device.
#[derive(Debug)]
pub(crate) struct FunctionServer {
    daemon: Daemon,
    device: String,
    sockets: Vec<PathBuf>,
    arguments: Vec<String>,
}

impl FunctionServer {
    /// Serves `device` (`nvme` or `ahci`) with the given arguments, on one socket; returns when the server listens.
    /// `name` names its socket and its log within the workplace.
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(
        workplace: &Workplace,
        device: &str,
        name: &str,
        arguments: &[S],
    ) -> Self {
        Self::start_many(workplace, device, name, 1, arguments)
    }

    /// The same with several sockets, which is one controller each where the device allows that.
    #[track_caller]
    pub(crate) fn start_many<S: AsRef<OsStr>>(
        workplace: &Workplace,
        device: &str,
        name: &str,
        controllers: usize,
        arguments: &[S],
    ) -> Self {
        let socket = |index| workplace.socket(&format!("{name}{index}.sock"));
        let sockets: Vec<PathBuf> = (0..controllers).map(socket).collect();
        let text = |argument: &S| argument.as_ref().to_str().expect("plain text").to_owned();
        let mut server = Self {
            daemon: Daemon::new(sockets.clone(), workplace.socket(&format!("{name}.log"))),
            device: device.to_owned(),
            sockets,
            arguments: arguments.iter().map(text).collect(),
        };
        server.start_again();
        server
    }

    fn command(&self) -> Command {
        let mut command = platter();
        command.args(["serve", &self.device]);
        for socket in &self.sockets {
            command.arg("--socket").arg(socket);
        }
        command.args(&self.arguments);
        command
    }

    /// Starts the server anew on the same sockets, after it was killed or stopped.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        let mut command = self.command();
        self.daemon.start(&mut command);
    }

    /// The socket of a controller.
    pub(crate) fn socket(&self, controller: usize) -> &Path {
        &self.sockets[controller]
    }

    /// What the server printed last.
    pub(crate) fn messages(&self) -> String {
        self.daemon.messages()
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
