//! The errors of device models.

/// A [`std::result::Result`] with the error of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the owner of a device can get wrong, or what the host refused. Nothing that a guest does
/// ends up here: a guest's mistake gives the status that the specification asks for, or breaks its
/// own queue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk or its data plane reported an error.
    #[error("disk: {0}")]
    Block(#[from] block::Error),
    /// A file descriptor of the caller cannot be used.
    #[error("{what}: {source}")]
    Descriptor {
        /// Which descriptor.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A configuration value of the caller is out of range.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// There is no queue of that number.
    #[error("queue {queue} does not exist, the device has {queues}")]
    NoSuchQueue {
        /// The number asked for.
        queue: u16,
        /// The number of queues.
        queues: u16,
    },
    /// The driver accepted a feature that was not offered, or refused one the device needs.
    #[error("features {features:#x} cannot be accepted: {reason}")]
    Features {
        /// What the driver accepted.
        features: u64,
        /// Why that does not work.
        reason: &'static str,
    },
    /// The rings of a queue are not where the guest has memory, or are not ready.
    #[error("queue {queue}: {fault}")]
    Queue {
        /// The number of the queue.
        queue: u16,
        /// What is wrong with it.
        fault: crate::virtio::QueueFault,
    },
    /// A saved state cannot be restored.
    #[error("saved state: {0}")]
    State(String),
    /// The device did not come to rest in time.
    #[error("the device is busy: {0}")]
    Busy(String),
    /// The queue still has requests in flight.
    #[error("queue {queue} has {in_flight} requests in flight")]
    NotDrained {
        /// The number of the queue.
        queue: u16,
        /// The number of requests.
        in_flight: usize,
    },
    /// The tray of an optical drive cannot do that now.
    #[error("tray: {0}")]
    Tray(#[from] crate::mmc::TrayError),
    /// The port has no optical drive.
    #[error("port {port} has no optical drive")]
    NoOpticalDrive {
        /// The number of the port.
        port: u8,
    },
}
