//! What a disk may hold: for every segment of it, the writes that may be there now, and those that
//! may be there after the power was cut.
//!
//! The disk is divided at cut points, and every request begins and ends at one; they lie at any
//! byte. Each write has a number and fills its range with bytes that follow from the number and the
//! place, so that data in the wrong place is noticed. Number 0 is zeroes.

use std::collections::BTreeMap;

/// The number of a write.
pub(crate) type Id = u32;

/// Zeroes.
pub(crate) const ZERO: Id = 0;

/// The byte that a write puts at a place.
pub(crate) fn byte(id: Id, at: u64) -> u8 {
    if id == ZERO {
        return 0;
    }
    let mut z = (u64::from(id) << 40 ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z ^= z >> 29;
    z = z.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z >> 56) as u8
}

/// The bytes that a write puts into a range.
pub(crate) fn bytes(id: Id, start: u64, len: u64) -> Vec<u8> {
    (start..start + len).map(|at| byte(id, at)).collect()
}

/// Values that one of several writes left.
type Candidates = Vec<Id>;

/// What a segment held at some moment, and how long its log was then.
#[derive(Clone, Debug)]
struct Moment {
    held: Candidates,
    log: usize,
}

#[derive(Clone, Debug)]
struct Segment {
    /// What it may hold now: requests in flight included.
    now: Candidates,
    /// Every write that was ever submitted to it, in order.
    log: Vec<Id>,
    /// Changes in flight, and whether there was more than one at a time since there was none.
    in_flight: u32,
    contended: bool,
    /// Writes of the current contention.
    epoch: Candidates,
    /// The last moment that is certainly on the disk.
    durable: Moment,
}

fn add(list: &mut Candidates, id: Id) {
    if !list.contains(&id) {
        list.push(id);
    }
}

impl Segment {
    fn new(held: Candidates) -> Self {
        Self {
            durable: Moment {
                held: held.clone(),
                log: 0,
            },
            now: held,
            log: Vec::new(),
            in_flight: 0,
            contended: false,
            epoch: Vec::new(),
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            held: self.now.clone(),
            log: self.log.len(),
        }
    }

    fn since(&self, moment: &Moment) -> Candidates {
        let mut all = moment.held.clone();
        for id in &self.log[moment.log..] {
            add(&mut all, *id);
        }
        all
    }

    fn begin(&mut self, id: Id) {
        self.contended |= self.in_flight > 0;
        self.in_flight += 1;
        self.log.push(id);
        add(&mut self.now, id);
        add(&mut self.epoch, id);
    }

    fn end(&mut self, id: Id, succeeded: bool) {
        self.in_flight -= 1;
        if succeeded {
            self.now = match self.contended {
                false => vec![id],
                // What was there before is gone: one of those that overlapped is there now.
                true => self.epoch.clone(),
            };
        }
        if self.in_flight == 0 {
            self.contended = false;
            self.epoch.clear();
        }
    }
}

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The power was cut.
    Power,
    /// The process died.
    Kill,
    /// The process died, and what had completed must be there.
    KillAfterCompletion,
}

/// A request that reads, in flight.
pub(crate) struct Reading {
    first: usize,
    end: usize,
    moments: Vec<Moment>,
}

/// A flush in flight: what it covers.
pub(crate) struct Flushing {
    moments: Vec<Moment>,
}

/// A write that is durable when it completes, in flight.
pub(crate) struct Fua {
    first: usize,
    moments: Vec<Moment>,
}

/// What a disk held at some time, and its size.
#[derive(Clone)]
pub(crate) struct Held {
    size: u64,
    segments: Vec<Candidates>,
}

impl Held {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

/// The disk as it may be.
#[derive(Clone)]
pub(crate) struct Model {
    /// Where segments begin, and the end of the last.
    points: Vec<u64>,
    index: BTreeMap<u64, usize>,
    segments: Vec<Segment>,
    /// The size of the disk; segments beyond it wait for it to grow.
    size: u64,
}

impl Model {
    /// A disk of `size` bytes that may grow up to the last cut point; `held` says what is in each
    /// segment.
    pub(crate) fn new(mut points: Vec<u64>, size: u64, held: impl Fn(u64) -> Id) -> Self {
        points.sort_unstable();
        points.dedup();
        assert!(points.contains(&size));
        let index = points.iter().enumerate().map(|(i, p)| (*p, i)).collect();
        let segments = points
            .windows(2)
            .map(|pair| Segment::new(vec![if pair[0] < size { held(pair[0]) } else { ZERO }]))
            .collect();
        Self {
            points,
            index,
            segments,
            size,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// All cut points.
    pub(crate) fn points(&self) -> &[u64] {
        &self.points
    }

    /// The segments of a range: first, and first after.
    pub(crate) fn segments_of(&self, start: u64, end: u64) -> (usize, usize) {
        self.range(start, end)
    }

    /// What the disk holds; nothing is in flight.
    pub(crate) fn held(&self) -> Held {
        Held {
            size: self.size,
            segments: self.segments.iter().map(|one| one.now.clone()).collect(),
        }
    }

    /// The disk is, durably, what it was.
    pub(crate) fn become_held(&mut self, held: &Held) {
        self.size = held.size;
        for (at, was) in held.segments.iter().enumerate() {
            let inside = self.points[at + 1] <= held.size;
            self.segments[at] = Segment::new(if inside { was.clone() } else { vec![ZERO] });
        }
    }

    /// The disk is what it was, or what it is.
    pub(crate) fn may_become_held(&mut self, held: &Held) {
        for (segment, was) in self.segments.iter_mut().zip(&held.segments) {
            for id in was {
                add(&mut segment.now, *id);
                add(&mut segment.durable.held, *id);
            }
        }
    }

    fn range(&self, start: u64, end: u64) -> (usize, usize) {
        (self.index[&start], self.index[&end])
    }

    /// Whether a change is in flight in a range.
    pub(crate) fn is_busy(&self, start: u64, end: u64) -> bool {
        let (first, last) = self.range(start, end);
        self.segments[first..last].iter().any(|s| s.in_flight > 0)
    }

    /// A change of a range starts.
    pub(crate) fn begin(&mut self, id: Id, start: u64, end: u64) {
        let (first, last) = self.range(start, end);
        for segment in &mut self.segments[first..last] {
            segment.begin(id);
        }
    }

    /// It ended. After an error it may have happened, in part too.
    pub(crate) fn end(&mut self, id: Id, start: u64, end: u64, succeeded: bool) {
        let (first, last) = self.range(start, end);
        for segment in &mut self.segments[first..last] {
            segment.end(id, succeeded);
        }
    }

    /// A write that is durable when it completes was begun.
    pub(crate) fn fua(&self, id: Id, start: u64, end: u64) -> Fua {
        let (first, last) = self.range(start, end);
        let moments = self.segments[first..last]
            .iter()
            .map(|segment| Moment {
                held: match segment.contended {
                    false => vec![id],
                    true => segment.epoch.clone(),
                },
                log: segment.log.len(),
            })
            .collect();
        Fua { first, moments }
    }

    /// It is durable.
    pub(crate) fn fua_done(&mut self, fua: Fua) {
        for (at, moment) in fua.moments.into_iter().enumerate() {
            self.settle(fua.first + at, moment);
        }
    }

    /// A flush starts.
    pub(crate) fn flush(&self) -> Flushing {
        Flushing {
            moments: self.segments.iter().map(Segment::moment).collect(),
        }
    }

    /// It succeeded.
    pub(crate) fn flushed(&mut self, flush: Flushing) {
        for (at, moment) in flush.moments.into_iter().enumerate() {
            self.settle(at, moment);
        }
    }

    fn settle(&mut self, at: usize, moment: Moment) {
        let segment = &mut self.segments[at];
        if moment.log >= segment.durable.log {
            segment.durable = moment;
        }
    }

    /// A read starts.
    pub(crate) fn read(&self, start: u64, end: u64) -> Reading {
        let (first, end) = self.range(start, end);
        Reading {
            first,
            end,
            moments: self.segments[first..end]
                .iter()
                .map(Segment::moment)
                .collect(),
        }
    }

    /// Checks what a read returned.
    pub(crate) fn check_read(&self, reading: &Reading, data: &[u8]) -> Result<(), String> {
        let base = self.points[reading.first];
        for (at, moment) in (reading.first..reading.end).zip(&reading.moments) {
            let allowed = self.segments[at].since(moment);
            self.check_segment(at, base, data, &allowed, "reads")?;
        }
        Ok(())
    }

    fn check_segment(
        &self,
        at: usize,
        base: u64,
        data: &[u8],
        allowed: &[Id],
        what: &str,
    ) -> Result<(), String> {
        let (start, end) = (self.points[at], self.points[at + 1]);
        let found = &data[(start - base) as usize..(end - base) as usize];
        for (place, value) in (start..end).zip(found) {
            if !allowed.iter().any(|id| byte(*id, place) == *value) {
                let guess = self.who_wrote(&data[(place - base) as usize..], place);
                return Err(format!(
                    "byte {place} (of segment {start}..{end}) {what} {value:#04x}{guess}; expected \
                     of writes {allowed:?}: {:#04x?}; log {:?}",
                    allowed
                        .iter()
                        .map(|id| byte(*id, place))
                        .collect::<Vec<_>>(),
                    self.segments[at].log,
                ));
            }
        }
        Ok(())
    }

    /// Which write these bytes are from, for messages.
    fn who_wrote(&self, data: &[u8], place: u64) -> String {
        let data = &data[..data.len().min(16)];
        for id in 0..100_000 {
            let same = (place..)
                .zip(data)
                .filter(|(at, value)| byte(id, *at) == **value)
                .count();
            if same == data.len() && same > 2 {
                return format!(" (of write {id})");
            }
        }
        String::new()
    }

    /// Checks a whole disk after a cut, and goes on from there.
    pub(crate) fn cut(&mut self, kind: Cut, size: u64, data: &[u8]) -> Result<(), String> {
        let mut next = Vec::with_capacity(self.segments.len());
        for at in 0..self.segments.len() {
            let segment = &self.segments[at];
            let (start, end) = (self.points[at], self.points[at + 1]);
            if end > size {
                next.push(Segment::new(vec![ZERO]));
                continue;
            }
            let durable = if end > self.size {
                vec![ZERO]
            } else {
                segment.since(&segment.durable)
            };
            let allowed = match kind {
                Cut::Power | Cut::Kill => &durable,
                Cut::KillAfterCompletion => &segment.now,
            };
            self.check_segment(at, 0, data, allowed, "is, after the cut,")?;
            let found = &data[start as usize..end as usize];
            let one = allowed
                .iter()
                .find(|id| (start..).zip(found).all(|(p, v)| byte(**id, p) == *v));
            let mut segment = Segment::new(match one {
                Some(id) => vec![*id],
                None => allowed.clone(),
            });
            if kind != Cut::Power {
                // What the dead process did not sync is still not durable.
                segment.durable.held = durable;
            }
            next.push(segment);
        }
        self.segments = next;
        self.size = size;
        Ok(())
    }

    /// The size changed, durably; what is new is zero.
    pub(crate) fn resize(&mut self, size: u64) {
        for at in 0..self.segments.len() {
            if self.points[at] >= size.min(self.size) {
                self.segments[at] = Segment::new(vec![ZERO]);
            }
        }
        self.size = size;
    }
}
