//! How a device reaches the guest.

use std::io;

use crate::virtio::QueueFault;

/// What a transport gives a device so that it can interrupt the guest. One object may serve all
/// queues of a device; it is called from every queue's thread.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that queue `queue` has used buffers.
    ///
    /// # Errors
    /// What the host says, for instance when the other end of an eventfd is gone. The device counts
    /// it and goes on.
    fn signal_queue(&self, queue: u16) -> io::Result<()>;

    /// Tells the driver that the configuration space has changed.
    ///
    /// # Errors
    /// As [`signal_queue`](Self::signal_queue).
    fn signal_config(&self) -> io::Result<()>;

    /// The driver broke the rules of queue `queue`, which has stopped: the transport sets
    /// `DEVICE_NEEDS_RESET` and sends a configuration interrupt. The default does the latter only.
    fn queue_broken(&self, queue: u16, fault: QueueFault) {
        let _ = (queue, fault);
        let _ = self.signal_config();
    }
}

/// Interrupts of a PCI function as its device model sees them: a message for each vector (MSI-X,
/// MSI), and one level-triggered line (INTx). The transport knows which of the two the guest has
/// enabled.
pub trait VectorInterrupt: Send + Sync {
    /// Sends the message of a vector. A vector that is masked stays pending with the transport.
    ///
    /// # Errors
    /// What the host says. The device counts it and goes on.
    fn signal(&self, vector: u16) -> io::Result<()>;

    /// Raises or lowers the line; called on changes only.
    fn set_level(&self, asserted: bool);
}
