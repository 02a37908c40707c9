//! Servers that go away under a living guest, and guests that go away under a living server.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::file_system::{FileSystem, manifest, manifest_command};
use crate::lab::{
    Durability, Server, Subject, Workplace, check_image, check_image_after_kill, subject,
    wait_until,
};
use crate::machine::Guest;

/// How long the guest may take to go on after its server came back.
const LIMIT: Duration = Duration::from_secs(180);

/// Three processes that write and verify until told to stop. Each remembers in memory what it wrote; it reads older
/// files back from the disk itself, and writes down every difference.
const LOAD: &str = r#"
mkdir -p /tmp/sums
load() {
    round=0
    mkdir -p /mnt/$1
    while [ ! -e /tmp/stop ]; do
        file=/mnt/$1/file$((round % 23))
        dd if=/dev/urandom of=/tmp/data.$1 bs=4k count=$((round % 61 + 1)) 2> /dev/null
        sum=$(sha256sum < /tmp/data.$1)
        # Some files are flushed, some are left to the kernel: both have to survive.
        case $((round % 3)) in 0) how=fsync ;; *) how=notrunc ;; esac
        rm -f $file
        dd if=/tmp/data.$1 of=$file bs=16k conv=$how 2> /dev/null || echo "$file: not written" >> /tmp/trouble
        echo "$sum" > /tmp/sums/$1.$((round % 23))
        old=$(((round * 7 + 3) % 23))
        if [ -e /tmp/sums/$1.$old ]; then
            found=$(dd if=/mnt/$1/file$old bs=4k iflag=direct 2> /dev/null | sha256sum)
            [ "$found" = "$(cat /tmp/sums/$1.$old)" ] || echo "round $round: file$old of $1 differs" >> /tmp/trouble
        fi
        round=$((round + 1))
        echo $round > /tmp/progress.$1
    done
    touch /tmp/done.$1
}
for name in a b c; do load $name > /dev/null 2>&1 & done
"#;

/// How many rounds the load has done.
fn progress(guest: &mut Guest) -> u64 {
    let (_, counts) = guest.sh("cat /tmp/progress.* 2> /dev/null");
    counts
        .lines()
        .map(|count| count.parse::<u64>().unwrap_or(0))
        .sum()
}

/// Waits until the load has done some more rounds.
#[track_caller]
fn wait_for_progress(guest: &mut Guest, server: &Server, rounds: u64) {
    let goal = progress(guest) + rounds;
    let went_on = wait_until(LIMIT, || progress(guest) >= goal);
    assert!(
        went_on,
        "the guest's writers are stuck\n{}",
        server.messages()
    );
}

/// A server that goes away the given way, several times, under a guest that writes and verifies.
fn server_goes_and_comes(
    image: &Path,
    workplace: &Workplace,
    format: &str,
    durability: Durability,
    go: fn(&mut Server),
) {
    let file_system = FileSystem::Ext4;
    let mut server = Server::start_with(workplace, image, format, durability);
    let mut guest = Guest::builder().disk_that_reconnects(&server).boot();
    guest.ok(&file_system.make("/dev/vda"));
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    guest.ok(LOAD);
    for round in 0..5 {
        wait_for_progress(&mut guest, &server, 12);
        // Not always at the same point of the load.
        sleep(Duration::from_millis(37 * round));
        go(&mut server);
        sleep(Duration::from_millis(100 * round));
        server.start_again();
    }
    wait_for_progress(&mut guest, &server, 12);
    guest.ok("touch /tmp/stop");
    let stopped = wait_until(LIMIT, || guest.sh("ls /tmp/done.* | wc -l").1 == "3");
    assert!(
        stopped,
        "the guest's writers do not stop\n{}",
        server.messages()
    );
    let (_, trouble) = guest.sh("cat /tmp/trouble 2> /dev/null");
    assert_eq!(trouble, "", "lost under the guest");

    // What the kernel believes to be on the disk is on the disk.
    let expected = guest.ok(&format!("sync; {}", manifest_command("/mnt")));
    guest.ok("umount /mnt; echo 3 > /proc/sys/vm/drop_caches");
    guest.ok(&file_system.check("/dev/vda"));
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt")), expected);
    guest.ok("umount /mnt");
    guest.finish();
    server.stop();

    match durability {
        Durability::Plain => check_image(image, format),
        Durability::Restartable => check_image_after_kill(image, format),
    }
    let raw = workplace.as_raw(image, format);
    let files = workplace.file("files");
    file_system.read_out(&raw, &expected, &files);
    assert_eq!(manifest(&files), expected);
}

#[test]
fn killed_server_loses_nothing_on_raw() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.raw", "raw", "512M");
    server_goes_and_comes(
        &image,
        &workplace,
        "raw",
        Durability::Restartable,
        Server::kill,
    );
}

#[test]
fn killed_server_loses_nothing_on_qcow2() {
    if subject() == Subject::QemuStorageDaemon {
        // It keeps tables in memory, so it cannot promise this.
        return;
    }
    let workplace = Workplace::new();
    let image = workplace.create("disk.qcow2", "qcow2", "512M");
    server_goes_and_comes(
        &image,
        &workplace,
        "qcow2",
        Durability::Restartable,
        Server::kill,
    );
}

#[test]
fn orderly_restart_loses_nothing_on_raw() {
    if subject() == Subject::QemuStorageDaemon {
        // It fails requests that arrive while it ends.
        return;
    }
    let workplace = Workplace::new();
    let image = workplace.create("disk.raw", "raw", "512M");
    server_goes_and_comes(&image, &workplace, "raw", Durability::Plain, Server::stop);
}

#[test]
fn orderly_restart_loses_nothing_on_qcow2() {
    if subject() == Subject::QemuStorageDaemon {
        // It fails requests that arrive while it ends.
        return;
    }
    let workplace = Workplace::new();
    let image = workplace.create("disk.qcow2", "qcow2", "512M");
    server_goes_and_comes(&image, &workplace, "qcow2", Durability::Plain, Server::stop);
}

/// Machines that are killed while they write, each followed by another one on the same server.
fn front_end_vanishes(image: &Path, workplace: &Workplace, format: &str) {
    let file_system = FileSystem::Ext4;
    let mut server = Server::start(workplace, image, format);
    let mut guest = Guest::builder().disk(&server).boot();
    guest.ok(&file_system.make("/dev/vda"));
    let mut expected = String::new();
    for round in 0..3 {
        guest.ok(&file_system.mount("/dev/vda", "/mnt"));
        let (_, kept) = guest
            .sh("cd /mnt/kept 2> /dev/null && find . -type f | LC_ALL=C sort | xargs sha256sum");
        assert_eq!(
            kept, expected,
            "flushed files are lost after a machine was killed"
        );
        guest.ok(&format!("
            rm -rf /mnt/a /mnt/b /mnt/c
            mkdir -p /mnt/kept
            for n in 1 2 3; do dd if=/dev/urandom of=/mnt/kept/round{round}-$n bs=4k count=$((n * 40)) 2> /dev/null; done
            sync"));
        expected = guest.ok(&manifest_command("/mnt/kept"));
        guest.ok(LOAD);
        wait_for_progress(&mut guest, &server, 6);
        guest.kill();
        guest = Guest::builder().disk(&server).boot();
    }
    guest.ok(&file_system.mount("/dev/vda", "/mnt"));
    assert_eq!(guest.ok(&manifest_command("/mnt/kept")), expected);
    guest.ok("umount /mnt");
    guest.ok(&file_system.check("/dev/vda"));
    guest.finish();
    server.stop();
    check_image(image, format);
}

#[test]
fn vanished_front_end_on_raw() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.raw", "raw", "512M");
    front_end_vanishes(&image, &workplace, "raw");
}

#[test]
fn vanished_front_end_on_qcow2() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.qcow2", "qcow2", "512M");
    front_end_vanishes(&image, &workplace, "qcow2");
}
