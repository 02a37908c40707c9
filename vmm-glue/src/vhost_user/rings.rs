//! What the front end says about rings, and how they start and stop.

use std::{fs::File, sync::Arc};

use vhost::vhost_user::message::{VhostUserVringAddr, VhostUserVringState};
use virtio_devices::{virtio::InflightTracker, virtio_blk::feature};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Error,
    inflight::InflightArea,
    memory::{MemoryTable, VhostUserMemory},
    message::Message,
};
use crate::{
    queue_thread::{QueueHandle, QueueSetup, Stop},
    sys,
};

/// What the front end said about one ring.
#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<VhostUserVringAddr>,
    next_avail: u16,
    kick: Option<File>,
    enabled: bool,
    running: bool,
}

/// The rings of a connection, with what a ring needs to start.
pub(super) struct Rings<'a> {
    queues: &'a mut [QueueHandle<Arc<VhostUserMemory>>],
    vrings: Vec<Vring>,
    /// The most entries of a ring.
    max_size: u16,
    memory: MemoryTable,
    inflight: Option<InflightArea>,
    event_idx: bool,
}

impl<'a> Rings<'a> {
    /// Rings that nothing is known about.
    pub(super) fn new(queues: &'a mut [QueueHandle<Arc<VhostUserMemory>>], max_size: u16) -> Self {
        Self {
            vrings: queues.iter().map(|_| Vring::default()).collect(),
            queues,
            max_size,
            memory: MemoryTable::default(),
            inflight: None,
            event_idx: false,
        }
    }

    /// The number of rings.
    pub(super) fn len(&self) -> usize {
        self.vrings.len()
    }

    /// Whether a ring runs.
    pub(super) fn is_running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.running)
    }

    /// Takes the driver's features.
    pub(super) fn set_features(&mut self, features: u64) {
        self.event_idx = features & feature::EVENT_IDX != 0;
    }

    /// Takes the area that tells of requests in flight.
    pub(super) fn set_inflight(&mut self, area: InflightArea) {
        self.inflight = Some(area);
    }

    /// Every ring runs as soon as it can.
    pub(super) fn enable_all(&mut self) {
        for vring in &mut self.vrings {
            vring.enabled = true;
        }
    }

    /// Stops every ring.
    pub(super) fn stop_all(&mut self) {
        for index in 0..self.vrings.len() {
            self.stop(index, Stop::Drain);
        }
    }

    /// Stops every ring without an answer to the driver, and forgets what was said about it.
    pub(super) fn reset(&mut self, enabled: bool) {
        for index in 0..self.vrings.len() {
            self.stop(index, Stop::Reset);
            self.vrings[index] = Vring {
                enabled,
                ..Vring::default()
            };
        }
    }

    /// Changes the memory table, with the queues drained meanwhile.
    pub(super) fn change_memory(
        &mut self,
        message: &Message,
        change: impl FnOnce(&mut MemoryTable) -> Result<(), String>,
    ) -> Result<(), Error> {
        let running: Vec<usize> = (0..self.vrings.len())
            .filter(|index| self.stop(*index, Stop::Drain))
            .collect();
        let changed = change(&mut self.memory);
        let mut result = changed.map_err(|text| message.bad(text));
        for index in running {
            let started = self.start(index).map_err(|text| message.bad(text));
            result = result.and(started);
        }
        result
    }

    /// The ring that a message is about.
    fn vring(&mut self, message: &Message, index: u32) -> Result<&mut Vring, Error> {
        let count = self.vrings.len();
        usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or_else(|| message.bad(format!("names ring {index} of {count}")))
    }

    pub(super) fn set_num(&mut self, message: &Message) -> Result<(), Error> {
        let VhostUserVringState { index, num } = message.payload()?;
        let max = self.max_size;
        let vring = self.vring(message, index)?;
        let size = u16::try_from(num).unwrap_or(0);
        if size == 0 || size > max || !size.is_power_of_two() {
            return Err(message.bad(format!("asks for {num} entries, {max} are the most")));
        }
        if vring.running && vring.size != size {
            return Err(message.bad(format!("changes the size of running ring {index}")));
        }
        vring.size = size;
        Ok(())
    }

    pub(super) fn set_addr(&mut self, message: &Message) -> Result<(), Error> {
        let addresses: VhostUserVringAddr = message.payload()?;
        let index = addresses.index;
        let vring = self.vring(message, index)?;
        if vring.running && vring.addresses.is_some_and(|old| !same(&old, &addresses)) {
            return Err(message.bad(format!("moves running ring {index}")));
        }
        vring.addresses = Some(addresses);
        Ok(())
    }

    pub(super) fn set_base(&mut self, message: &Message) -> Result<(), Error> {
        let VhostUserVringState { index, num } = message.payload()?;
        let vring = self.vring(message, index)?;
        if vring.running {
            return Err(message.bad(format!("moves the index of running ring {index}")));
        }
        vring.next_avail =
            u16::try_from(num).map_err(|_| message.bad(format!("sets index {num}")))?;
        Ok(())
    }

    /// Stops the ring, which starts again with the next kick descriptor; returns where it stands.
    pub(super) fn get_base(&mut self, message: &Message) -> Result<VhostUserVringState, Error> {
        let VhostUserVringState { index, .. } = message.payload()?;
        self.vring(message, index)?;
        self.stop(index as usize, Stop::Drain);
        let vring = self.vring(message, index)?;
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.next_avail)))
    }

    /// The ring and the descriptor of a message about a ring's descriptor.
    pub(super) fn file_of(&self, message: &mut Message) -> Result<(usize, Option<File>), Error> {
        let value: u64 = message.payload()?;
        let index = (value & 0xff) as usize;
        if index >= self.vrings.len() {
            return Err(message.bad(format!("names ring {index} of {}", self.vrings.len())));
        }
        let file = if value & 0x100 == 0 {
            let file = message.file()?;
            // A descriptor that blocks would let the front end hold our thread.
            sys::set_nonblocking(&file)?;
            Some(file)
        } else {
            None
        };
        Ok((index, file))
    }

    pub(super) fn set_kick(&mut self, message: &mut Message) -> Result<(), Error> {
        let (index, file) = self.file_of(message)?;
        if file.is_none() {
            return Err(message.bad("has no descriptor, and rings are not polled"));
        }
        self.stop(index, Stop::Drain);
        self.vrings[index].kick = file;
        self.start(index).map_err(|text| message.bad(text))?;
        Ok(())
    }

    pub(super) fn set_enable(&mut self, message: &Message) -> Result<(), Error> {
        let VhostUserVringState { index, num } = message.payload()?;
        let vring = self.vring(message, index)?;
        match num {
            0 => {
                vring.enabled = false;
                self.stop(index as usize, Stop::Drain);
            }
            1 => {
                vring.enabled = true;
                self.start(index as usize)
                    .map_err(|text| message.bad(text))?;
            }
            _ => return Err(message.bad(format!("enables with {num}"))),
        }
        Ok(())
    }

    /// Starts a ring that has a kick descriptor and is enabled, unless it runs.
    fn start(&mut self, index: usize) -> Result<(), String> {
        let (vring, queue) = (&mut self.vrings[index], &mut self.queues[index]);
        let Some(kick) = vring
            .kick
            .as_ref()
            .filter(|_| vring.enabled && !vring.running)
        else {
            return Ok(());
        };
        let Some(addresses) = vring.addresses.filter(|_| vring.size != 0) else {
            return Err(format!("ring {index} has no size or no addresses"));
        };
        let kick = kick
            .try_clone()
            .map_err(|error| format!("ring {index}: {error}"))?;
        let size = u64::from(vring.size);
        let guest = |what: &str, user: u64, len: u64| {
            self.memory
                .guest_address(user, len)
                .ok_or_else(|| format!("ring {index}: {what} at {user:#x} is not in memory"))
        };
        let descriptors = guest("descriptor table", addresses.descriptor, 16 * size)?;
        let available = guest("available ring", addresses.available, 6 + 2 * size)?;
        let used = guest("used ring", addresses.used, 6 + 8 * size)?;

        let memory = self.memory.guest_memory();
        let used_idx: u16 = memory
            .read_obj(GuestAddress(used.0 + 2))
            .map(u16::from_le)
            .map_err(|error| format!("ring {index}: {error}"))?;
        let mut next_avail = vring.next_avail;
        let mut resubmit = None;
        let mut tracker = None;
        if let Some(area) = &self.inflight
            && let Some(mut region) = area.queue(index as u16, vring.size)
        {
            let recovered = region.recover(used_idx, next_avail, vring.size)?;
            (next_avail, resubmit) = (recovered.next_avail, recovered.heads);
            tracker = Some(Box::new(region) as Box<dyn InflightTracker + Send>);
        }

        let wrong = |error: virtio_queue::Error| format!("ring {index}: {error}");
        let mut ring = Queue::new(vring.size).map_err(wrong)?;
        ring.set_size(vring.size);
        ring.try_set_desc_table_address(descriptors)
            .map_err(wrong)?;
        ring.try_set_avail_ring_address(available).map_err(wrong)?;
        ring.try_set_used_ring_address(used).map_err(wrong)?;
        ring.set_next_avail(next_avail);
        ring.set_next_used(used_idx);
        ring.set_event_idx(self.event_idx);
        ring.set_ready(true);
        queue.start(QueueSetup {
            memory,
            queue: ring,
            kick,
            tracker,
            resubmit,
        })?;
        vring.running = true;
        Ok(())
    }

    /// Stops a ring; whether it was running.
    fn stop(&mut self, index: usize, how: Stop) -> bool {
        let vring = &mut self.vrings[index];
        if !vring.running {
            return false;
        }
        vring.running = false;
        if let Some(next_avail) = self.queues[index].stop(how) {
            vring.next_avail = next_avail;
        }
        true
    }
}

/// Whether two messages put a ring in the same place.
fn same(one: &VhostUserVringAddr, other: &VhostUserVringAddr) -> bool {
    let key = |addresses: &VhostUserVringAddr| {
        (addresses.descriptor, addresses.available, addresses.used)
    };
    key(one) == key(other)
}
