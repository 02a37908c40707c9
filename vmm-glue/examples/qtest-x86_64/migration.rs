//! A machine moves into another process: RAM, the configuration spaces, and the state of the adapter.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use serde_json::{Value, json};
use virtio_devices::ahci::HbaState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::{Result, args::Args, machine::Machine, monitor::Monitor};

const PAGE: usize = 4096;
/// Bytes of a configuration space that go along.
const CONFIG: usize = 256;

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Stops the machine and sends it.
pub(crate) fn send(machine: &mut Machine, uri: &str, monitor: &Monitor) -> Result<()> {
    let path = uri.strip_prefix("unix:").ok_or("expected unix:PATH")?;
    let mut socket = UnixStream::connect(path).map_err(text)?;
    // Nothing is in flight from here on, and the machine never goes on here.
    for (_, slot) in machine.slots() {
        slot.function().pause();
    }
    machine.running = false;
    monitor.event("STOP", &json!({}));
    let configs: Vec<Value> = machine
        .slots()
        .map(|(at, slot)| {
            let mut bytes = vec![0; CONFIG];
            slot.read_config(0, &mut bytes);
            json!({"at": at, "bytes": bytes})
        })
        .collect();
    let adapter = machine.ahci.as_ref().map(|it| it.hba().save());
    let adapter = adapter.transpose().map_err(text)?;
    if let Some(adapter) = &machine.ahci {
        adapter.hba().close().map_err(text)?;
    }
    let pages = pages(machine)?;
    let state = json!({"configs": configs, "ahci": adapter, "pages": pages});
    socket.write_all(state.to_string().as_bytes()).map_err(text)
}

/// The pages that are not zero, with their addresses.
fn pages(machine: &Machine) -> Result<Vec<(u64, Vec<u8>)>> {
    let end = machine.memory.last_addr().0 + 1;
    let mut pages = Vec::new();
    let mut page = vec![0; PAGE];
    for at in (0..end).step_by(PAGE) {
        machine
            .memory
            .read_slice(&mut page, GuestAddress(at))
            .map_err(text)?;
        if page.iter().any(|byte| *byte != 0) {
            pages.push((at, page.clone()));
        }
    }
    Ok(pages)
}

/// Waits for a machine on a thread of its own.
pub(crate) fn listen(args: Args, machine: &Arc<Mutex<Machine>>, monitor: &Monitor) -> Result<()> {
    let Some(path) = args.incoming.as_deref() else {
        return Ok(());
    };
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|error| format!("{path}: {error}"))?;
    let (machine, monitor) = (Arc::clone(machine), monitor.clone());
    thread::spawn(move || match receive(&listener, &machine, &args) {
        Ok(()) => monitor.event("RESUME", &json!({})),
        Err(error) => {
            eprintln!("qtest-x86_64: incoming: {error}");
            std::process::exit(1);
        }
    });
    Ok(())
}

fn receive(listener: &UnixListener, machine: &Arc<Mutex<Machine>>, args: &Args) -> Result<()> {
    let (mut socket, _) = listener.accept().map_err(text)?;
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).map_err(text)?;
    let state: Value = serde_json::from_slice(&bytes).map_err(text)?;
    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
    let pages: Vec<(u64, Vec<u8>)> =
        serde_json::from_value(state["pages"].clone()).map_err(text)?;
    for (at, page) in pages {
        machine
            .memory
            .write_slice(&page, GuestAddress(at))
            .map_err(text)?;
    }
    for (saved, (at, slot)) in state["configs"]
        .as_array()
        .into_iter()
        .flatten()
        .zip(machine.slots())
    {
        let bytes: Vec<u8> = serde_json::from_value(saved["bytes"].clone()).map_err(text)?;
        if saved["at"] != json!(at) {
            return Err(format!("there is no function at {}", saved["at"]));
        }
        slot.write_config(0, &bytes);
    }
    let adapter: Option<HbaState> = serde_json::from_value(state["ahci"].clone()).map_err(text)?;
    machine.add_devices(args)?;
    if let (Some(ours), Some(saved)) = (&machine.ahci, adapter) {
        ours.hba().restore(&saved).map_err(text)?;
    }
    machine.running = true;
    Ok(())
}
