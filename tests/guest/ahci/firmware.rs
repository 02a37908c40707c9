//! Firmware starts what it finds on a disk and on a medium behind the adapter.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::firmware::{starts_with_ovmf, with_linux};
use crate::lab::function::FunctionServer;
use crate::lab::{Process, Workplace, tool};

use super::iso::{Boot, write_iso};

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
    write_iso(&medium, "BOOT", b"nothing", Some(Boot::Bios(&boot)));
    let medium = medium.to_str().expect("plain text").to_owned();
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--cdrom", &medium]);
    let console = console_of(&workplace, server.socket(0));
    assert!(console.contains("started from disc"), "{console}");
    server.stop();
}

/// The first partition of a disk, up to where it has zeroes only, and its size in bytes.
fn first_partition(disk: &Path) -> (Vec<u8>, u64) {
    const PIECE: usize = 1 << 20;
    let disk = File::open(disk).expect("the disk");
    let mut entry = [0; 8];
    // The partition table's first entry is at 446; its start and its length, in sectors, at 8.
    disk.read_exact_at(&mut entry, 446 + 8)
        .expect("a partition table");
    let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| entry[at + byte]));
    let (start, size) = (u64::from(number(0)) * 512, u64::from(number(4)) * 512);
    let mut bytes = Vec::new();
    for place in (0..size).step_by(PIECE) {
        let mut piece = vec![0; PIECE.min((size - place) as usize)];
        disk.read_exact_at(&mut piece, start + place)
            .expect("the partition");
        if piece.iter().any(|&byte| byte != 0) {
            bytes.resize(place as usize, 0);
            bytes.append(&mut piece);
        }
    }
    (bytes, size)
}

/// OVMF's drivers of AHCI, packet devices and El Torito find a FAT file system on the medium, and read Linux from it.
#[test]
fn ovmf_starts_linux_from_a_medium() {
    let workplace = Workplace::new();
    let disk = with_linux(&workplace, "raw");
    let (bytes, size) = first_partition(&disk);
    let medium = workplace.file("linux.iso");
    let boot = Boot::Uefi {
        bytes: &bytes,
        size,
    };
    write_iso(&medium, "LINUX", b"nothing", Some(boot));
    let medium = medium.to_str().expect("plain text").to_owned();
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--cdrom", &medium]);
    starts_with_ovmf(&workplace, server.socket(0), "[sr0] scsi3-mmc drive");
    server.stop();
}
