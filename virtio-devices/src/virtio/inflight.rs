//! Requests in flight, remembered outside the process.

/// Records which heads are in flight where a restarted device finds them, as the split queue region
/// of vhost-user's "inflight I/O tracking" does. One tracker belongs to one queue and is called on
/// the queue's thread.
///
/// | call | step of the protocol |
/// | --- | --- |
/// | [`popped`](Self::popped) | `desc[head].counter = global++`, then `desc[head].inflight = 1` |
/// | [`publishing`](Self::publishing) | for each head: `desc[head].next = last_batch_head`, `last_batch_head = head` |
/// | (the device stores `used.idx`) | |
/// | [`published`](Self::published) | for each head: `desc[head].inflight = 0`; then `used_idx` = the index |
///
/// After a restart the region says which heads were taken and not published. The queue is then
/// made with `next_used` = the used ring's own index and `next_avail` = `next_used` + the number of
/// those heads, and they are given, in the order of their counters, to
/// [`BlkWorker::resubmit`](crate::virtio_blk::BlkWorker).
pub trait InflightTracker {
    /// `head` was taken from the available ring. Called once a head, in ring order, before the
    /// request goes anywhere.
    fn popped(&mut self, head: u16);

    /// These heads, in this order, are in the used ring, but its index does not show them yet.
    fn publishing(&mut self, heads: &mut dyn Iterator<Item = u16>);

    /// The used index now is `used_idx` and shows these heads. The guest is interrupted afterwards.
    fn published(&mut self, heads: &mut dyn Iterator<Item = u16>, used_idx: u16);
}
