//! Disks that a server serves over vhost-user.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use block::Format;
use platter_benches::{
    Result, Work,
    qemu::{QemuBench, fastest_aio, image_opts},
    server::{Server, cpu_of},
    side::Side,
    stride::Pattern,
};

use super::{L2_CACHE, Lab, Set, client::Client, format_of};

impl Lab {
    /// The image that is served.
    pub(super) fn served_path(&self, set: Set, direct: bool) -> Result<PathBuf> {
        self.path(set, direct)
    }

    /// `platter serve` with an image.
    pub(super) fn platter(&self, set: Set, direct: bool) -> Result<Server> {
        let path = self.served_path(set, direct)?;
        let socket = self.dir.path().join("ours.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(&self.options.platter);
        command.args(["serve", "vhost-user-blk", "--socket"]);
        command.arg(&socket);
        if direct {
            command.arg("--direct");
        }
        let format = format_of(set).name();
        let cache = match format {
            "qcow2" => format!(",l2-cache-size={L2_CACHE}"),
            _ => String::new(),
        };
        let image = format!("driver={format}{cache},file.filename={}", path.display());
        Server::start(command.args(["--image-opts", &image]), &socket)
    }

    /// `qemu-storage-daemon` with an image.
    fn daemon(&self, path: &Path, format: Format, aio: &str, direct: bool) -> Result<Server> {
        let socket = self.dir.path().join("peer.sock");
        let _ = fs::remove_file(&socket);
        let image = image_opts(format.name(), path, aio, direct, L2_CACHE);
        let mut command = Command::new(self.options.qemu.join("qemu-storage-daemon"));
        command
            .args(["--object", "iothread,id=io"])
            .args([
                "--blockdev",
                &format!("{image},node-name=disk,discard=unmap"),
            ])
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},\
                 writable=on,num-queues=1,iothread=io",
                socket.display()
            ));
        Server::start(&mut command, &socket)
    }

    /// The daemon with whatever host I/O is best: `rate` tries one and says how good it is.
    fn best_daemon<T>(
        &self,
        set: Set,
        direct: bool,
        client: impl Fn(Server) -> Result<T>,
        rate: impl Fn(&mut T) -> Result<f64>,
    ) -> Result<T> {
        let path = self.served_path(set, direct)?;
        let format = format_of(set);
        let aio = fastest_aio(direct, |aio| {
            rate(&mut client(self.daemon(&path, format, aio, direct)?)?)
        })?;
        client(self.daemon(&path, format, aio, direct)?)
    }

    /// A disk that `platter serve` serves, driven by QEMU's client.
    pub(super) fn served_by_platter(
        &self,
        set: Set,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        self.client(self.platter(set, work.direct)?, work, pattern)
    }

    /// A disk that `qemu-storage-daemon` serves, driven by QEMU's client.
    pub(super) fn served_by_qemu(
        &self,
        set: Set,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        self.best_daemon(
            set,
            work.direct,
            |server| self.client(server, work, pattern),
            |side| {
                side.slice(Duration::from_millis(200), 0)?;
                Ok(side.slice(Duration::from_millis(300), 0)?.iops())
            },
        )
    }

    /// The same two, each driven by the other client, one access at a time.
    pub(super) fn one_by_one(&self, set: Set, work: Work) -> Result<(Client, Client)> {
        let ours = Client::new(self.platter(set, work.direct)?, work)?;
        let peer = self.best_daemon(
            set,
            work.direct,
            |server| Client::new(server, work),
            |client| {
                client.slice(Duration::from_millis(200), 0)?;
                Ok(1.0 / client.slice(Duration::from_millis(300), 0)?.p50)
            },
        )?;
        Ok((ours, peer))
    }

    fn client(&self, server: Server, work: Work, pattern: Pattern) -> Result<Box<dyn Side>> {
        let image = format!(
            "driver=virtio-blk-vhost-user,cache.direct=on,path={}",
            server.socket.display()
        );
        // The client knows no page cache.
        let work = Work {
            direct: true,
            ..work
        };
        let bench = QemuBench::new(&self.options.client, image, work, pattern)?;
        Ok(Box::new(
            bench.worker(Box::new(move || cpu_of(server.pid()))),
        ))
    }
}
