//! QMP, as far as the tests use it.

use std::{
    io::Read,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use block::faults::Event;
use serde_json::{Value, json};

use crate::{Result, args::Options, machine::Machine, migration, monitor::Monitor};

/// Executes commands until `quit`, or until the test is gone.
pub(crate) fn serve(monitor: &Monitor, machine: &Arc<Mutex<Machine>>) -> Result<()> {
    let mut socket = monitor.commands()?;
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        match socket.read(&mut piece) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(len) => text.extend_from_slice(&piece[..len]),
        }
        // Commands follow each other without anything between them.
        let mut stream = serde_json::Deserializer::from_slice(&text).into_iter::<Value>();
        let mut commands = Vec::new();
        while let Some(Ok(command)) = stream.next() {
            commands.push(command);
        }
        let used = stream.byte_offset();
        text.drain(..used);
        for command in commands {
            if command["execute"] == "quit" {
                return monitor.send(&json!({"return": {}}));
            }
            let mut answer = match execute(monitor, &command, machine) {
                Ok(value) => json!({"return": value}),
                Err(error) => json!({"error": {"class": "GenericError", "desc": error}}),
            };
            if let Some(id) = command.get("id") {
                answer["id"] = id.clone();
            }
            monitor.send(&answer)?;
            if command["execute"] == "system_reset" {
                monitor.event(
                    "RESET",
                    &json!({"guest": false, "reason": "host-qmp-system-reset"}),
                );
            }
        }
    }
}

fn execute(monitor: &Monitor, command: &Value, machine: &Arc<Mutex<Machine>>) -> Result<Value> {
    let name = command["execute"].as_str().unwrap_or_default();
    let arguments = &command["arguments"];
    let text = |key: &str| {
        let value = arguments[key].as_str();
        value.ok_or_else(|| format!("{name}: expected {key}"))
    };
    let mut guard = machine.lock().unwrap_or_else(PoisonError::into_inner);
    match name {
        "qmp_capabilities" => {}
        "query-machines" => return Ok(machines()),
        "qom-list-types" => return Ok(types()),
        "query-status" => {
            let status = if guard.running { "running" } else { "paused" };
            return Ok(json!({"running": guard.running, "status": status}));
        }
        "system_reset" => guard.reset(),
        "block_resize" => {
            let size = arguments["size"].as_u64().ok_or("expected size")?;
            guard.resize(text("device")?, size)?;
        }
        "device_add" => {
            let mut device = Options::parse(text("driver")?);
            for (key, value) in arguments.as_object().into_iter().flatten() {
                device.set(key, value.as_str().unwrap_or_default());
            }
            guard.add_function(&device)?;
        }
        "device_del" => guard.remove_function(text("id")?)?,
        "blockdev-add" => {
            let file = arguments["file"]["filename"].as_str();
            guard.add_drive(text("node-name")?, file.ok_or("expected file.filename")?);
        }
        "blockdev-open-tray" | "blockdev-close-tray" => {
            let (id, open) = (text("id")?, name == "blockdev-open-tray");
            let (adapter, port) = guard.tray(id)?;
            let moved = if open {
                adapter.hba().open_tray(port, false)
            } else {
                adapter.hba().close_tray(port)
            };
            moved.map_err(|error| error.to_string())?;
            monitor.tray_moved(id, open);
        }
        "blockdev-remove-medium" => {
            let (adapter, port) = guard.tray(text("id")?)?;
            let removed = adapter.hba().remove_medium(port);
            removed.map_err(|error| error.to_string())?;
        }
        "blockdev-insert-medium" => {
            let medium = guard.medium(text("node-name")?)?;
            let (adapter, port) = guard.tray(text("id")?)?;
            let inserted = adapter.hba().insert_medium(port, medium);
            inserted.map_err(|error| error.to_string())?;
        }
        "human-monitor-command" => {
            let words = text("command-line")?.replace('"', "");
            let words: Vec<&str> = words.split_ascii_whitespace().collect();
            breakpoint(&guard, &words)?;
            return Ok(json!(""));
        }
        "migrate" => migration::send(&mut guard, text("uri")?, monitor)?,
        "query-migrate" => return Ok(json!({"status": "completed"})),
        _ => return Err(format!("there is no {name}")),
    }
    Ok(json!({}))
}

/// `qemu-io DRIVE break EVENT TAG` and `qemu-io DRIVE resume TAG`.
fn breakpoint(machine: &Machine, words: &[&str]) -> Result<()> {
    match words {
        ["qemu-io", drive, "break", event, tag] => {
            let event = Event::from_name(event).map_err(|error| error.to_string())?;
            let event = event.ok_or("nothing announces that event")?;
            machine.faults(drive)?.suspend_at(event, tag);
        }
        ["qemu-io", drive, "resume", tag] => {
            let faults = machine.faults(drive)?;
            // The port's thread may be on its way there, or never come.
            let until = Instant::now() + Duration::from_secs(1);
            while !faults.is_suspended(tag) && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            if !faults.resume(tag) {
                faults.remove_break(tag);
            }
        }
        _ => return Err(format!("there is no {words:?}")),
    }
    Ok(())
}

fn machines() -> Value {
    let machine = |name: &str, alias: &str| {
        json!({
            "name": name, "alias": alias, "cpu-max": 1, "hotpluggable-cpus": false,
            "numa-mem-supported": false, "deprecated": false, "acpi": true,
        })
    };
    json!([
        machine("pc-i440fx-10.0", "pc"),
        machine("pc-q35-10.0", "q35")
    ])
}

fn types() -> Value {
    let device = |name: &str| json!({"name": name, "parent": "device"});
    json!([
        device("i440FX-pcihost"),
        device("pci-bus-pc"),
        device("virtio-blk-pci"),
        device("nvme"),
        device("ich9-ahci"),
    ])
}
