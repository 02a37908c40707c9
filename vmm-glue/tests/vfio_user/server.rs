//! Servers of functions over mock disks, each on a thread.

use std::{path::PathBuf, sync::Arc, thread};

use block::AsyncDiskFile;
use virtio_devices::{
    VectorInterrupt,
    ahci::OpticalConfig,
    ata::DiskConfig,
    nvme::{NamespaceConfig, NvmeConfig, Subsystem, SubsystemConfig},
    testing::{MockDisk, MockDiskConfig},
};
use vm_memory::GuestMemoryAtomic;
use vmm_glue::{
    pci::{AhciFunction, AhciFunctionConfig, PausableFunction},
    vfio_user::{
        NvmeFunction, NvmeFunctionConfig, StopHandle, VfioUserInterrupts, VfioUserMemory,
        VfioUserServer,
    },
};

use crate::{
    ahci_driver::{Ahci, DATA},
    client::Client,
    nvme_driver::Nvme,
};

pub struct Server<F> {
    pub disk: MockDisk,
    pub function: Arc<F>,
    stop: StopHandle,
    thread: Option<thread::JoinHandle<()>>,
    folder: tempfile::TempDir,
}

type Memory = GuestMemoryAtomic<VfioUserMemory>;

impl<F: PausableFunction + 'static> Server<F> {
    /// Serves what `make` makes.
    pub fn start(
        disk: MockDisk,
        make: impl FnOnce(&Memory, Arc<dyn VectorInterrupt>) -> F,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let interrupts = Arc::new(VfioUserInterrupts::default());
        let memory = Memory::new(VfioUserMemory::new());
        let function = Arc::new(make(&memory, interrupts.clone()));
        let path = folder.path().join("s");
        let served = Arc::<F>::clone(&function);
        let mut server = VfioUserServer::bind(&path, served, memory, interrupts).unwrap();
        let stop = server.stop_handle().unwrap();
        let thread = thread::spawn(move || server.run().unwrap());
        Self {
            disk,
            function,
            stop,
            thread: Some(thread),
            folder,
        }
    }
}

impl<F> Server<F> {
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path())
    }
}

impl Server<NvmeFunction> {
    /// A client whose memory is mapped, and that has set the controller up.
    pub fn driver(&self) -> Client {
        let mut client = self.client();
        client.map();
        client.set_up();
        client
    }

    /// The same with all its memory reached by messages.
    pub fn driver_by_messages(&self) -> Client {
        let mut client = self.client();
        client.map_by_messages();
        client.set_up();
        client
    }

    /// The same with queues that are mapped and data that is not.
    pub fn driver_mixed(&self) -> Client {
        let mut client = self.client();
        client.map_mixed(0x8000);
        client.set_up();
        client
    }
}

impl Server<AhciFunction> {
    /// A client whose memory is mapped, and that has started the port of the disk.
    pub fn driver(&self) -> Client {
        let mut client = self.client();
        client.map();
        client.start();
        client
    }

    /// The same with all its memory reached by messages.
    pub fn driver_by_messages(&self) -> Client {
        let mut client = self.client();
        client.map_by_messages();
        client.start();
        client
    }

    /// The same with structures that are mapped and data that is not.
    pub fn driver_mixed(&self) -> Client {
        let mut client = self.client();
        client.map_mixed(DATA);
        client.start();
        client
    }
}

impl<F> Drop for Server<F> {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().map(thread::JoinHandle::join);
        assert!(ended.is_some_and(|it| it.is_ok()) || thread::panicking());
    }
}

pub fn nvme() -> Server<NvmeFunction> {
    let disk = MockDisk::new(MockDiskConfig::default());
    nvme_over(disk.clone(), Box::new(disk))
}

pub fn nvme_over(disk: MockDisk, served: Box<dyn AsyncDiskFile>) -> Server<NvmeFunction> {
    nvme_with(disk, served, &NvmeFunctionConfig::default())
}

pub fn nvme_with(
    disk: MockDisk,
    served: Box<dyn AsyncDiskFile>,
    config: &NvmeFunctionConfig,
) -> Server<NvmeFunction> {
    let subsystem = Subsystem::new(SubsystemConfig::default()).unwrap();
    subsystem
        .add_namespace(served, &NamespaceConfig::default())
        .unwrap();
    let config = NvmeFunctionConfig {
        controller: NvmeConfig {
            io_queues: 2,
            vectors: 3,
            ..config.controller.clone()
        },
        ..config.clone()
    };
    Server::start(disk, |memory, interrupts| {
        NvmeFunction::new(&subsystem, config, memory, interrupts).unwrap()
    })
}

/// A disk in port 0, an optical drive in port 1: empty, or with a medium.
pub fn ahci_with(medium: Option<MockDisk>) -> Server<AhciFunction> {
    let disk = MockDisk::new(MockDiskConfig::default());
    Server::start(disk.clone(), |memory, interrupts| {
        let config = AhciFunctionConfig::default();
        let function = AhciFunction::new(config, memory, interrupts).unwrap();
        let plugged = Box::new(disk);
        let config = DiskConfig::of(&*plugged);
        function.hba().plug_disk(0, plugged, config).unwrap();
        let medium = medium.map(|it| Box::new(it) as Box<dyn AsyncDiskFile>);
        let config = OpticalConfig::default();
        function.hba().plug_optical(1, medium, config).unwrap();
        function
    })
}

pub fn ahci() -> Server<AhciFunction> {
    ahci_with(None)
}
