//! Control of a vhost-user-blk server.

use std::sync::Arc;

use serde_json::{Value, json};
use virtio_devices::virtio_blk::VirtioBlk;

use super::{Arguments, Controlled, counters};

/// A virtio-blk device, under control.
pub(crate) struct BlkControl(pub(crate) Arc<VirtioBlk>);

impl Controlled for BlkControl {
    fn commands(&self) -> &'static [&'static str] {
        &["status", "counters", "resize size=SIZE"]
    }

    fn execute(&self, command: &str, arguments: &mut Arguments) -> Result<Value, String> {
        match command {
            "status" => {
                arguments.end()?;
                Ok(json!({"device": "vhost-user-blk", "size": self.0.size()}))
            }
            "counters" => {
                arguments.end()?;
                let queues = (0..).map_while(|queue| self.0.stats(queue));
                let queues: Vec<Value> = queues.map(|stats| counters(stats)).collect();
                Ok(json!({"queues": queues}))
            }
            "resize" => {
                let size = arguments.size("size")?;
                arguments.end()?;
                if size == 0 || !size.is_multiple_of(512) {
                    return Err(format!(
                        "'size' is {size}, expected a multiple of 512 bytes"
                    ));
                }
                self.0.resize(size).map_err(|error| error.to_string())?;
                Ok(json!({"size": self.0.size()}))
            }
            _ => Err(format!("unknown command '{command}'")),
        }
    }
}
