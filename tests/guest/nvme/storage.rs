//! File systems on a namespace.

use crate::file_system::{FileSystem, manifest, manifest_command};
use crate::lab::{Workplace, check_image};
use crate::machine::Guest;
use crate::shared::SharedGuest;

use super::{Controller, serve};

/// Several processes write files of many sizes; some are overwritten in parts, some deleted.
const WRITERS: &str = "
for name in a b c d; do
    (
        mkdir /mnt/$name
        for n in 1 2 3 4 5 6 7 8; do
            dd if=/dev/urandom of=/mnt/$name/$n bs=4k count=$((n * n * 3)) 2> /dev/null
            dd if=/dev/urandom of=/mnt/$name/$n bs=512 seek=$n count=3 conv=notrunc,fsync 2> /dev/null
        done
        rm /mnt/$name/3
    ) &
done
wait
";

/// A file system is made, filled, mounted again, compared, trimmed and checked, by the guest and by the host.
fn file_system_on(format: &str) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", format, "512M");
    let mut server = serve(&workplace, &image, format);
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    assert_eq!(
        guest.ok(&format!(
            "cat /sys/class/nvme/{}/queue_count",
            controller.name
        )),
        "3",
        "one for administration, and one for each processor"
    );

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

    let interrupts = guest.ok(&format!(
        "grep -E ' {}q[1-9]' /proc/interrupts",
        controller.name
    ));
    assert_eq!(interrupts.lines().count(), 2, "{interrupts}");
    assert!(interrupts.contains("MSIX"), "{interrupts}");
    for queue in interrupts.lines() {
        let counts = queue
            .split_whitespace()
            .skip(1)
            .map_while(|field| field.parse::<u64>().ok());
        assert_ne!(counts.sum::<u64>(), 0, "a queue is idle: {interrupts}");
    }
    controller.remove(&mut guest);
    guest.done();
    server.stop();

    check_image(&image, format);
    let raw = workplace.as_raw(&image, format);
    let files = workplace.file("files");
    kind.read_out(&raw, &expected, &files);
    assert_eq!(
        manifest(&files),
        expected,
        "the host reads other bytes than the guest wrote"
    );
}

#[test]
fn nvme_ext4_on_raw() {
    file_system_on("raw");
}

#[test]
fn nvme_ext4_on_qcow2() {
    file_system_on("qcow2");
}

/// A controller that is there when the guest starts survives a hard reset, and so does what a flush covered.
#[test]
fn nvme_survives_a_reset_of_the_machine() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "128M");
    let mut server = serve(&workplace, &image, "qcow2");
    let mut guest = Guest::builder()
        .module("nvme")
        .function(server.socket(0))
        .boot();
    let find = "basename $(dirname $(dirname $(ls -d /sys/bus/pci/devices/*/nvme/nvme0)))";
    let address = guest.wait_for(find);
    let controller = Controller::find(&mut guest, address);
    let device = controller.namespace(&mut guest, 1);
    let sum = guest.ok(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=16 2> /dev/null
        dd if=/tmp/data of={device} bs=1M seek=5 conv=fsync 2> /dev/null
        sha256sum < /tmp/data
        (dd if=/dev/urandom of={device} bs=64k seek=1000 count=200 oflag=direct 2> /dev/null &)"
    ));
    guest.reset();
    let controller = Controller::find(&mut guest, controller.pci);
    let device = controller.namespace(&mut guest, 1);
    let again = guest.ok(&format!(
        "dd if={device} bs=1M skip=5 count=16 2> /dev/null | sha256sum"
    ));
    assert_eq!(again, sum);
    guest.finish();
    server.stop();
    check_image(&image, "qcow2");
}
