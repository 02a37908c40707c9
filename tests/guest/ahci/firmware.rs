//! SeaBIOS starts what it finds on a disk and on a medium behind the adapter.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::lab::function::FunctionServer;
use crate::lab::{Process, Workplace, tool};

use super::iso::iso;

/// A boot sector: writes `word` to the debug console (port 402h), and ends the machine through port F4h.
fn boot_sector(word: &[u8]) -> Vec<u8> {
    // cli; mov dx, 402h
    let mut code = vec![0xfa, 0xba, 0x02, 0x04];
    for byte in word {
        // mov al, byte; out dx, al
        code.extend([0xb0, *byte, 0xee]);
    }
    // mov dx, F4h; mov al, 5; out dx, al; hlt; jmp $
    code.extend([0xba, 0xf4, 0, 0xb0, 5, 0xee, 0xf4, 0xeb, 0xfd]);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

/// Starts a machine that has nothing but the adapter; gives what was written to the debug console.
fn console_of(workplace: &Workplace, socket: &Path) -> String {
    let console = workplace.file("console");
    let device = json!({
        "driver": "vfio-user-pci", "socket": {"type": "unix", "path": socket}, "bootindex": 0,
    });
    let mut command = tool("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-accel", "tcg", "-m", "128"])
        .args(["-M", "q35,sata=off,smbus=off,memory-backend=memory"])
        .args([
            "-object",
            "memory-backend-memfd,id=memory,size=128M,share=on",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(["-global", "isa-debugcon.iobase=0x402"])
        .arg("-debugcon")
        .arg(format!("file:{}", console.display()))
        .arg("-device")
        .arg(device.to_string());
    let mut qemu = Process::background(&mut command, &workplace.file("qemu.log"));
    qemu.wait(Duration::from_secs(120));
    let text = fs::read(&console).expect("the console");
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn ahci_firmware_starts_from_a_disk() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "16M");
    let mut bytes = fs::read(&image).expect("the image");
    bytes[..512].copy_from_slice(&boot_sector(b"\nstarted from disk\n"));
    fs::write(&image, &bytes).expect("the image");
    let disk = format!("{},format=raw", image.display());
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    let console = console_of(&workplace, server.socket(0));
    assert!(console.contains("started from disk"), "{console}");
    server.stop();
}

#[test]
fn ahci_firmware_starts_from_a_medium() {
    let workplace = Workplace::new();
    let medium = workplace.file("boot.iso");
    let boot = boot_sector(b"\nstarted from disc\n");
    fs::write(&medium, iso("BOOT", b"nothing", Some(&boot))).expect("the image");
    let medium = medium.to_str().expect("plain text").to_owned();
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--cdrom", &medium]);
    let console = console_of(&workplace, server.socket(0));
    assert!(console.contains("started from disc"), "{console}");
    server.stop();
}
