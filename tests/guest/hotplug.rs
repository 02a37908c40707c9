//! Disks that come and go while the guest runs.

use crate::lab::function::{FunctionServer, ctl};
use crate::lab::{Server, Workplace, check_image};
use crate::machine::Guest;
use crate::shared::SharedGuest;

/// A script that fills a device with a pattern through the page cache, flushes, and reads it back from the disk.
fn fill_and_verify(device: &str) -> String {
    format!(
        "
        dd if=/dev/urandom of=/tmp/data bs=1M count=8 2> /dev/null
        dd if=/tmp/data of={device} bs=1M seek=3 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        dd if={device} of=/tmp/back bs=1M skip=3 count=8 2> /dev/null
        cmp /tmp/data /tmp/back
        sha256sum < /tmp/back"
    )
}

/// Two disks of two formats are plugged in, used, unplugged and plugged in again, with the same bytes on them.
#[test]
fn disks_come_and_go() {
    let workplace = Workplace::new();
    let raw = workplace.create("first.raw", "raw", "64M");
    let qcow2 = workplace.create("second.qcow2", "qcow2", "64M");
    let mut servers = [
        Server::start(&workplace, &raw, "raw"),
        Server::start(&workplace, &qcow2, "qcow2"),
    ];
    let mut guest = Guest::builder().boot();
    let sums: Vec<String> = servers
        .iter()
        .map(|server| {
            let disk = guest.plug(server);
            let sum = guest.ok(&fill_and_verify(&disk.device));
            guest.unplug(&disk);
            sum
        })
        .collect();
    for (server, sum) in servers.iter().zip(&sums) {
        let disk = guest.plug(server);
        let again = guest.ok(&format!(
            "dd if={} bs=1M skip=3 count=8 2> /dev/null | sha256sum",
            disk.device
        ));
        assert_eq!(*sum, again, "after plugging in again");
    }
    guest.finish();
    servers.iter_mut().for_each(Server::stop);
    check_image(&qcow2, "qcow2");
}

/// A disk grows under a guest that uses it, because the server was told over its control socket.
#[test]
fn a_disk_grows_while_it_is_used() {
    let workplace = Workplace::new();
    let image = workplace.create("disk.qcow2", "qcow2", "32M");
    let control = workplace.socket("ctl");
    let arguments = [
        "--num-queues",
        "2",
        "-f",
        "qcow2",
        "--control",
        control.to_str().expect("a plain path"),
        image.to_str().expect("a plain path"),
    ];
    let mut server = FunctionServer::start(&workplace, "vhost-user-blk", "blk", &arguments);
    let mut guest = SharedGuest::get(1);
    let disk = guest.plug_disk(server.socket(0));
    guest.ok(&fill_and_verify(&disk.device));
    assert_eq!(ctl(&control, &["resize", "size=48M"])["size"], 48 << 20);
    let device = &disk.device;
    guest.wait_for(&format!("[ $(blockdev --getsz {device}) = 98304 ]"));
    guest.ok(&format!(
        "dd if=/tmp/data of={device} bs=1M seek=40 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        dd if={device} bs=1M skip=40 2> /dev/null | cmp - /tmp/data
        dd if={device} bs=1M skip=3 count=8 2> /dev/null | cmp - /tmp/data"
    ));
    let counters = ctl(&control, &["counters"]);
    let queues = counters["queues"].as_array().expect("a list of queues");
    let bytes = |queue: &serde_json::Value| queue["operations"]["write"]["bytes"].as_u64();
    let written: u64 = queues.iter().filter_map(bytes).sum();
    assert_eq!(written, 16 << 20, "{counters}");
    guest.unplug(&disk);
    guest.done();
    server.stop();
    check_image(&image, "qcow2");
}
