//! What only ATA disks have: the tools that read them, ports that are plugged and unplugged, a size seen by a scan.

use crate::function::Kind;
use crate::lab::function::{FunctionServer, ctl};
use crate::lab::{Workplace, check_image};
use crate::load;
use crate::shared::SharedGuest;

use super::Adapter;

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
    find(
        &guest.ok(&format!("sg_vpd --page=ai {device}")),
        &["Some disk", "SERIAL-17"],
    );
    find(
        &guest.ok(&format!("sg_modes --page=8 {device}")),
        &["Caching"],
    );
    guest.ok(&format!(
        "sg_turs {device} && sg_requests {device} && sg_sync {device} &&
        sg_verify --lba=0 --count=128 {device}"
    ));
    // What is trimmed reads as zeroes, and nothing else does.
    guest.ok(&format!(
        "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
        dd if=/tmp/w of={device} bs=1M conv=fsync 2> /dev/null
        hdparm --please-destroy-my-drive --trim-sector-ranges 2048:2048 {device}
        dd if=/dev/zero of=/tmp/w bs=1M seek=1 count=1 conv=notrunc 2> /dev/null
        dd if={device} bs=1M count=4 iflag=direct 2> /dev/null | cmp - /tmp/w
        hdparm -F {device}"
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

/// hdparm sets a password, finds the disk locked after a power cycle, unlocks and erases it, and sanitizes it.
#[test]
fn ahci_hdparm_locks_and_erases_a_disk() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "32M");
    let disk = format!(
        "{},format=raw,sidecar={}",
        image.display(),
        workplace.file("disk.ata").display()
    );
    let control = workplace.socket("ahci.ctl");
    let arguments = [
        "--disk",
        &disk,
        "--control",
        control.to_str().expect("text"),
    ];
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &arguments);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let device = adapter.drive(&mut guest, 0);
    let fill = format!(
        "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
        dd if=/tmp/w of={device} bs=1M seek=8 conv=fsync 2> /dev/null
        dd if={device} bs=1M skip=8 count=4 iflag=direct 2> /dev/null | cmp - /tmp/w"
    );
    let is_erased = format!(
        "blockdev --flushbufs {device}
        dd if={device} bs=1M iflag=direct 2> /dev/null > /tmp/all
        dd if=/dev/zero bs=1M count=32 2> /dev/null | cmp - /tmp/all; left=$?; rm /tmp/all; [ $left = 0 ]"
    );
    guest.ok(&fill);
    let identity = guest.ok(&format!("hdparm -I {device}"));
    for part in [
        "Security Mode feature set",
        "Master password revision code = 65534",
        "SANITIZE feature set",
        "BLOCK_ERASE_EXT command",
        "OVERWRITE_EXT command",
    ] {
        assert!(identity.contains(part), "{part} is not in:\n{identity}");
    }
    guest.ok(&format!(
        "hdparm --user-master u --security-set-pass open {device}
        hdparm -I {device} | grep -q '^[[:space:]]*enabled'"
    ));
    // Pulled and plugged it is locked: nothing can be read, which the kernel tries and complains of.
    ctl(&control, &["unplug", "port=0"]);
    guest.wait_for(&format!("[ ! -e {device} ]"));
    ctl(&control, &["plug-disk", "port=0", &format!("disk={disk}")]);
    assert_eq!(adapter.drive(&mut guest, 0), device);
    guest.ok(&format!(
        "hdparm -I {device} | grep -q '^[[:space:]]*locked'
        if dd if={device} of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null; then exit 1; fi
        hdparm --user-master u --security-unlock open {device}
        hdparm -I {device} | grep -q 'not[[:space:]]*locked'
        dd if={device} bs=1M skip=8 count=4 iflag=direct 2> /dev/null | cmp - /tmp/w
        hdparm --user-master u --security-erase open {device}
        hdparm -I {device} | grep -q 'not[[:space:]]*enabled'"
    ));
    guest.ok(&is_erased);
    guest.ok(&fill);
    guest.ok(&format!(
        "hdparm --yes-i-know-what-i-am-doing --sanitize-block-erase {device}"
    ));
    guest.wait_for(&format!(
        "hdparm --sanitize-status {device} | grep -q 'Completed Without Error'"
    ));
    guest.ok(&is_erased);
    guest.ok("dmesg -c > /dev/null");
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
}

/// A disk comes into a free port while another one is busy, goes, and comes back with the same bytes.
#[test]
fn ahci_disks_come_and_go() {
    let workplace = Workplace::new();
    let first = workplace.create("first", "qcow2", "32M");
    let second = workplace.create("second", "raw", "32M");
    let (mut server, control) = Kind::Ahci.serve_controlled(&workplace, &first, "qcow2");
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let device = adapter.drive(&mut guest, 0);
    load::start(&mut guest, &device);
    let disk = format!("disk={},format=raw", second.display());
    ctl(&control, &["plug-disk", "port=1", &disk]);
    let other = adapter.drive(&mut guest, 1);
    guest.ok(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=4 2> /dev/null
        dd if=/tmp/data of={other} bs=1M seek=28 conv=fsync 2> /dev/null"
    ));
    ctl(&control, &["unplug", "port=1"]);
    guest.wait_for(&format!("[ ! -e {other} ]"));
    guest.ok("dmesg -c > /dev/null"); // a link that breaks is an exception
    ctl(&control, &["plug-disk", "port=1", &disk]);
    let other = adapter.drive(&mut guest, 1);
    guest.ok(&format!(
        "dd if={other} bs=1M skip=28 2> /dev/null | cmp - /tmp/data"
    ));
    load::stop(&mut guest);
    guest.ok("dmesg -c > /dev/null"); // and so is one that is new
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&first, "qcow2");
}

/// The host resizes the disk while the guest reads it; the guest sees that when it looks for the disk again.
#[test]
fn ahci_resize_is_seen_after_a_scan() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "32M");
    let (mut server, control) = Kind::Ahci.serve_controlled(&workplace, &image, "qcow2");
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
