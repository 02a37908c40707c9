//! nvme-cli: the commands of administration and of the NVM command set, with their outcomes.

use crate::lab::Workplace;
use crate::lab::function::FunctionServer;
use crate::machine::Guest;
use crate::shared::SharedGuest;

use super::Controller;

/// A conversation: commands, and what each must print. A pattern that begins with `!` is of a command that must fail.
type Steps = &'static [(&'static str, &'static str)];

/// Runs every command with `$c` as the controller, `$s` as its short name and `$n` as the namespace.
#[track_caller]
fn converse(guest: &mut Guest, controller: &Controller, namespace: &str, steps: Steps) {
    for (command, expected) in steps {
        let script = format!(
            "s={} c=/dev/{} n={namespace}\nrm -f /tmp/r\n{command}",
            controller.name, controller.name
        );
        let (code, output) = guest.sh(&script);
        let (fails, expected) = match expected.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, *expected),
        };
        assert_eq!(
            code != 0,
            fails,
            "{command}: ended with {code} and printed:\n{output}"
        );
        assert!(
            output.contains(expected),
            "{command}: expected '{expected}', got:\n{output}"
        );
    }
}

const DATA: Steps = &[
    ("nvme list", "Platter NVMe"),
    ("nvme id-ctrl $c", "subnqn    : nqn.2014-08.org.nvmexpress"),
    ("nvme id-ctrl $c | grep -E '^(vwc|fuses) '", "0x7"),
    ("nvme id-ns $n", "nsze    : 0x20000\n"),
    ("nvme id-ns $n -H | grep 'in use'", "Data Size: 512 bytes"),
    ("nvme ns-descs $n", "uuid"),
    ("nvme list-ns $c", "0x1"),
    ("nvme fw-log $c", "frs1"),
    (
        "nvme supported-log-pages $c",
        "Commands Supported and Effects",
    ),
    ("nvme effects-log $c -c 0", "[Format NVM"),
    ("nvme fid-support-effects-log $c", "FID 81"),
    ("nvme get-feature $c -f 6 -H", "(WCE): Enabled"),
    ("nvme set-feature $c -f 6 --value=0", "Volatile Write Cache"),
    ("nvme get-feature $c -f 6 -H", "(WCE): Disabled"),
    ("nvme set-feature $c -f 6 --value=1", ""),
    ("nvme get-feature $c -f 7", "0x000f000f"),
    (
        "nvme set-feature $c -f 7 --value=0x10001",
        "!Command Sequence Error",
    ),
    ("nvme set-feature $c -f 4 --value=0x150", ""),
    ("nvme get-feature $c -f 4", "0x00000150"),
    (
        "nvme set-feature $c -f 6 --value=0 --save",
        "!Feature Identifier Not Saveable",
    ),
    ("nvme get-feature $c -f 0x7f", "!Invalid Field"),
    ("nvme flush $n", "success"),
    (
        "dd if=/dev/urandom of=/tmp/w bs=4k count=4 2> /dev/null; nvme write $n -s 8 -c 31 -z 16384 -d /tmp/w",
        "Success",
    ),
    (
        "nvme read $n -s 8 -c 31 -z 16384 -d /tmp/r && cmp /tmp/w /tmp/r",
        "Success",
    ),
    ("nvme compare $n -s 8 -c 31 -z 16384 -d /tmp/w", "Success"),
    (
        "nvme copy $n --sdlba=1000 --blocks=15,15 --slbs=24,8",
        "success",
    ),
    (
        "nvme read $n -s 1000 -c 31 -z 16384 -d /tmp/r && (tail -c 8192 /tmp/w; head -c 8192 /tmp/w) | cmp - /tmp/r",
        "Success",
    ),
    ("nvme verify $n -s 8 -c 31", "Success"),
    ("nvme write-zeroes $n -s 8 -c 7", "Success"),
    (
        "nvme compare $n -s 8 -c 31 -z 16384 -d /tmp/w",
        "!Compare Failure",
    ),
    (
        "nvme read $n -s 8 -c 7 -z 4096 -d /tmp/r && head -c 4096 /dev/zero | cmp - /tmp/r",
        "Success",
    ),
    ("nvme dsm $n -d -s 1000,1016 -b 8,8", "success"),
    (
        "nvme read $n -s 1000 -c 7 -z 4096 -d /tmp/r && head -c 4096 /dev/zero | cmp - /tmp/r",
        "Success",
    ),
    (
        "nvme read $n -s 1008 -c 7 -z 4096 -d /tmp/r && tail -c 4096 /tmp/w | cmp - /tmp/r",
        "Success",
    ),
    ("nvme write-uncor $n -s 200 -c 1", "Success"),
    ("nvme read $n -s 201 -c 0 -z 512", "!Unrecovered Read Error"),
    ("nvme verify $n -s 200 -c 1", "!Unrecovered Read Error"),
    ("nvme error-log $c -e 3 | grep lba", "0xc9"),
    (
        "head -c 1024 /dev/zero | nvme write $n -s 200 -c 1 -z 1024",
        "Success",
    ),
    ("nvme read $n -s 201 -c 0 -z 512 -d /tmp/r", "Success"),
    ("nvme read $n -s 0x20000 -c 0 -z 512", "!LBA Out of Range"),
    ("nvme smart-log $c", "num_err_log_entries"),
    (
        "nvme io-passthru $n --opcode=0x7f --namespace-id=1",
        "!Invalid Command Opcode",
    ),
    (
        "nvme admin-passthru $c --opcode=0x10",
        "!Invalid Command Opcode",
    ),
];

const FORMAT: Steps = &[
    ("nvme format $n -l 1 -f", "Success"),
    ("blockdev --getss $n", "4096"),
    ("blockdev --getsz $n", "131072"),
    ("nvme id-ns $n -H | grep 'in use'", "Data Size: 4096 bytes"),
    (
        "head -c 4096 /tmp/w > /tmp/b; nvme write $n -s 16383 -c 0 -z 4096 -d /tmp/b",
        "Success",
    ),
    ("nvme compare $n -s 16383 -c 0 -z 4096 -d /tmp/b", "Success"),
    ("nvme read $n -s 16384 -c 0 -z 4096", "!LBA Out of Range"),
    ("nvme format $n -l 5 -f", "!Invalid Format"),
    ("nvme format $n -l 0 -f", "Success"),
    ("blockdev --getss $n", "512"),
    (
        "nvme read $n -s 131064 -c 7 -z 4096 -d /tmp/r && head -c 4096 /dev/zero | cmp - /tmp/r",
        "Success",
    ),
];

/// Every command that works on data, and a change of the size of a block, which a sidecar remembers.
#[test]
fn nvme_cli_uses_and_formats_a_namespace() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "64M");
    let namespace = format!(
        "{},format=qcow2,sidecar={}",
        image.display(),
        workplace.file("disk.nvme").display()
    );
    let arguments = ["--namespace", &namespace];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    converse(&mut guest, &controller, &device, DATA);
    converse(&mut guest, &controller, &device, FORMAT);
    guest.ok("dmesg -c > /dev/null"); // the errors above were asked for
    controller.remove(&mut guest);
    guest.done();
    server.stop();
}

const MANAGE: Steps = &[
    ("nvme id-ctrl $c | grep -E '^tnvmcap'", "134217728"),
    (
        "nvme create-ns $c -s 131072 -c 131072 -f 0 -m 1",
        "created nsid:2",
    ),
    ("nvme id-ctrl $c | grep -E '^unvmcap'", "67108864"),
    (
        "nvme create-ns $c -s 131073 -c 131073 -f 0 -m 1",
        "!Namespace Insufficient Capacity",
    ),
    ("nvme list-ns $c -a", "0x2"),
    ("nvme id-ns $c -n 2 | grep nsze", ": 0"),
    (
        "nvme attach-ns $c -n 2 -c $(cat /sys/class/nvme/$s/cntlid)",
        "Success",
    ),
    (
        "nvme attach-ns $c -n 2 -c $(cat /sys/class/nvme/$s/cntlid)",
        "!Namespace Already Attached",
    ),
];

const UNMANAGE: Steps = &[
    (
        "nvme detach-ns $c -n 2 -c $(cat /sys/class/nvme/$s/cntlid)",
        "Success",
    ),
    ("nvme delete-ns $c -n 2", "Success"),
    ("nvme delete-ns $c -n 2", "!Invalid Field"),
    ("nvme id-ctrl $c | grep -E '^unvmcap'", "134217728"),
    // What the command line gave may be detached, not deleted.
    ("nvme delete-ns $c -n 1", "!Invalid Field"),
    (
        "nvme detach-ns $c -n 1 -c $(cat /sys/class/nvme/$s/cntlid)",
        "Success",
    ),
];

const SECURE_ERASE: Steps = &[("nvme format $n -s 1 -f", "Success")];
const SANITIZE: Steps = &[("nvme sanitize $c -a 2", "")];

/// A raw image with a sidecar is erased by Format NVM and by Sanitize.
#[test]
fn nvme_cli_erases_a_namespace() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "32M");
    let namespace = format!(
        "{},format=raw,sidecar={}",
        image.display(),
        workplace.file("disk.nvme").display()
    );
    let arguments = ["--namespace", &namespace];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    for erase in [SECURE_ERASE, SANITIZE] {
        guest.ok(&format!(
            "dd if=/dev/urandom of={device} bs=1M seek=8 count=4 conv=fsync 2> /dev/null"
        ));
        converse(&mut guest, &controller, &device, erase);
        if erase == SANITIZE {
            guest.wait_for(&format!(
                "nvme get-log /dev/{} -i 0x81 -l 512 -b > /tmp/log
                [ $(od -An -tu1 -j2 -N1 /tmp/log) = 1 ]",
                controller.name
            ));
        }
        guest.ok(&format!(
            "blockdev --flushbufs {device}
            dd if={device} bs=1M iflag=direct 2> /dev/null > /tmp/all
            dd if=/dev/zero bs=1M count=32 2> /dev/null | cmp - /tmp/all && rm /tmp/all"
        ));
    }
    controller.remove(&mut guest);
    guest.done();
    server.stop();
}

/// Namespaces are made in a pool, attached, used, detached and deleted.
#[test]
fn nvme_cli_manages_namespaces() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "16M");
    let folder = workplace.file("pool");
    std::fs::create_dir(&folder).expect("a folder for the pool");
    let namespace = format!("{},format=raw", image.display());
    let pool = format!("{},capacity=128M", folder.display());
    let arguments = ["--namespace", &namespace, "--pool", &pool];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    converse(&mut guest, &controller, &device, MANAGE);
    // The event alone makes the guest look.
    let made = controller.namespace(&mut guest, 2);
    guest.ok(&format!(
        "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
        dd if=/tmp/w of={made} bs=1M seek=60 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        dd if={made} bs=1M skip=60 2> /dev/null | cmp - /tmp/w"
    ));
    assert_eq!(images(&folder), 1);
    converse(&mut guest, &controller, &device, UNMANAGE);
    guest.wait_for(&format!("[ ! -e {device} ] && [ ! -e {made} ]"));
    assert_eq!(
        images(&folder),
        0,
        "the image of a deleted namespace is gone"
    );
    controller.remove(&mut guest);
    guest.done();
    server.stop();
}

fn images(folder: &std::path::Path) -> usize {
    let files = std::fs::read_dir(folder).expect("the pool");
    files
        .filter_map(|file| file.expect("a file").metadata().ok())
        .filter(|data| data.len() >= 64 << 20)
        .count()
}

const FIRST_HOLDS: Steps = &[
    (
        "nvme resv-register $n --nrkey=0xabc --rrega=0",
        "!Command Sequence Error",
    ),
    (
        "printf AAAAAAAABBBBBBBB > /tmp/id; nvme set-feature $c -f 0x81 --value=1 -l 16 -d /tmp/id",
        "Host Identifier",
    ),
    ("nvme resv-register $n --nrkey=0xabc --rrega=0", "success"),
    (
        "nvme resv-acquire $n --crkey=0xabc --rtype=1 --racqa=0",
        "success",
    ),
    (
        "nvme resv-report $n -e",
        "hostid     : 41414141414141414242424242424242",
    ),
    (
        "head -c 512 /dev/zero | nvme write $n -s 0 -c 0 -z 512",
        "Success",
    ),
];

const SECOND_IS_KEPT_OUT: Steps = &[
    (
        "head -c 512 /dev/zero | nvme write $n -s 0 -c 0 -z 512",
        "!Reservation Conflict",
    ),
    ("nvme read $n -s 0 -c 0 -z 512 -d /tmp/r", "Success"),
    (
        "printf CCCCCCCCDDDDDDDD > /tmp/id; nvme set-feature $c -f 0x81 --value=1 -l 16 -d /tmp/id",
        "Host Identifier",
    ),
    (
        "nvme resv-acquire $n --crkey=0xdef --rtype=1 --racqa=0",
        "!Reservation Conflict",
    ),
    ("nvme resv-register $n --nrkey=0xdef --rrega=0", "success"),
    (
        "nvme resv-acquire $n --crkey=0xdef --rtype=1 --racqa=0",
        "!Reservation Conflict",
    ),
    ("nvme resv-report $n -e", "regctl    : 2"),
    // It takes over, as the survivor of a cluster does.
    (
        "nvme resv-acquire $n --crkey=0xdef --prkey=0xabc --rtype=1 --racqa=1",
        "success",
    ),
    (
        "head -c 512 /dev/zero | nvme write $n -s 0 -c 0 -z 512",
        "Success",
    ),
];

const FIRST_IS_OUT: Steps = &[
    (
        "head -c 512 /dev/zero | nvme write $n -s 0 -c 0 -z 512",
        "!Reservation Conflict",
    ),
    // A notice: of a registration that was preempted, in namespace 1.
    (
        "nvme get-log $c -i 0x80 -l 64 | grep ^0000",
        "01 00 00 00 00 00 00 00 01",
    ),
    (
        "nvme resv-release $n --crkey=0xabc --rtype=1 --rrela=0",
        "!Reservation Conflict",
    ),
];

const SECOND_LETS_GO: Steps = &[
    (
        "nvme resv-release $n --crkey=0xdef --rtype=1 --rrela=0",
        "success",
    ),
    ("nvme resv-register $n --crkey=0xdef --rrega=1", "success"),
    ("nvme resv-report $n", "regctl    : 0"),
];

/// Two guests, each with a controller of its own, share a namespace, and a reservation keeps them apart.
#[test]
fn nvme_reservations_keep_two_guests_apart() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "16M");
    let namespace = format!("{},format=raw", image.display());
    let arguments = ["--namespace", &namespace];
    let mut server = FunctionServer::start_many(&workplace, "nvme", "nvme", 2, &arguments);
    let mut first = SharedGuest::get(1);
    let mut second = Guest::builder().boot();
    let one = Controller::plug(&mut first, server.socket(0));
    let two = Controller::plug(&mut second, server.socket(1));
    let disk_one = one.namespace(&mut first, 1);
    let disk_two = two.namespace(&mut second, 1);
    converse(&mut first, &one, &disk_one, FIRST_HOLDS);
    converse(&mut second, &two, &disk_two, SECOND_IS_KEPT_OUT);
    converse(&mut first, &one, &disk_one, FIRST_IS_OUT);
    converse(&mut second, &two, &disk_two, SECOND_LETS_GO);
    first.ok("head -c 512 /dev/zero > /tmp/z");
    first.ok(&format!(
        "dd if=/tmp/z of={disk_one} conv=fsync 2> /dev/null"
    ));
    first.ok("dmesg -c > /dev/null"); // conflicts were asked for
    one.remove(&mut first);
    two.remove(&mut second);
    first.done();
    second.kill();
    server.stop();
}
