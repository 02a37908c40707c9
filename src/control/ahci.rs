//! Control of an AHCI server: media, hot plug, counters.

use std::sync::Arc;

use block::AsyncDiskFile;
use serde_json::{Value, json};
use virtio_devices::ahci::Hba;

use super::{Arguments, Controlled, counters};

/// Opens an image for a drive.
pub(crate) type OpenMedium =
    Box<dyn Fn(&str) -> Result<Box<dyn AsyncDiskFile>, String> + Send + Sync>;
/// Plugs `--disk` or `--cdrom`, with its value, into a port.
pub(crate) type Plug = Box<dyn Fn(&Hba, u8, &str, &str) -> Result<(), String> + Send + Sync>;

/// An AHCI host bus adapter, under control.
pub(crate) struct AhciControl {
    /// The adapter.
    pub(crate) hba: Arc<Hba>,
    /// How a medium is opened.
    pub(crate) open: OpenMedium,
    /// How a drive is plugged in.
    pub(crate) plug: Plug,
}

fn text(error: virtio_devices::Error) -> String {
    let text = error.to_string();
    drop(error);
    text
}

impl AhciControl {
    fn port(arguments: &mut Arguments) -> Result<u8, String> {
        let port = arguments.number("port")?;
        u8::try_from(port).map_err(|_| format!("'port' is {port}, expected 0 to 31"))
    }

    /// What is in a port, as far as it is an optical drive.
    fn tray(&self, port: u8) -> Result<Value, String> {
        let (open, locked) = self.hba.tray(port).map_err(text)?;
        Ok(json!({"port": port, "open": open, "locked": locked}))
    }
}

impl Controlled for AhciControl {
    fn commands(&self) -> &'static [&'static str] {
        &[
            "status",
            "counters",
            "eject port=N",
            "force-eject port=N",
            "insert port=N image=ISO",
            "plug-disk port=N disk=IMAGE[,option=value]",
            "plug-cdrom port=N cdrom=ISO[,option=value]",
            "unplug port=N",
            "resize port=N size=SIZE",
        ]
    }

    fn execute(&self, command: &str, arguments: &mut Arguments) -> Result<Value, String> {
        if matches!(command, "status" | "counters") {
            arguments.end()?;
            let ports = 0..self.hba.config().ports;
            return Ok(if command == "status" {
                let trays: Vec<Value> = ports.filter_map(|port| self.tray(port).ok()).collect();
                json!({"device": "ahci", "ports": self.hba.config().ports, "trays": trays})
            } else {
                let stats = ports.filter_map(|port| self.hba.stats(port));
                let ports: Vec<Value> = stats.map(|stats| counters(stats)).collect();
                json!({"ports": ports})
            });
        }
        let port = Self::port(arguments)?;
        match command {
            "eject" | "force-eject" => {
                arguments.end()?;
                let force = command == "force-eject";
                self.hba.open_tray(port, force).map_err(text)?;
                drop(self.hba.remove_medium(port).map_err(text)?);
                self.tray(port)
            }
            "insert" => {
                let image = arguments.text("image")?;
                arguments.end()?;
                let medium = (self.open)(&image)?;
                // In place of what is there; a locked tray says so.
                self.hba.open_tray(port, false).map_err(text)?;
                drop(self.hba.remove_medium(port).map_err(text)?);
                self.hba.insert_medium(port, medium).map_err(text)?;
                self.hba.close_tray(port).map_err(text)?;
                self.tray(port)
            }
            "plug-disk" | "plug-cdrom" => {
                let kind = command.trim_start_matches("plug-");
                let value = arguments.text(kind)?;
                arguments.end()?;
                (self.plug)(&self.hba, port, &format!("--{kind}"), &value)?;
                Ok(json!({"port": port}))
            }
            "resize" => {
                let size = arguments.size("size")?;
                arguments.end()?;
                self.hba.resize_disk(port, size).map_err(text)?;
                Ok(json!({"port": port, "size": self.hba.disk_size(port)}))
            }
            "unplug" => {
                arguments.end()?;
                self.hba.unplug(port).map_err(text)?;
                Ok(json!({"port": port}))
            }
            _ => Err(format!("unknown command '{command}'")),
        }
    }
}
