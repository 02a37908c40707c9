//! An NVMe controller as a PCI function, with a thread for each of its workers.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use virtio_devices::{
    MemorySource, VectorInterrupt,
    nvme::{NvmeConfig, NvmeController, Subsystem},
};

use super::{Error, PausableFunction};
use crate::{
    pci::{Bar, Description, Msix, PciFunction},
    sys,
};

/// How the function is made.
#[derive(Clone, Debug, Default)]
pub struct NvmeFunctionConfig {
    /// The controller.
    pub controller: NvmeConfig,
}

/// What a worker's thread is told.
enum Order {
    Pause(Sender<()>),
    Resume,
}

struct Seat {
    orders: Option<Sender<Order>>,
    wake: File,
    thread: Option<JoinHandle<()>>,
}

impl Seat {
    fn tell(&self, order: Order) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
        let _ = sys::signal(&self.wake);
    }
}

/// An NVMe controller on a PCI bus.
pub struct NvmeFunction {
    controller: Arc<NvmeController>,
    seats: Mutex<Vec<Seat>>,
}

impl NvmeFunction {
    /// A controller of `subsystem`; its threads run until it is dropped.
    ///
    /// # Errors
    /// As [`NvmeController::new`]; the host's error when a thread cannot be started.
    pub fn new<S: MemorySource + Clone + Send + 'static>(
        subsystem: &Arc<Subsystem>,
        config: NvmeFunctionConfig,
        memory: &S,
        interrupts: Arc<dyn VectorInterrupt>,
    ) -> Result<Self, Error> {
        let controller = NvmeController::new(subsystem, config.controller, interrupts)?;
        // The line, until the guest enables messages.
        controller.use_messages(false);
        let function = Self {
            controller: Arc::new(controller),
            seats: Mutex::default(),
        };
        for index in 0..function.controller.workers() {
            let seat = function.start(index, memory.clone())?;
            function.seats().push(seat);
        }
        Ok(function)
    }

    fn seats(&self) -> std::sync::MutexGuard<'_, Vec<Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start<S: MemorySource + Send + 'static>(
        &self,
        index: usize,
        memory: S,
    ) -> Result<Seat, Error> {
        let (orders, inbox) = channel();
        let wake = sys::event()?;
        let (stop, controller) = (wake.try_clone()?, Arc::clone(&self.controller));
        let name = if index == 0 {
            "nvme-admin".to_owned()
        } else {
            format!("nvme-q{index}")
        };
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || work(&controller, index, memory, &stop, &inbox))?;
        Ok(Seat {
            orders: Some(orders),
            wake,
            thread: Some(thread),
        })
    }

    /// The controller.
    #[must_use]
    pub fn controller(&self) -> &NvmeController {
        &self.controller
    }
}

/// A worker's thread.
fn work<S: MemorySource>(
    controller: &NvmeController,
    index: usize,
    memory: S,
    stop: &File,
    inbox: &Receiver<Order>,
) {
    let (Ok(mut worker), Some(kick)) = (controller.worker(index, memory), controller.kick(index))
    else {
        return;
    };
    loop {
        if let Err(error) = worker.run(kick, stop.as_fd()) {
            tracing::error!(index, %error, "the worker has stopped");
            let _ = sys::poll([(stop.as_fd(), libc::POLLIN)], None);
        }
        // An order is sent before the descriptor is written.
        sys::clear(stop);
        loop {
            match inbox.recv() {
                Ok(Order::Pause(done)) => {
                    if let Err(error) = worker.settle() {
                        tracing::error!(index, %error, "the worker cannot be paused");
                    }
                    let _ = done.send(());
                }
                Ok(Order::Resume) => break,
                Err(_) => {
                    if let Err(error) = worker.settle() {
                        tracing::error!(index, %error, "the worker cannot be ended");
                    }
                    return;
                }
            }
        }
    }
}

impl Drop for NvmeFunction {
    fn drop(&mut self) {
        let mut seats = std::mem::take(&mut *self.seats());
        for seat in &mut seats {
            drop(seat.orders.take());
            let _ = sys::signal(&seat.wake);
        }
        for seat in &mut seats {
            if let Some(thread) = seat.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("a worker's thread panicked");
            }
        }
    }
}

/// The BAR with the MSI-X structures.
const MSIX_BAR: u8 = 4;

impl PciFunction for NvmeFunction {
    fn description(&self) -> Description {
        let config = self.controller.config();
        let table = (u32::from(config.vectors) * 16).next_multiple_of(4096);
        Description {
            id: (config.vendor, 0x4e56),
            subsystem: (config.vendor, 0x4e56),
            // Mass storage, non-volatile memory, NVM Express I/O controller.
            class: [0x01, 0x08, 0x02],
            revision: 1,
            bars: vec![
                Bar {
                    index: 0,
                    size: self
                        .controller
                        .register_bytes()
                        .next_power_of_two()
                        .max(0x4000),
                    wide: true,
                },
                Bar {
                    index: MSIX_BAR,
                    size: u64::from(table + 4096).next_power_of_two(),
                    wide: false,
                },
            ],
            msix: Some(Msix {
                vectors: config.vectors,
                bar: MSIX_BAR,
                table: 0,
                pending: table,
            }),
            msi: 0,
            line: true,
        }
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == 0 {
            self.controller.read(offset, data);
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == 0 {
            self.controller.write(offset, data);
        }
    }

    fn use_messages(&self, messages: bool) {
        self.controller.use_messages(messages);
    }

    fn reset(&self) {
        self.controller.reset();
    }

    fn is_idle(&self) -> bool {
        self.controller.is_idle()
    }
}

impl PausableFunction for NvmeFunction {
    fn pause(&self) {
        let seats = self.seats();
        let (sender, done) = channel();
        for seat in seats.iter() {
            seat.tell(Order::Pause(sender.clone()));
        }
        drop(sender);
        // Ends when each has answered, or is gone.
        while done.recv().is_ok() {}
    }

    fn resume(&self) {
        for seat in self.seats().iter() {
            if let Some(orders) = &seat.orders {
                let _ = orders.send(Order::Resume);
            }
        }
    }
}
