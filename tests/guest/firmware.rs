//! Firmware, which has drivers of its own, starts a system from a served disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::lab::function::FunctionServer;
use crate::lab::{Process, Workplace, lab, run, tail, tool, wait_until};

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

/// A machine with a serial port and nothing but one PCI function; the firmware is SeaBIOS unless more is said.
fn machine(serial: &Path, socket: &Path, megabytes: u32) -> Command {
    let device = json!({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": socket}});
    let mut command = tool("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-accel", "tcg", "-cpu", "max", "-no-reboot"])
        .args(["-M", "q35,sata=off,smbus=off,memory-backend=memory"])
        .args(["-m", &megabytes.to_string(), "-object"])
        .arg(format!(
            "memory-backend-memfd,id=memory,size={megabytes}M,share=on"
        ))
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .arg("-device")
        .arg(device.to_string());
    command
}

/// Starts a machine with SeaBIOS and nothing but one PCI function; it must start from that.
#[track_caller]
pub(crate) fn starts_with_seabios(workplace: &Workplace, socket: &Path) {
    let serial = workplace.file("serial");
    let mut command = machine(&serial, socket, 128);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
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

/// What OVMF's shell runs: Linux, with its first file system from the same disk.
const STARTUP: &str =
    "linux.efi initrd=\\initrd modules=ahci,sd_mod,sr_mod console=ttyS0 panic=-1 reboot=t\r\n";

/// A disk, in the given format, with a FAT file system on which OVMF finds Linux.
#[track_caller]
pub(crate) fn with_linux(workplace: &Workplace, format: &str) -> PathBuf {
    let folder = workplace.file("fat");
    fs::create_dir(&folder).expect("a folder");
    let guest = lab().join("guest");
    let version = fs::read_to_string(guest.join("version")).expect("the kernel's version");
    let kernel = lab().join(format!("kernel/boot/vmlinuz-{}", version.trim()));
    fs::copy(kernel, folder.join("linux.efi")).expect("the kernel");
    fs::copy(guest.join("initramfs.cpio"), folder.join("initrd")).expect("the initramfs");
    fs::write(folder.join("startup.nsh"), STARTUP).expect("a script");
    let source =
        json!({"driver": "raw", "file": {"driver": "vvfat", "dir": folder, "fat-type": 16}});
    let image = workplace.file("linux");
    run(tool("qemu-img")
        .args(["convert", &format!("json:{source}"), "-O", format])
        .arg(&image));
    image
}

/// Starts a machine with OVMF and nothing but one PCI function; it must start Linux from that, which then prints
/// `found` about it.
#[track_caller]
pub(crate) fn starts_with_ovmf(workplace: &Workplace, socket: &Path, found: &str) {
    let firmware = lab().join("root/usr/share/OVMF");
    let variables = workplace.file("variables.fd");
    fs::copy(firmware.join("OVMF_VARS_4M.fd"), &variables).expect("the variables of OVMF");
    let serial = workplace.file("serial");
    let mut command = machine(&serial, socket, 512);
    for (file, access) in [
        (firmware.join("OVMF_CODE_4M.fd"), "readonly=on"),
        (variables, "readonly=off"),
    ] {
        command.arg("-drive").arg(format!(
            "if=pflash,format=raw,{access},file={}",
            file.display()
        ));
    }
    let mut qemu = Process::background(&mut command, &workplace.file("qemu.log"));
    let started = wait_until(LIMIT, || {
        assert!(qemu.ended().is_none(), "QEMU ended\n{}", qemu.messages());
        let printed = fs::read(&serial).unwrap_or_default();
        let printed = String::from_utf8_lossy(&printed);
        printed.contains("Run /init as init process") && printed.contains(found)
    });
    assert!(
        started,
        "{}\n--- serial port:\n{}",
        qemu.messages(),
        tail(&serial)
    );
    // It has no disk that it writes to, and nobody to talk to.
    qemu.kill();
}

/// OVMF's NVMe driver reads Linux and its first file system, 40 MB, from a namespace.
#[test]
fn ovmf_starts_linux_from_nvme() {
    let workplace = Workplace::new();
    let image = with_linux(&workplace, "qcow2");
    let namespace = format!("{},format=qcow2", image.display());
    let arguments = ["--namespace", &namespace];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    starts_with_ovmf(&workplace, server.socket(0), "nvme0n1: p1");
    server.stop();
}

/// The same with OVMF's AHCI driver, and then Linux's.
#[test]
fn ovmf_starts_linux_from_ahci() {
    let workplace = Workplace::new();
    let image = with_linux(&workplace, "qcow2");
    let disk = format!("{},format=qcow2", image.display());
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    starts_with_ovmf(&workplace, server.socket(0), "sda: sda1");
    server.stop();
}
