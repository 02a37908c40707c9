//! Whole file systems on served disks: what several processes wrote, trimmed and flushed is there after a hard
//! reset, and the host finds the same bytes in the image.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::file_system::{FileSystem, manifest, manifest_command};
use crate::lab::{Server, Workplace, check_image, run, tool, wait_until};
use crate::machine::Guest;

/// Four processes at once: each writes files of many sizes, overwrites parts of some, appends, renames, deletes.
const WRITERS: &str = "
writer() {
    mkdir -p /mnt/$1
    for n in 1 2 3 4 5 6 7 8 9 10 11 12; do
        file=/mnt/$1/file$n
        dd if=/dev/urandom of=$file bs=4k count=$((n * n * 3)) 2> /dev/null
        dd if=/dev/urandom of=$file bs=512 seek=$((n * 7)) count=3 conv=notrunc 2> /dev/null
        echo \"appended by $1\" >> $file
        case $((n % 4)) in
            0) rm $file ;;
            1) mv $file $file.renamed ;;
            2) dd if=/dev/zero of=$file bs=4k seek=2 count=4 conv=notrunc,fsync 2> /dev/null ;;
        esac
    done
}
for name in ROUND-a ROUND-b ROUND-c ROUND-d; do writer $name & done
wait
";

/// The whole story of one disk.
fn integrity(file_system: FileSystem, workplace: &Workplace, image: &Path, format: &str) {
    let mut server = Server::start(workplace, image, format);
    let mut guest = Guest::builder().disk(&server).boot();
    assert_eq!(guest.ok("ls /sys/block/vda/mq | wc -l"), "2", "queues");

    guest.ok(&file_system.make("/dev/vda"));
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    guest.ok(&WRITERS.replace("ROUND", "first"));
    trim(&mut guest, image, format);

    // A hard reset: what sync covered must be there, and the journal must fit to it.
    let before = guest.ok(&format!("sync; {}", manifest_command("/mnt")));
    guest.reset();
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt")), before);

    guest.ok("rm -r /mnt/first-b");
    guest.ok(&WRITERS.replace("ROUND", "second"));
    let expected = guest.ok(&manifest_command("/mnt"));
    guest.ok("umount /mnt");
    guest.ok(&file_system.check("/dev/vda"));
    // Nothing of this may come from the guest's own memory.
    guest.ok("echo 3 > /proc/sys/vm/drop_caches");
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt")), expected);
    guest.ok("umount /mnt");

    let interrupts = guest.ok("grep 'virtio[0-9]*-req' /proc/interrupts");
    assert_eq!(interrupts.lines().count(), 2, "{interrupts}");
    for queue in interrupts.lines() {
        let counts = queue
            .split_whitespace()
            .skip(1)
            .map_while(|field| field.parse::<u64>().ok());
        assert_ne!(counts.sum::<u64>(), 0, "a queue is idle: {interrupts}");
    }
    guest.finish();
    server.stop();

    check_image(image, format);
    let raw = workplace.as_raw(image, format);
    let files = workplace.file("files");
    file_system.read_out(&raw, &expected, &files);
    assert_eq!(
        manifest(&files),
        expected,
        "the host reads other bytes than the guest wrote"
    );
}

/// Frees 64 MiB of the file system and expects the image to become smaller by most of it.
fn trim(guest: &mut Guest, image: &Path, format: &str) {
    let used = || fs::metadata(image).expect("the image").blocks() * 512;
    guest.ok("dd if=/dev/urandom of=/mnt/large bs=1M count=64 conv=fsync 2> /dev/null");
    let full = used();
    guest.ok("rm /mnt/large; sync; fstrim -v /mnt");
    // The space is given back at the latest by a flush, for which there has to be something to flush.
    guest.ok("echo done > /mnt/trimmed; sync");
    let mut rest = used();
    let shrank = wait_until(Duration::from_secs(30), || {
        rest = used();
        rest + (48 << 20) < full
    });
    assert!(
        shrank,
        "trimming gave back {} bytes of 64 MiB ({format}): {full} before, {rest} after",
        full.saturating_sub(rest)
    );
}

#[test]
fn ext4_on_raw() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.raw", "raw", "1G");
    integrity(FileSystem::Ext4, &workplace, &image, "raw");
}

#[test]
fn xfs_on_raw() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.raw", "raw", "1G");
    integrity(FileSystem::Xfs, &workplace, &image, "raw");
}

/// A backing file of random bytes: whatever the guest has not written comes from there, and must not surface in files.
fn overlay(workplace: &Workplace) -> PathBuf {
    let backing = workplace.create("backing.qcow2", "qcow2", "1G");
    for commands in [
        ["write -P 0xa5 0 16M", "write -P 0x5a 100M 16M"],
        ["write -P 0xa5 700M 16M", "write -P 0x11 1023M 1M"],
    ] {
        let mut io = tool("qemu-io");
        run(io
            .args(["-f", "qcow2", "-c", commands[0], "-c", commands[1]])
            .arg(&backing));
    }
    workplace.create_overlay("overlay.qcow2", &backing, "qcow2")
}

#[test]
fn ext4_on_qcow2_with_backing() {
    let workplace = Workplace::new();
    let image = overlay(&workplace);
    let untouched = fs::read(workplace.file("backing.qcow2")).expect("the backing file");
    integrity(FileSystem::Ext4, &workplace, &image, "qcow2");
    assert!(
        untouched == fs::read(workplace.file("backing.qcow2")).expect("the backing file"),
        "the backing file changed"
    );
}

#[test]
fn xfs_on_qcow2_with_backing() {
    let workplace = Workplace::new();
    let image = overlay(&workplace);
    integrity(FileSystem::Xfs, &workplace, &image, "qcow2");
}
