//! What is checked between requests: content, tables, and what QEMU says.

use super::*;

impl Run {
    pub(super) fn read_all(&mut self) {
        let size = self.model.size();
        let reading = self.model.read(0, size);
        let mut bytes = vec![0xa5; size as usize];
        match self.disk().read_at(&mut bytes, 0) {
            Ok(()) => {
                if let Err(why) = self.model.check_read(&reading, &bytes) {
                    self.fail(&why);
                }
            }
            Err(error) => self.tolerate(&error, "read"),
        }
    }

    /// Reads everything, without trouble.
    pub(super) fn verify(&mut self) {
        self.setup.end_trouble(&self.host);
        self.quiesce();
        self.read_all();
    }

    pub(super) fn close(&mut self) {
        self.quiesce();
        self.queues.clear();
        let disk = self.disk.take().unwrap();
        let flush = self.model.flush();
        let closed = disk.close();
        self.tell(|| format!("close: {closed:?}"));
        match closed {
            Ok(()) => {
                self.model.flushed(flush);
                drop(disk);
                self.setup.end_trouble(&self.host);
                self.check_metadata("closed", !self.may_leak);
                let disk = self.open_read_only("closed");
                self.check_extras(&disk, true);
            }
            Err(error) => {
                self.tolerate(&error, "close");
                drop(disk);
                self.reboot(false);
            }
        }
    }

    /// Power cut or death of the process.
    pub(crate) fn cut(&mut self, power: bool) {
        self.may_leak = true;
        self.reap_all();
        self.reboot(power);
    }

    pub(super) fn reboot(&mut self, power: bool) {
        let (next, kind) = match (power || self.lost, self.setup.restartable) {
            (true, _) => (self.host.power_cut(), Cut::Power),
            (false, false) => (self.host.kill(), Cut::Kill),
            (false, true) => (self.host.kill(), Cut::KillAfterCompletion),
        };
        self.may_leak = true;
        self.tell(|| format!("cut: {kind:?}"));
        self.bury();
        self.host = next;
        self.lost = false;
        self.setup.end_trouble(&self.host);
        self.check_metadata("after a cut", false);
        let disk = self.open_read_only("after a cut");
        self.check_extras(&disk, false);
        let size = disk.size();
        let mut bytes = vec![0xa5; size as usize];
        if let Err(error) = disk.read_at(&mut bytes, 0) {
            self.fail(&format!("cannot be read after a cut: {error}"));
        }
        let known = size == self.model.size();
        if !known && self.setup.mode != Mode::Faults {
            self.fail(&format!("{size} bytes after a cut"));
        }
        if let Err(why) = self.model.cut(kind, size, &bytes) {
            self.fail(&why);
        }
        if self.judged_by_qemu {
            self.judge(&bytes);
        }
    }

    pub(super) fn open_read_only(&self, when: &str) -> Disk {
        let options = self.setup.options().read_only(true);
        match options.open_on(IMAGE, std::sync::Arc::new(self.host.clone())) {
            Ok(disk) => disk,
            Err(error) => self.fail(&format!("does not open {when}: {error}")),
        }
    }

    /// What was in flight on the dead host ends, with errors.
    pub(super) fn bury(&mut self) {
        let mut out = Vec::new();
        let mut idle = 0;
        while self.queues.iter().any(|queue| queue.io.in_flight() > 0) {
            let moved = self.host.step();
            let reaped: usize = self.queues.iter_mut().map(|q| q.io.reap(&mut out)).sum();
            idle = if moved || reaped > 0 { 0 } else { idle + 1 };
            if idle > 20 {
                self.fail("requests hang on a dead host");
            }
        }
        self.queues.clear();
        self.disk = None;
        self.pending.clear();
    }

    pub(super) fn check_metadata(&self, when: &str, no_leaks: bool) {
        let (report, lines) = self.setup.check(&self.host);
        if self.traced && report.corruptions > 0 {
            let file = self.host.file(IMAGE).unwrap();
            file.save(std::path::Path::new("/tmp/platter-corrupt.img"))
                .unwrap();
        }
        if report.corruptions > 0 || report.check_errors > 0 {
            self.fail(&format!("corrupt {when}: {lines:#?}"));
        }
        if no_leaks && report.leaks > 0 {
            self.fail(&format!("leaks {when}: {lines:#?}"));
        }
    }

    /// Lets QEMU check the image and read it.
    pub(super) fn judge(&self, bytes: &[u8]) {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for path in self.host.paths() {
            let file = self.host.file(&path).unwrap();
            file.save(&dir.path().join(&path)).unwrap();
        }
        let image: PathBuf = dir.path().join(IMAGE);
        let format = self.setup.format.name();
        // Not read through the simulation, which would go on differently then.
        let marked =
            || is_marked(&Header::parse_for_check(&std::fs::read(&image).unwrap()).unwrap());
        if self.setup.format == Format::Qcow2 && !marked() {
            let output = Command::new("qemu-img")
                .args(["check", "-f", format])
                .arg(&image)
                .current_dir(&dir)
                .output()
                .unwrap();
            if !matches!(output.status.code(), Some(0 | 3)) {
                self.fail(&format!(
                    "qemu-img check: {}{}",
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                ));
            }
        }
        let plain = dir.path().join("plain");
        let output = Command::new("qemu-img")
            .args(["convert", "-f", format, "-O", "raw"])
            .args([&image, &plain])
            // It looks for a data file from where it is.
            .current_dir(&dir)
            .output()
            .unwrap();
        if !output.status.success() {
            self.fail(&format!(
                "qemu-img convert: {}",
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        if std::fs::read(&plain).unwrap() != bytes {
            self.fail("QEMU reads other bytes");
        }
    }
}
