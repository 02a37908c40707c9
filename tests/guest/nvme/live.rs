//! What happens to a controller while the guest uses it: namespaces that come, grow and go, and a reset button.

use crate::function::Kind;
use crate::lab::function::ctl;
use crate::lab::{Workplace, check_image};
use crate::load;
use crate::machine::Guest;
use crate::shared::SharedGuest;

use super::Controller;

#[test]
fn nvme_namespaces_come_grow_and_go() {
    let workplace = Workplace::new();
    let first = workplace.create("first", "qcow2", "32M");
    let second = workplace.create("second", "raw", "32M");
    let (mut server, control) = Kind::Nvme.serve_controlled(&workplace, &first, "qcow2");
    let mut guest = SharedGuest::get(1);
    let controller = Controller::plug(&mut guest, server.socket(0));
    let device = controller.namespace(&mut guest, 1);
    load::start(&mut guest, &device);

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
    load::stop(&mut guest);

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
    check_image(&first, "qcow2");
}

/// A controller that is there when the guest starts survives a hard reset, and so does what a flush covered.
#[test]
fn nvme_survives_a_reset_of_the_machine() {
    let workplace = Workplace::new();
    let image = workplace.create("disk", "qcow2", "128M");
    let mut server = Kind::Nvme.serve(&workplace, &image, "qcow2");
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
