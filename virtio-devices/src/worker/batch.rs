//! Requests of a worker on their way to its disks.

use block::io::{AsyncIo, MemoryRegions, Request, RequestOp};

/// Marks the ids of watched descriptors, which are no requests.
pub(super) const WATCH: u64 = 1 << 63;

/// The data plane of one disk, and what is on its way there.
pub(super) struct Plane {
    pub(super) io: Box<dyn AsyncIo>,
    /// No other data plane of the worker ever has the same.
    pub(super) number: u64,
    pub(super) requests: Vec<Request>,
    pub(super) in_flight: usize,
    /// How many requests may wait to be submitted before the front end stops taking more.
    room: usize,
    /// No more requests come: it goes when the last has ended.
    detached: bool,
}

impl Plane {
    fn new(io: Box<dyn AsyncIo>, number: u64) -> Self {
        Self {
            io,
            number,
            requests: Vec::new(),
            in_flight: 0,
            room: 0,
            detached: false,
        }
    }

    fn make_room(&mut self) {
        self.room = self.io.capacity().max(1).saturating_sub(self.in_flight);
    }
}

/// Requests on their way to the disks. A front end of one disk knows only plane 0.
#[derive(Default)]
pub struct Batch {
    pub(super) planes: Vec<Option<Plane>>,
    /// Data planes attached so far.
    attached: u64,
}

impl Batch {
    /// How many more requests the data plane has room for. A front end takes a new guest request
    /// only while this is not 0; the block requests of one guest request may exceed it, the rest
    /// is submitted after the next completion.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room_of(0)
    }

    /// [`room`](Self::room) of one data plane.
    #[must_use]
    pub fn room_of(&self, plane: usize) -> usize {
        match self.planes.get(plane) {
            Some(Some(plane)) => plane.room.saturating_sub(plane.requests.len()),
            _ => 0,
        }
    }

    /// Whether every data plane has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.planes
            .iter()
            .flatten()
            .all(|plane| plane.requests.len() < plane.room)
    }

    /// Adds a request. `id` comes back in [`FrontEnd::complete`](super::FrontEnd::complete); its top bit must be clear.
    pub fn push(&mut self, id: u64, op: RequestOp) {
        let pushed = self.push_to(0, id, op);
        debug_assert!(pushed, "a worker of one disk has plane 0");
    }

    /// Adds a request for one data plane; returns whether there is such a plane.
    #[inline]
    pub fn push_to(&mut self, plane: usize, id: u64, op: RequestOp) -> bool {
        debug_assert_eq!(id & WATCH, 0, "the top bit of an id is the worker's");
        let Some(Some(plane)) = self.planes.get_mut(plane) else {
            return false;
        };
        plane.requests.push(Request { id, op });
        true
    }

    /// Takes the requests named `id` back if all `count` of them still wait to be submitted; returns
    /// whether they did. Otherwise nothing changes.
    pub fn take_back(&mut self, id: u64, count: usize) -> bool {
        let requests = self.planes.iter().flatten().flat_map(|it| &it.requests);
        if requests.filter(|request| request.id == id).count() != count {
            return false;
        }
        for plane in self.planes.iter_mut().flatten() {
            plane.requests.retain(|request| request.id != id);
        }
        true
    }

    /// Adds the data plane of one more disk; returns its number.
    pub fn attach(&mut self, io: Box<dyn AsyncIo>) -> usize {
        self.attached += 1;
        let mut plane = Plane::new(io, self.attached);
        plane.make_room();
        match self.planes.iter().position(Option::is_none) {
            Some(free) => {
                self.planes[free] = Some(plane);
                free
            }
            None => {
                self.planes.push(Some(plane));
                self.planes.len() - 1
            }
        }
    }

    /// Gives a data plane back once its requests have ended. No more may be pushed to it.
    pub fn detach(&mut self, plane: usize) {
        if let Some(Some(plane)) = self.planes.get_mut(plane) {
            plane.detached = true;
        }
        self.drop_detached();
    }

    /// The number of requests not yet submitted.
    #[must_use]
    pub fn len(&self) -> usize {
        let planes = self.planes.iter().flatten();
        planes.map(|plane| plane.requests.len()).sum()
    }

    /// Whether there is nothing to submit.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn in_flight(&self) -> usize {
        let planes = self.planes.iter().flatten();
        planes.map(|plane| plane.in_flight).sum()
    }

    pub(super) fn make_room(&mut self) {
        for plane in self.planes.iter_mut().flatten() {
            plane.make_room();
        }
    }

    /// Submits what is there; what does not fit stays for the next time.
    pub(super) fn submit(&mut self) -> usize {
        let mut submitted = 0;
        for plane in self.planes.iter_mut().flatten() {
            if !plane.requests.is_empty() {
                let taken = plane.io.submit(&mut plane.requests);
                plane.in_flight += taken;
                submitted += taken;
            }
        }
        submitted
    }

    /// The data planes of a thread share what is registered.
    pub(super) fn register_memory(&mut self, memory: MemoryRegions) {
        if let Some(plane) = self.planes.iter_mut().flatten().next() {
            plane.io.register_memory(memory);
        }
    }

    pub(super) fn drop_detached(&mut self) {
        for place in &mut self.planes {
            if place
                .as_ref()
                .is_some_and(|it| it.detached && it.in_flight == 0 && it.requests.is_empty())
            {
                *place = None;
            }
        }
    }
}
