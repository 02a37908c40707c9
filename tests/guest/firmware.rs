//! Firmware, which has drivers of its own, starts a system from a served disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::lab::function::FunctionServer;
use crate::lab::{Process, Workplace, run, tail, tool};

/// Emulation on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(300);

/// What the boot sector prints, which is not in the boot sector itself.
const GREETING: &str = "started from the disk that was served\n";

/// QEMU ends with this status (a value written to its exit port, doubled, plus one) when the greeting was printed.
const STARTED: i32 = 0x10 * 2 + 1;

/// A boot sector that reads eight sectors from number 7 with INT 13h, prints them up to a zero on the first serial
/// port, and ends QEMU.
const BOOT_SECTOR: &[u8] = &[
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0xbe, 0x28, 0x7c, // mov si, packet
    0xb4, 0x42, // mov ah, 42h: extended read
    0xcd, 0x13, // int 13h, of the drive that the firmware left in dl
    0x72, 0x15, // jc failed
    0xbe, 0x00, 0x80, // mov si, 8000h
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x06, // jz printed
    0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xee, // out dx, al
    0xeb, 0xf5, // jmp next
    0xb0, 0x10, // printed: mov al, 10h
    0xe6, 0xf4, // end: out f4h, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp hlt
    0xb0, 0x11, // failed: mov al, 11h
    0xeb, 0xf7, // jmp end
    0x10, 0x00, 0x08, 0x00, 0x00, 0x80, 0x00, 0x00, // packet: 8 sectors to 0:8000h
    0x07, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // from sector 7
];

/// A disk that starts, in the given format.
#[track_caller]
pub(crate) fn bootable(workplace: &Workplace, format: &str) -> PathBuf {
    let raw = workplace.file("bootable.raw");
    let file = File::create(&raw).expect("an image");
    file.set_len(16 << 20).expect("an image");
    for (bytes, at) in [
        (BOOT_SECTOR, 0),
        (&[0x55, 0xaa], 510),
        (GREETING.as_bytes(), 7 * 512),
    ] {
        file.write_all_at(bytes, at).expect("an image");
    }
    let image = workplace.file("bootable");
    run(tool("qemu-img")
        .args(["convert", "-f", "raw", "-O", format])
        .arg(&raw)
        .arg(&image));
    image
}

/// Starts a machine with SeaBIOS and nothing but one PCI function; it must start from that.
#[track_caller]
pub(crate) fn starts_with_seabios(workplace: &Workplace, socket: &Path) {
    let serial = workplace.file("serial");
    let device = json!({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": socket}});
    let mut command = tool("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-accel", "tcg", "-cpu", "max", "-m", "128"])
        .args(["-M", "q35,sata=off,smbus=off,memory-backend=memory"])
        .args([
            "-object",
            "memory-backend-memfd,id=memory,size=128M,share=on",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .arg("-device")
        .arg(device.to_string());
    let mut qemu = Process::background(&mut command, &workplace.file("qemu.log"));
    let status = qemu.wait(LIMIT);
    assert_eq!(
        status.code(),
        Some(STARTED),
        "{}\n--- serial port:\n{}",
        qemu.messages(),
        tail(&serial)
    );
    let printed = fs::read_to_string(&serial).expect("what was printed");
    assert!(printed.ends_with(GREETING), "{printed}");
}

/// SeaBIOS' own NVMe driver, polled and with the interrupt line, before any operating system.
#[test]
fn seabios_starts_from_nvme() {
    let workplace = Workplace::new();
    let image = bootable(&workplace, "qcow2");
    let namespace = format!("{},format=qcow2", image.display());
    let arguments = ["--namespace", &namespace];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    starts_with_seabios(&workplace, server.socket(0));
    server.stop();
}
