//! Disks: file systems, what tools read of them, and a driver that comes and goes under load.

use crate::file_system::{FileSystem, manifest, manifest_command};
use crate::lab::function::{FunctionServer, ctl};
use crate::lab::{Workplace, check_image};
use crate::shared::SharedGuest;

use super::Adapter;

/// Several processes write files of many sizes; some are overwritten in parts, some deleted.
const WRITERS: &str = "
for name in a b c; do
    (
        mkdir /mnt/$name
        for n in 1 2 3 4 5 6; do
            dd if=/dev/urandom of=/mnt/$name/$n bs=4k count=$((n * n * 4)) 2> /dev/null
            dd if=/dev/urandom of=/mnt/$name/$n bs=512 seek=$n count=3 conv=notrunc,fsync 2> /dev/null
        done
        rm /mnt/$name/3
    ) &
done
wait
";

fn file_system_on(format: &str) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", format, "256M");
    let disk = format!("{},format={format}", image.display());
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let device = adapter.drive(&mut guest, 0);
    let name = device.trim_start_matches("/dev/");
    // Commands are queued, and a message is the interrupt.
    let depth = guest.ok(&format!("cat /sys/block/{name}/device/queue_depth"));
    assert!(matches!(depth.trim(), "31" | "32"), "{depth}");
    let messages = guest.ok(&format!("ls /sys/bus/pci/devices/{}/msi_irqs", adapter.pci));
    assert_eq!(messages.split_whitespace().count(), 1, "{messages}");

    let kind = FileSystem::Ext4;
    guest.ok(&kind.make(&device));
    guest.ok(&kind.mount(&device, "/mnt"));
    guest.ok(WRITERS);
    guest.ok("sync; fstrim /mnt");
    let expected = guest.ok(&manifest_command("/mnt"));
    guest.ok("umount /mnt");
    guest.ok(&kind.check(&device));
    guest.ok("echo 3 > /proc/sys/vm/drop_caches");
    guest.ok(&kind.mount(&device, "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt")), expected);
    guest.ok("umount /mnt");
    adapter.remove(&mut guest);
    guest.done();
    server.stop();

    check_image(&image, format);
    let raw = workplace.as_raw(&image, format);
    let files = workplace.file("files");
    kind.read_out(&raw, &expected, &files);
    assert_eq!(manifest(&files), expected);
}

#[test]
fn ahci_ext4_on_raw() {
    file_system_on("raw");
}

#[test]
fn ahci_ext4_on_qcow2() {
    file_system_on("qcow2");
}

/// hdparm, smartctl and the tools of sg3-utils find what the command line said, and nothing to complain of.
#[test]
fn ahci_tools_read_the_drive() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "64M");
    let disk = format!(
        "{},format=raw,serial=SERIAL-17,wwn=5000c500a1b2c3d4,model=Some disk,firmware=F7,physical=4096",
        image.display()
    );
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let device = adapter.drive(&mut guest, 0);
    let find = |text: &str, wanted: &[&str]| {
        for part in wanted {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    };
    let identity = guest.ok(&format!("hdparm -I {device}"));
    find(
        &identity,
        &[
            "Some disk",
            "SERIAL-17",
            "F7",
            "5000c500a1b2c3d4",
            "Native Command Queueing",
            "Queue depth: 32",
            "48-bit Address feature set",
        ],
    );
    let smart = guest.sh(&format!("smartctl -a {device}"));
    // Bits 0 to 2 of the exit status are errors of the command line, of the device and of a command.
    assert_eq!(smart.0 & 7, 0, "{}", smart.1);
    find(
        &smart.1,
        &[
            "SMART overall-health self-assessment test result: PASSED",
            "4096 bytes physical",
        ],
    );
    let logs = guest.sh(&format!("smartctl -x {device}"));
    assert_eq!(logs.0 & 3, 0, "{}", logs.1);
    find(&guest.ok(&format!("sg_inq {device}")), &["Some disk"]);
    find(&guest.ok(&format!("sg_sat_identify {device}")), &["00"]);
    find(
        &guest.ok(&format!("sg_readcap -l {device}")),
        &["131072", "Logical blocks per physical block exponent=3"],
    );
    guest.ok(&format!(
        "sg_turs {device} && sg_verify --lba=0 --count=128 {device}"
    ));
    // The write cache is switched, the head is parked, the drive sleeps and wakes up.
    guest.ok(&format!(
        "hdparm -W0 {device} && hdparm -W {device} | grep -q '=  0' && hdparm -W1 {device} &&
        hdparm -y {device} && hdparm -C {device} | grep -q standby &&
        dd if={device} of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null &&
        hdparm -C {device} | grep -q active"
    ));
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
}

/// The driver lets go of the adapter while it is busy, and takes it again; nothing that was synced is lost.
#[test]
fn ahci_driver_comes_and_goes_under_load() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "128M");
    let disk = format!("{},format=qcow2", image.display());
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let mut device = adapter.drive(&mut guest, 0);
    let sum = guest.ok(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2> /dev/null
        dd if=/tmp/data of={device} bs=1M seek=5 conv=fsync 2> /dev/null
        sha256sum < /tmp/data"
    ));
    for _ in 0..3 {
        guest.ok(&format!(
            "(dd if=/dev/urandom of={device} bs=64k seek=1000 count=400 oflag=direct > /dev/null 2>&1 &)
            (while dd if={device} of=/dev/null bs=256k count=64 iflag=direct > /dev/null 2>&1; do :; done &)
            usleep 100000
            echo {pci} > /sys/bus/pci/drivers/ahci/unbind
            echo {pci} > /sys/bus/pci/drivers/ahci/bind",
            pci = adapter.pci
        ));
        device = adapter.drive(&mut guest, 0);
        let again = guest.ok(&format!(
            "dd if={device} bs=1M skip=5 count=8 2> /dev/null | sha256sum"
        ));
        assert_eq!(again, sum);
    }
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}

/// The host resizes the disk while the guest reads it; the guest sees that when it looks for the disk again.
#[test]
fn ahci_resize_is_seen_after_a_scan() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "32M");
    let control = workplace.socket("control");
    let disk = format!("{},format=qcow2", image.display());
    let arguments = [
        "--disk",
        &disk,
        "--control",
        control.to_str().expect("plain text"),
    ];
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &arguments);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let device = adapter.drive(&mut guest, 0);
    let sum = guest.ok(&format!(
        "[ $(blockdev --getsz {device}) = 65536 ] || exit 1
        dd if=/dev/urandom of={device} bs=1M count=8 conv=fsync 2> /dev/null
        (while dd if={device} of=/dev/null bs=256k count=64 iflag=direct > /dev/null 2>&1; do :; done &)
        dd if={device} bs=1M count=8 2> /dev/null | sha256sum"
    ));
    let resized = ctl(&control, &["resize", "port=0", "size=48M"]);
    assert_eq!(resized["size"], 48 << 20, "{resized}");
    guest.ok(&format!(
        "cd /sys/bus/pci/devices/{pci}
        echo 1 > /sys/block/{name}/device/delete
        for scan in ata*/host*/scsi_host/host*/scan; do echo '- - -' > $scan; done",
        pci = adapter.pci,
        name = device.trim_start_matches("/dev/"),
    ));
    let device = adapter.drive(&mut guest, 0);
    let again = guest.ok(&format!(
        "[ $(blockdev --getsz {device}) = 98304 ] || {{ blockdev --getsz {device}; exit 1; }}
        dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
        dd if=/tmp/w of={device} bs=1M seek=44 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        dd if={device} bs=1M skip=44 2> /dev/null | cmp - /tmp/w || exit 1
        dd if={device} bs=1M count=8 2> /dev/null | sha256sum"
    ));
    assert_eq!(again, sum);
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}
