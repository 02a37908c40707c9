//! What holds for a disk whichever function it is behind: file systems, fio that verifies, resets and a driver that
//! comes and goes under load.

use serde_json::json;

use crate::file_system::{FileSystem, manifest, manifest_command};
use crate::function::Kind;
use crate::lab::{Workplace, check_image};
use crate::load;
use crate::machine::Guest;
use crate::shared::SharedGuest;

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
fn file_system_on(guest: &mut Guest, kind: Kind, format: &str) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", format, "512M");
    let mut server = kind.serve(&workplace, &image, format);
    let function = kind.plug(guest, server.socket(0));
    let device = function.disk(guest);

    let ext4 = FileSystem::Ext4;
    guest.ok(&ext4.make(&device));
    guest.ok(&ext4.mount(&device, "/mnt"));
    guest.ok(WRITERS);
    guest.ok("sync; fstrim /mnt");
    let expected = guest.ok(&manifest_command("/mnt"));
    guest.ok("umount /mnt");
    guest.ok(&ext4.check(&device));
    guest.ok("echo 3 > /proc/sys/vm/drop_caches");
    guest.ok(&ext4.mount(&device, "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt")), expected);
    guest.ok("umount /mnt");
    function.expect_queues(guest, &device);
    function.remove(guest);
    server.stop();

    check_image(&image, format);
    let raw = workplace.as_raw(&image, format);
    let files = workplace.file("files");
    ext4.read_out(&raw, &expected, &files);
    assert_eq!(
        manifest(&files),
        expected,
        "the host reads other bytes than the guest wrote"
    );
}

/// The same in the guest that most tests share.
fn shared_file_system_on(kind: Kind, format: &str) {
    let mut guest = SharedGuest::get(1);
    file_system_on(&mut guest, kind, format);
    guest.done();
}

#[test]
fn nvme_ext4_on_raw() {
    shared_file_system_on(Kind::Nvme, "raw");
}

#[test]
fn nvme_ext4_on_qcow2() {
    shared_file_system_on(Kind::Nvme, "qcow2");
}

#[test]
fn ahci_ext4_on_raw() {
    shared_file_system_on(Kind::Ahci, "raw");
}

#[test]
fn ahci_ext4_on_qcow2() {
    shared_file_system_on(Kind::Ahci, "qcow2");
}

/// The memory of the guest is QEMU's alone: the server reaches every byte of it by a message. There is no such test
/// for AHCI: QEMU reads its registers with the machine locked, and answers no message meanwhile.
#[test]
fn nvme_ext4_in_memory_that_is_not_shared() {
    let mut guest = Guest::builder().private_memory().boot();
    let memory = guest.monitor("query-memdev", &json!({}));
    assert_eq!(memory[0]["share"], false, "{memory}");
    file_system_on(&mut guest, Kind::Nvme, "qcow2");
    guest.finish();
}

/// Jobs of fio, all at once, each on its own part of 96 MiB: many small writes in any order, four times over; blocks
/// that cross clusters; large ones that are verified while others are written; a flush every few writes.
const JOBS: &str = "
[global]
filename=DEVICE
direct=1
ioengine=libaio
verify=crc32c
verify_fatal=1
[small]
rw=randwrite
bs=4k
iodepth=16
numjobs=4
size=4m
offset_increment=4m
[odd]
rw=randwrite
bs=3k
iodepth=8
offset=32m
size=6m
[large]
rw=write
bs=256k
iodepth=4
offset=48m
size=24m
verify_backlog=16
[flushed]
rw=randwrite
bs=8k
fsync=16
offset=80m
size=2m
";

/// Bytes that each job above writes, and reads to verify them.
const SIZES: [(&str, u64); 4] = [
    ("small", 4 << 20),
    ("odd", 6 << 20),
    ("large", 24 << 20),
    ("flushed", 2 << 20),
];

/// Runs the jobs in /tmp/jobs.fio, with more options; gives the name of each of the seven, and how many bytes it has
/// read and written.
#[track_caller]
fn fio(guest: &mut Guest, options: &str) -> Vec<(String, u64, u64)> {
    // One line a job, in version 3 of its terse format: the name is the third field, and the error the fifth.
    let report = guest.ok(&format!(
        "cd /tmp
        fio --eta=never --output-format=terse --terse-version=3 --output=fio.out {options} jobs.fio || {{ cat fio.out; exit 1; }}
        grep '^3;' fio.out | cut -d ';' -f 3,5,6,47"
    ));
    let kibibytes = |text: &str| text.parse::<u64>().expect("a number") << 10;
    let jobs: Vec<_> = report
        .lines()
        .map(|line| match line.split(';').collect::<Vec<_>>()[..] {
            [name, "0", read, written] => (name.to_owned(), kibibytes(read), kibibytes(written)),
            _ => panic!("fio reports: {line}"),
        })
        .collect();
    assert_eq!(jobs.len(), 7, "{report}");
    jobs
}

/// Seven jobs of fio write and verify; after the driver has let go of the disk and taken it again, they verify what
/// they find.
fn fio_verifies(kind: Kind) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "96M");
    let mut server = kind.serve(&workplace, &image, "qcow2");
    let mut guest = SharedGuest::get(1);
    let mut function = kind.plug(&mut guest, server.socket(0));
    let mut device = function.disk(&mut guest);
    let describe = |guest: &mut Guest, device: &str| {
        let jobs = JOBS.replace("DEVICE", device);
        guest.ok(&format!("cat > /tmp/jobs.fio << 'END'\n{jobs}END"));
    };
    describe(&mut guest, &device);
    for (name, read, written) in fio(&mut guest, "") {
        let known = SIZES.iter().find(|(job, _)| name == *job);
        let (_, size) = known.unwrap_or_else(|| panic!("a job that nobody described: {name}"));
        assert_eq!(written, *size, "{name}");
        assert_eq!(read, *size, "{name}");
    }
    function.rebind(&mut guest, &device);
    device = function.disk(&mut guest);
    describe(&mut guest, &device);
    fio(&mut guest, "--verify_only");
    function.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}

#[test]
fn nvme_fio_verifies_several_jobs() {
    fio_verifies(Kind::Nvme);
}

#[test]
fn ahci_fio_verifies_several_jobs() {
    fio_verifies(Kind::Ahci);
}

/// The guest resets what is between it and the disk while it writes and verifies.
fn resets_under_load(kind: Kind) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "64M");
    let mut server = kind.serve(&workplace, &image, "qcow2");
    let mut guest = SharedGuest::get(1);
    let function = kind.plug(&mut guest, server.socket(0));
    let device = function.disk(&mut guest);
    load::start(&mut guest, &device);
    for _ in 0..5 {
        load::wait_for_progress(&mut guest);
        function.reset(&mut guest, &device);
    }
    load::stop(&mut guest);
    assert_eq!(function.disk(&mut guest), device, "the disk is another one");
    function.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}

#[test]
fn nvme_resets_under_load_lose_nothing() {
    resets_under_load(Kind::Nvme);
}

#[test]
fn ahci_port_resets_under_load_lose_nothing() {
    resets_under_load(Kind::Ahci);
}

/// The driver lets go of a busy disk, and takes it again; nothing that was synced is lost.
fn driver_comes_and_goes(kind: Kind) {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "128M");
    let mut server = kind.serve(&workplace, &image, "qcow2");
    let mut guest = SharedGuest::get(1);
    let mut function = kind.plug(&mut guest, server.socket(0));
    let mut device = function.disk(&mut guest);
    for round in 0..3 {
        guest.ok(&format!(
            "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
            dd if=/tmp/w of={device} bs=1M seek={} conv=fsync 2> /dev/null
            (dd if=/dev/urandom of={device} bs=64k seek=1000 count=400 oflag=direct > /dev/null 2>&1 &)
            (while dd if={device} of=/dev/null bs=256k count=64 iflag=direct > /dev/null 2>&1; do :; done &)
            usleep 100000",
            round * 4,
        ));
        function.rebind(&mut guest, &device);
        device = function.disk(&mut guest);
        guest.ok(&format!(
            "dd if={device} bs=1M skip={} count=4 2> /dev/null | cmp - /tmp/w",
            round * 4
        ));
    }
    function.remove(&mut guest);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}

#[test]
fn nvme_driver_comes_and_goes_under_load() {
    driver_comes_and_goes(Kind::Nvme);
}

#[test]
fn ahci_driver_comes_and_goes_under_load() {
    driver_comes_and_goes(Kind::Ahci);
}
