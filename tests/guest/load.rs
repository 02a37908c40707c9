//! A load that verifies: what it reads is what it wrote, whatever happens to the disk meanwhile.

use crate::machine::Guest;

/// Four processes that write, read back and compare, each its own region, until /tmp/stop is there. The page cache
/// is out of the way: what is compared was on the disk.
const START: &str = "
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

const STOP: &str = "
touch /tmp/stop
while pidof dd > /dev/null; do sleep 0.1; done
for region in 0 1 2 3; do [ \"$(cat /tmp/rounds.$region)\" -gt 0 ]; done
[ ! -s /tmp/bad ] || cat /tmp/bad
";

/// Starts the load on the first 16 MiB of a device.
#[track_caller]
pub(crate) fn start(guest: &mut Guest, device: &str) {
    guest.ok(&START.replace("DEVICE", device));
}

/// Waits until every process has got on since this was asked last.
#[track_caller]
pub(crate) fn wait_for_progress(guest: &mut Guest) {
    guest.wait_for("cat /tmp/rounds.0 /tmp/rounds.1 /tmp/rounds.2 /tmp/rounds.3");
    guest.ok("rm /tmp/rounds.*");
}

/// Ends the load, and expects that it was never deceived.
#[track_caller]
pub(crate) fn stop(guest: &mut Guest) {
    guest.wait_for("cat /tmp/rounds.0 /tmp/rounds.1 /tmp/rounds.2 /tmp/rounds.3");
    assert_eq!(guest.ok(STOP), "", "what was read is not what was written");
}
