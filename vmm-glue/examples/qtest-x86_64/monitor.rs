//! The monitor's socket, and the events that go over it.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Value, json};

use crate::Result;

/// The monitor's socket; events come from any thread.
#[derive(Clone)]
pub(crate) struct Monitor(Arc<Mutex<UnixStream>>);

impl Monitor {
    pub(crate) fn new(socket: UnixStream) -> Result<Self> {
        let monitor = Self(Arc::new(Mutex::new(socket)));
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": "platter"});
        monitor.send(&json!({"QMP": {"version": version, "capabilities": []}}))?;
        Ok(monitor)
    }

    pub(crate) fn send(&self, message: &Value) -> Result<()> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = socket.write_all(format!("{message}\r\n").as_bytes());
        sent.map_err(|error| error.to_string())
    }

    pub(crate) fn event(&self, name: &str, data: &Value) {
        let time = json!({"seconds": 0, "microseconds": 0});
        // A test that is gone hears nothing more.
        let _ = self.send(&json!({"event": name, "data": data, "timestamp": time}));
    }

    pub(crate) fn tray_moved(&self, id: &str, open: bool) {
        let data = json!({"device": "", "id": id, "tray-open": open});
        self.event("DEVICE_TRAY_MOVED", &data);
    }

    pub(crate) fn device_deleted(&self, id: &str) {
        self.event(
            "DEVICE_DELETED",
            &json!({"device": id, "path": format!("/machine/{id}")}),
        );
    }

    /// The socket once more, for reading commands.
    pub(crate) fn commands(&self) -> Result<UnixStream> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        socket.try_clone().map_err(|error| error.to_string())
    }
}
