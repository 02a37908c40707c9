//! What happens to a controller while the guest uses it: resets, unbinding, namespaces that come, grow and go.

use crate::lab::Workplace;
use crate::lab::function::{FunctionServer, ctl};
use crate::shared::SharedGuest;

use super::{Controller, serve};

/// Four processes that write, read back and compare, each its own region, until /tmp/stop is there. The page cache
/// is out of the way: what is compared was on the disk.
const START_LOAD: &str = "
rm -f /tmp/stop /tmp/bad /tmp/rounds.*
for region in 0 1 2 3; do
    (
        round=0
        while [ ! -e /tmp/stop ]; do
            dd if=/dev/urandom of=/tmp/w.$region bs=64k count=8 2> /dev/null
            dd if=/tmp/w.$region of=DEVICE bs=64k seek=$((region * 64 + round % 56)) oflag=direct conv=notrunc 2> /tmp/e.$region &&
                dd if=DEVICE of=/tmp/r.$region bs=64k skip=$((region * 64 + round % 56)) count=8 iflag=direct 2> /tmp/e.$region &&
                cmp /tmp/w.$region /tmp/r.$region || cat /tmp/e.$region >> /tmp/bad
            round=$((round + 1))
            echo $round > /tmp/rounds.$region
        done
    ) &
done > /dev/null 2>&1
";

const STOP_LOAD: &str = "
touch /tmp/stop
wait
while pidof dd > /dev/null; do sleep 0.1; done
for region in 0 1 2 3; do [ \"$(cat /tmp/rounds.$region)\" -gt 0 ]; done
[ ! -s /tmp/bad ] || cat /tmp/bad
";

#[test]
fn nvme_resets_under_load_lose_nothing() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "64M");
    let mut server = serve(&workplace, &image, "qcow2");
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    guest.ok(&START_LOAD.replace("DEVICE", &device));
    for round in 1..=5 {
        // Every writer gets on between two resets.
        guest.wait_for("cat /tmp/rounds.0 /tmp/rounds.1 /tmp/rounds.2 /tmp/rounds.3");
        guest.ok("rm /tmp/rounds.*");
        let name = &controller.name;
        guest.ok(&format!(
            "echo 1 > /sys/class/nvme/{name}/reset_controller; [ $(cat /sys/class/nvme/{name}/state) = live ] || exit {round}"
        ));
    }
    guest.wait_for("cat /tmp/rounds.0 /tmp/rounds.1 /tmp/rounds.2 /tmp/rounds.3");
    let bad = guest.ok(STOP_LOAD);
    assert_eq!(bad, "", "what was read is not what was written");
    controller.remove(&mut guest);
    guest.done();
    server.stop();
    crate::lab::check_image(&image, "qcow2");
}

#[test]
fn nvme_driver_lets_go_and_takes_again() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "raw", "64M");
    let mut server = serve(&workplace, &image, "raw");
    let mut guest = SharedGuest::get(1);
    let mut controller = Controller::plug(&mut guest, server.socket(0));
    for round in 0..3 {
        let device = controller.namespace(&mut guest, 1);
        guest.ok(&format!(
            "dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
            dd if=/tmp/w of={device} bs=1M seek={} conv=fsync 2> /dev/null
            echo {pci} > /sys/bus/pci/drivers/nvme/unbind
            [ ! -e {device} ]
            echo {pci} > /sys/bus/pci/drivers/nvme/bind",
            round * 4,
            pci = controller.pci,
        ));
        controller = Controller::find(&mut guest, controller.pci);
        let device = controller.namespace(&mut guest, 1);
        guest.ok(&format!(
            "dd if={device} bs=1M skip={} count=4 2> /dev/null | cmp - /tmp/w",
            round * 4
        ));
    }
    controller.remove(&mut guest);
    guest.done();
    server.stop();
}

#[test]
fn nvme_namespaces_come_grow_and_go() {
    let workplace = Workplace::new();
    let first = workplace.create("first", "qcow2", "32M");
    let second = workplace.create("second", "raw", "32M");
    let control = workplace.socket("ctl");
    let namespace = format!("{},format=qcow2", first.display());
    let arguments = [
        "--namespace",
        &namespace,
        "--control",
        control.to_str().expect("a plain path"),
    ];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    guest.ok(&START_LOAD.replace("DEVICE", &device));

    // Another one, used, taken away and given again.
    let add = format!("namespace={},format=raw,lba=4096", second.display());
    assert_eq!(ctl(&control, &["add-namespace", &add])["nsid"], 2);
    let other = controller.namespace(&mut guest, 2);
    guest.ok(&format!(
        "[ $(blockdev --getss {other}) = 4096 ]
        dd if=/dev/urandom of=/tmp/w bs=1M count=4 2> /dev/null
        dd if=/tmp/w of={other} bs=1M seek=28 conv=fsync 2> /dev/null"
    ));
    ctl(&control, &["remove-namespace", "nsid=2"]);
    guest.wait_for(&format!("[ ! -e {other} ]"));
    assert_eq!(ctl(&control, &["add-namespace", &add])["nsid"], 2);
    let other = controller.namespace(&mut guest, 2);
    guest.ok(&format!(
        "dd if={other} bs=1M skip=28 2> /dev/null | cmp - /tmp/w"
    ));

    // Both grow while one of them is written.
    assert_eq!(
        ctl(&control, &["resize", "nsid=1", "size=48M"])["size"],
        48 << 20
    );
    assert_eq!(
        ctl(&control, &["resize", "nsid=2", "size=40M"])["size"],
        40 << 20
    );
    guest.wait_for(&format!("[ $(blockdev --getsz {device}) = 98304 ]"));
    guest.wait_for(&format!("[ $(blockdev --getsz {other}) = 81920 ]"));
    guest.ok(&format!(
        "dd if=/tmp/w of={device} bs=1M seek=44 conv=fsync 2> /dev/null
        dd if=/tmp/w of={other} bs=1M seek=36 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        dd if={device} bs=1M skip=44 2> /dev/null | cmp - /tmp/w
        dd if={other} bs=1M skip=36 2> /dev/null | cmp - /tmp/w"
    ));
    assert_eq!(
        guest.ok(STOP_LOAD),
        "",
        "what was read is not what was written"
    );

    let counters = ctl(&control, &["counters"]);
    let written: u64 = counters["controllers"][0]["workers"]
        .as_array()
        .expect("a list of workers")
        .iter()
        .filter_map(|worker| worker["operations"]["write"]["bytes"].as_u64())
        .sum();
    assert!(written > 16 << 20, "{counters}");
    let status = ctl(&control, &["status"]);
    assert_eq!(status["namespaces"][1]["block-size"], 4096, "{status}");

    controller.remove(&mut guest);
    guest.done();
    server.stop();
    crate::lab::check_image(&first, "qcow2");
}
