//! An AHCI 1.3.1 host bus adapter: the control plane. The data plane of a port is [`PortWorker`].
//!
//! ```text
//! Hba (Send + Sync)                registers of the ABAR, hot plug, interrupts, state
//!    │ port_worker(n, memory), on the port's thread
//!    ▼
//! PortWorker = Worker<PortQueue>   one a port: command list, FISes, data; stays on its thread
//!    │ TaskFile          ▲ Step
//!    ▼                   │
//! ata::AtaDisk                     what a command means; knows neither memory nor disks
//! ```
//!
//! Registers can be accessed from any thread. Writing PxCI wakes the port's worker through
//! [`Hba::doorbell`], if it sleeps.

mod command;
mod config;
mod drive;
pub mod driver;
mod execute;
mod fis;
mod front;
mod hba;
mod interrupt;
mod port;
mod post;
mod queue;
pub mod regs;
mod shared;
mod slot;
mod state;
mod tray;
mod work;

pub use config::{HbaConfig, OpticalConfig, Quirks};
pub use front::PortWorker;
pub use hba::Hba;
pub use queue::PortQueue;
pub use shared::TrayListener;
pub use state::{HbaState, STATE_VERSION};
