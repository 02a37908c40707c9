//! A front end for tests: guest memory in a memfd, the `vhost` crate's protocol side, and our own
//! virtio-blk driver on the rings.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "tests")]

pub mod image;

use std::{
    ffi::CString,
    fs::File,
    os::fd::{AsRawFd, FromRawFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use block::AsyncDiskFile;
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight},
    },
};
use virtio_devices::virtio_blk::{
    VirtioBlkConfig,
    driver::{Driver, DriverConfig, Used},
    feature,
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_glue::vhost_user::{Result, StopHandle, VhostUserBlkConfig, VhostUserBlkServer};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of each of the two regions of guest memory.
pub const REGION: u64 = 4 << 20;
/// Where the second region begins in the guest.
pub const HIGH: u64 = 1 << 32;
/// Where the front end claims to have the first region mapped.
pub const USER: u64 = 0x7f00_0000_0000;
/// Entries of a ring.
pub const QUEUE_SIZE: u16 = 64;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const F_PROTOCOL: u64 = 1 << 30;

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something to become true.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        thread::sleep(Duration::from_millis(1));
    }
}

/// A memfd, sealed or not.
pub fn memfd(size: u64) -> File {
    let name = CString::new("guest").unwrap();
    // SAFETY: the name is a C string.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was made just now and is ours.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).unwrap();
    file
}

/// A server on a thread.
pub struct Running {
    pub path: PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<Result<()>>>,
    dir: Option<tempfile::TempDir>,
}

/// The configuration of most tests.
pub fn config(num_queues: u16) -> VhostUserBlkConfig {
    VhostUserBlkConfig {
        device: VirtioBlkConfig {
            num_queues,
            serial: "vhost-test".into(),
            ..VirtioBlkConfig::default()
        },
        ..VhostUserBlkConfig::default()
    }
}

impl Running {
    /// Starts a server for `disk` in a folder of its own.
    pub fn new(disk: Box<dyn AsyncDiskFile>, config: VhostUserBlkConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut running = Self::at(&dir.path().join("socket"), disk, config);
        running.dir = Some(dir);
        running
    }

    /// Starts a server for `disk` at `path`.
    pub fn at(path: &Path, disk: Box<dyn AsyncDiskFile>, config: VhostUserBlkConfig) -> Self {
        let server = VhostUserBlkServer::bind(path, disk, config).unwrap();
        Self::of(path, server)
    }

    /// Runs a server.
    pub fn of(path: &Path, server: VhostUserBlkServer) -> Self {
        let stop = server.stop_handle().unwrap();
        let thread = thread::spawn(move || server.run());
        Self {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
            dir: None,
        }
    }

    /// Stops it and returns what it returned.
    pub fn stop(mut self) -> Result<()> {
        self.stop.stop().unwrap();
        self.join()
    }

    /// Waits for its end.
    pub fn join(&mut self) -> Result<()> {
        let thread = self.thread.take().unwrap();
        eventually("the server ends", || thread.is_finished());
        thread.join().unwrap()
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A test that fails does not wait for what may hang.
            if !thread::panicking() {
                eventually("the server ends", || thread.is_finished());
                thread.join().unwrap().unwrap();
            }
        }
    }
}

/// The memory of a guest: two regions in one memfd.
pub struct Guest {
    pub memory: Arc<GuestMemoryMmap>,
    pub file: File,
}

impl Guest {
    pub fn new() -> Self {
        Self::of(memfd(2 * REGION))
    }

    /// The guest whose memory is that file.
    pub fn of(file: File) -> Self {
        let part = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), REGION as usize, part(0)),
            (GuestAddress(HIGH), REGION as usize, part(REGION)),
        ])
        .unwrap();
        Self {
            memory: Arc::new(memory),
            file,
        }
    }

    /// As the front end describes it.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory
            .iter()
            .enumerate()
            .map(|(index, region)| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: USER + index as u64 * (REGION << 4),
                mmap_offset: index as u64 * REGION,
                mmap_handle: self.file.as_raw_fd(),
            })
            .collect()
    }

    pub fn fill(&self, address: GuestAddress, len: usize, byte: u8) {
        self.memory.write_slice(&vec![byte; len], address).unwrap();
    }

    pub fn bytes(&self, address: GuestAddress, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }
}

/// One ring as the guest has it.
pub struct Ring {
    pub driver: Driver,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
}

/// The driver's part of queue `index`; rings and headers are at a fixed place in low memory.
pub fn driver(guest: &Guest, index: usize) -> Driver {
    let config = DriverConfig {
        queue_size: QUEUE_SIZE,
        max_segments: 2,
        ..DriverConfig::default()
    };
    assert!(config.bytes() <= 1 << 18);
    Driver::new(&guest.memory, GuestAddress((index as u64) << 18), config).unwrap()
}

/// Where the parts of a ring are, as the front end has them mapped.
pub fn addresses(driver: &Driver) -> VringConfigData {
    VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: USER + driver.desc_table().0,
        used_ring_addr: USER + driver.used_ring().0,
        avail_ring_addr: USER + driver.avail_ring().0,
        log_addr: None,
    }
}

/// Where data of a test can go: behind the rings in low memory, and all of high memory.
pub const DATA: GuestAddress = GuestAddress(2 << 20);
pub const HIGH_DATA: GuestAddress = GuestAddress(HIGH);

/// A front end with a running device.
pub struct Client {
    pub frontend: Frontend,
    pub guest: Guest,
    pub rings: Vec<Ring>,
    pub inflight: Option<(VhostUserInflight, File)>,
    pub log: bool,
}

/// Connects and negotiates, up to SET_FEATURES.
pub fn connect(path: &Path, features: u64) -> Frontend {
    let mut frontend = Frontend::connect(path, 8).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    assert_eq!(features & !offered, 0, "{features:#x} of {offered:#x}");
    let protocol = frontend.get_protocol_features().unwrap();
    frontend
        .set_protocol_features(protocol & Protocol::all())
        .unwrap();
    frontend.set_features(features).unwrap();
    frontend
}

/// The features that the tests' driver uses.
pub fn features(queues: usize) -> u64 {
    let mut bits = feature::VERSION_1
        | feature::EVENT_IDX
        | feature::INDIRECT_DESC
        | feature::FLUSH
        | feature::CONFIG_WCE
        | F_PROTOCOL;
    if queues > 1 {
        bits |= feature::MQ;
    }
    bits
}

impl Client {
    /// Connects, sets everything up and starts the rings.
    pub fn new(path: &Path, queues: usize) -> Self {
        Self::with(path, Guest::new(), queues, None)
    }

    pub fn with(
        path: &Path,
        guest: Guest,
        queues: usize,
        inflight: Option<(VhostUserInflight, File)>,
    ) -> Self {
        let rings = (0..queues)
            .map(|index| Ring {
                driver: driver(&guest, index),
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
                err: EventFd::new(EFD_NONBLOCK).unwrap(),
            })
            .collect();
        Self::attach(path, guest, rings, inflight)
    }

    /// Connects a guest that has been running, as QEMU does after a reconnect.
    pub fn attach(
        path: &Path,
        guest: Guest,
        rings: Vec<Ring>,
        inflight: Option<(VhostUserInflight, File)>,
    ) -> Self {
        let frontend = connect(path, features(rings.len()));
        let mut client = Self {
            frontend,
            guest,
            rings,
            inflight,
            log: false,
        };
        client.set_up();
        client
    }

    fn set_up(&mut self) {
        self.frontend.set_mem_table(&self.guest.regions()).unwrap();
        let queues = self.rings.len();
        let inflight = match self.inflight.take() {
            Some((inflight, file)) => {
                self.frontend
                    .set_inflight_fd(&inflight, file.as_raw_fd())
                    .unwrap();
                (inflight, file)
            }
            None => {
                let asked = VhostUserInflight::new(0, 0, queues as u16, QUEUE_SIZE);
                let (inflight, file) = self.frontend.get_inflight_fd(&asked).unwrap();
                self.frontend
                    .set_inflight_fd(&inflight, file.as_raw_fd())
                    .unwrap();
                (inflight, file)
            }
        };
        self.inflight = Some(inflight);
        for index in 0..queues {
            // After a crash the front end knows no better than the used index.
            let used = self.rings[index].driver.used_ring().0 + 2;
            let base: u16 = self.guest.memory.read_obj(GuestAddress(used)).unwrap();
            self.start_ring(index, base);
        }
    }

    pub fn addresses(&self, index: usize) -> VringConfigData {
        addresses(&self.rings[index].driver)
    }

    pub fn start_ring(&mut self, index: usize, base: u16) {
        let addresses = self.addresses(index);
        let ring = &self.rings[index];
        self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_addr(index, &addresses).unwrap();
        self.frontend.set_vring_call(index, &ring.call).unwrap();
        self.frontend.set_vring_err(index, &ring.err).unwrap();
        self.frontend.set_vring_kick(index, &ring.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// Adds a write of `len` bytes of `byte` from `data`.
    pub fn write(
        &mut self,
        queue: usize,
        offset: u64,
        data: GuestAddress,
        len: u32,
        byte: u8,
    ) -> u16 {
        self.guest.fill(data, len as usize, byte);
        self.rings[queue]
            .driver
            .write(offset / 512, &[(data, len)])
            .unwrap()
    }

    /// Adds a read.
    pub fn read(&mut self, queue: usize, offset: u64, data: GuestAddress, len: u32) -> u16 {
        self.rings[queue]
            .driver
            .read(offset / 512, &[(data, len)])
            .unwrap()
    }

    /// Shows the device what was added.
    pub fn submit(&mut self, queue: usize) {
        let ring = &mut self.rings[queue];
        if ring.driver.publish() {
            ring.kick.write(1).unwrap();
        }
    }

    /// Waits, by interrupts, for so many requests to end.
    pub fn wait(&mut self, queue: usize, count: usize) -> Vec<Used> {
        let mut ended = Vec::new();
        let ring = &mut self.rings[queue];
        let start = Instant::now();
        loop {
            ring.driver.poll(|used| ended.push(used));
            if ended.len() >= count {
                return ended;
            }
            if ring.driver.arm_interrupt() {
                continue;
            }
            while ring.call.read().is_err() {
                assert!(
                    start.elapsed() < PATIENCE,
                    "no interrupt; {} of {count}",
                    ended.len()
                );
                thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Submits what was added and waits for it, expecting success.
    pub fn finish(&mut self, queue: usize) {
        let count = self.rings[queue].driver.in_flight();
        self.submit(queue);
        for used in self.wait(queue, count) {
            assert_eq!(used.status, 0);
        }
    }

    /// Writes a pattern to the disk and reads it back, through high memory as well.
    pub fn check(&mut self, queue: usize, offset: u64, byte: u8) {
        self.write(queue, offset, DATA, 8192, byte);
        self.finish(queue);
        self.guest.fill(HIGH_DATA, 8192, !byte);
        self.read(queue, offset, HIGH_DATA, 8192);
        self.finish(queue);
        assert_eq!(self.guest.bytes(HIGH_DATA, 8192), vec![byte; 8192]);
    }

    /// The size in the configuration space, in sectors.
    pub fn capacity(&mut self) -> u64 {
        let (_, bytes) = self
            .frontend
            .get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])
            .unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    /// Takes the guest out; the connection goes.
    pub fn into_guest(self) -> (Guest, Vec<Ring>, Option<(VhostUserInflight, File)>) {
        (self.guest, self.rings, self.inflight)
    }
}
