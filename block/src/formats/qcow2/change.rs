//! Discard and write zeroes.

use std::sync::atomic::Ordering;

use super::{
    Qcow2,
    flush::Punch,
    l2::{Entry, L2Entry, Piece, Units},
};
use crate::{
    ErrorKind, GuestOffset, GuestRange, Result,
    faults::Event,
    io::{AlignedBuf, FallocateMode, Io},
    table::{SliceChange, WritePin},
};

/// Clusters changed under one claim.
const CLUSTERS_AT_A_TIME: u64 = 512;

/// Bytes of zeroes written to a data file at a time, where its file system cannot make them.
const ZERO_PIECE: u64 = 1 << 20;

/// What units become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Becomes {
    /// Not needed any more: zero, or nothing where that reads the same; space is given back.
    Discarded,
    /// Zero, keeping host clusters that are theirs alone.
    ZeroKept,
    /// Zero, giving space back.
    ZeroUnmapped,
    /// Not part of the disk any more, or VM state that is not needed any more. Whole clusters only.
    Gone,
}

impl Becomes {
    /// Whether host space is given back.
    fn gives_back(self) -> bool {
        self != Becomes::ZeroKept
    }
}

impl Qcow2 {
    /// Forgets whole units; what they read afterwards is zero, never older data.
    pub(super) async fn discard_units(&self, io: &Io, range: GuestRange) -> Result<()> {
        self.check_writable()?;
        // Without the zero flag, an unallocated cluster would show the backing file again.
        if !self.geometry.zero_flag && self.backing.is_some() {
            return Ok(());
        }
        let (mut start, end) = self.whole_units(range);
        while start < end {
            let done = self
                .change_units(io, start, end, Becomes::Discarded)
                .await?;
            // A part of a compressed cluster stays as it is.
            let cluster = self.geometry.cluster(GuestOffset(done));
            start = self.geometry.start(cluster + 1);
        }
        Ok(())
    }

    /// The whole units of a range, as bytes: first, and first after. The last unit of the disk counts
    /// as whole up to the disk's end.
    fn whole_units(&self, range: GuestRange) -> (u64, u64) {
        let unit = self.geometry.unit();
        let start = range.start.0.next_multiple_of(unit);
        let end = if range.end() == self.size.load(Ordering::Acquire) {
            range.end().next_multiple_of(unit)
        } else {
            range.end() / unit * unit
        };
        (start, end)
    }

    /// Makes the start of a range zero through the map alone; returns the bytes done, 0 where plain
    /// zeroes must be written.
    pub(super) async fn zero_units(
        &self,
        io: &Io,
        range: GuestRange,
        may_unmap: bool,
    ) -> Result<u64> {
        self.check_writable()?;
        let (start, end) = self.whole_units(range);
        let becomes = if may_unmap {
            Becomes::ZeroUnmapped
        } else {
            Becomes::ZeroKept
        };
        if start != range.start.0 || end <= start {
            return self.zero_part(io, range, becomes).await;
        }
        // Version 2 says zero only by naming nothing, where nothing is below.
        let becomes = match (self.geometry.zero_flag, &self.backing) {
            (true, _) => becomes,
            (false, None) => Becomes::Gone,
            (false, Some(_)) => return Ok(0),
        };
        let done = self.change_units(io, start, end, becomes).await?;
        Ok(range.len.min(done - start))
    }

    /// Makes a part of a unit zero where the rest of it reads as zeroes without data of its own: then
    /// the whole unit can say so. Returns the bytes done.
    async fn zero_part(&self, io: &Io, range: GuestRange, becomes: Becomes) -> Result<u64> {
        let unit = self.geometry.unit();
        let start = range.start.0 / unit * unit;
        let whole = GuestRange::new(start, unit);
        let part = range.take(start + unit - range.start.0);
        let cluster = self.geometry.cluster(range.start);
        let entry = self.entry(io, cluster).await?;
        if !self.geometry.zero_flag {
            return Ok(if self.reads_zero(entry, whole) {
                part.len
            } else {
                0
            });
        }
        match entry.piece(whole, &self.geometry).0 {
            Piece::Zero(_) => {}
            Piece::Unallocated(_) if self.rest_below_is_zero(io, whole, part).await? => {}
            _ => return Ok(0),
        }
        let _claim = self.claims.claim(cluster, cluster + 1).await;
        let slice = self.l2_slice_for_change(io, cluster).await?;
        self.clear_raw_data(io, part, becomes).await?;
        let change = slice.change();
        let (_, now) = self.read_change(&change, cluster)?;
        let piece = now.piece(whole, &self.geometry).0;
        if !matches!(piece, Piece::Zero(_) | Piece::Unallocated(_)) {
            // A write came in between.
            return Ok(0);
        }
        let units = self.units_of(whole, cluster);
        self.change_entry(&slice, &change, cluster, units, becomes)?;
        Ok(part.len)
    }

    /// Whether the backing chain is known to read as zeroes in what `part` leaves of a unit.
    async fn rest_below_is_zero(
        &self,
        io: &Io,
        whole: GuestRange,
        part: GuestRange,
    ) -> Result<bool> {
        let Some(backing) = &self.backing else {
            return Ok(true);
        };
        for (from, to) in [(whole.start.0, part.start.0), (part.end(), whole.end())] {
            let mut range = self.in_backing(GuestRange::new(from, to - from));
            while range.len > 0 {
                // What cannot be read there is met, and told, when it is copied.
                let Ok(status) = backing.block_status(io, range).await else {
                    return Ok(false);
                };
                if !status.zero {
                    return Ok(false);
                }
                range = range.skip(status.len.clamp(1, range.len));
            }
        }
        Ok(true)
    }

    /// Unallocates every cluster: the disk shows the backing file alone. No request is in flight.
    pub(super) async fn empty_clusters(&self, io: &Io) -> Result<()> {
        self.check_writable()?;
        io.event(self.file, Event::EmptyImagePrepare).await;
        let size = self.size.load(Ordering::Acquire);
        let end = size.div_ceil(self.geometry.cluster_size());
        self.forget_clusters(io, 0, end).await?;
        self.settle(io).await
    }

    /// Forgets clusters that are not part of the disk.
    pub(super) async fn forget_clusters(&self, io: &Io, first: u64, end: u64) -> Result<()> {
        let (start, end) = (self.geometry.start(first), self.geometry.start(end));
        self.change_units(io, start, end, Becomes::Gone)
            .await
            .map(drop)
    }

    /// Changes units from `start` to `end`, which are boundaries of units; returns how far it got: a
    /// compressed cluster cannot change in part.
    pub(super) async fn change_units(
        &self,
        io: &Io,
        mut start: u64,
        end: u64,
        becomes: Becomes,
    ) -> Result<u64> {
        self.know_metadata(io).await?;
        while start < end {
            self.relieve(io).await?;
            let first = self.geometry.cluster(GuestOffset(start));
            let stop = (first + CLUSTERS_AT_A_TIME).min(self.geometry.slice_end(first));
            let run = self.until(GuestRange::new(start, end - start), stop);
            let done = self.change_run(io, run, end, becomes).await?;
            if done == start {
                break;
            }
            start = done;
        }
        Ok(start.min(end))
    }

    /// Changes units inside one slice; returns the first byte after those done. Where there is nothing
    /// to do that may be far behind the run, up to `end`.
    async fn change_run(
        &self,
        io: &Io,
        run: GuestRange,
        end: u64,
        becomes: Becomes,
    ) -> Result<u64> {
        let (first, stop) = self.geometry.touched(run);
        let _claim = self.claims.claim(first, stop).await;
        let no_table = self.l1_entry(io, first).await?.is_none();
        if no_table {
            let rest = GuestRange::new(run.start.0, end - run.start.0);
            let rest = self.until(rest, self.geometry.table_end(first));
            // Nothing there, and nothing below to hide: all of the table's range is as it should be.
            let is_so = match becomes {
                Becomes::Gone => true,
                Becomes::Discarded => self.in_backing(rest).len == 0,
                Becomes::ZeroKept | Becomes::ZeroUnmapped => false,
            };
            if is_so {
                self.clear_raw_data(io, rest, becomes).await?;
                return Ok(rest.end());
            }
        }
        let slice = self.l2_slice_for_change(io, first).await?;
        let run = self.before_partial_compressed(&slice, run)?;
        if run.len == 0 {
            return Ok(run.start.0);
        }
        self.clear_raw_data(io, run, becomes).await?;
        self.punch_in_place(io, &slice, run, becomes).await?;
        let (_, stop) = self.geometry.touched(run);
        let change = slice.change();
        for cluster in first..stop {
            let units = self.units_of(run, cluster);
            self.change_entry(&slice, &change, cluster, units, becomes)?;
        }
        Ok(run.end())
    }

    /// Changes units of one cluster.
    fn change_entry(
        &self,
        slice: &WritePin,
        change: &SliceChange<'_>,
        cluster: u64,
        units: Units,
        becomes: Becomes,
    ) -> Result<()> {
        let (raw, before) = self.read_change(change, cluster)?;
        if let Some((after, punch)) = self.changed_entry(raw, before, cluster, units, becomes) {
            if after != raw {
                self.set_l2_entry(slice, change, cluster, after);
            }
            if let Some(punch) = punch {
                self.unlink(before, punch);
            }
        }
        Ok(())
    }

    /// The part of a run before a cluster that is compressed and touched in part.
    fn before_partial_compressed(&self, slice: &WritePin, run: GuestRange) -> Result<GuestRange> {
        let (first, stop) = self.geometry.touched(run);
        for cluster in [first, stop.saturating_sub(1)] {
            if !self
                .units_of(run, cluster)
                .contain(self.disk_units(cluster))
                && matches!(self.read_entry(slice, cluster)?, Entry::Compressed(_))
            {
                let start = self.geometry.start(cluster).max(run.start.0);
                return Ok(run.take(start - run.start.0));
            }
        }
        Ok(run)
    }

    /// The units of a cluster that are part of the disk; all where none is, as with VM state.
    fn disk_units(&self, cluster: u64) -> Units {
        let start = self.geometry.start(cluster);
        match self.size.load(Ordering::Acquire).checked_sub(start) {
            None | Some(0) => self.geometry.all_units(),
            Some(rest) => self
                .geometry
                .units(0, rest.min(self.geometry.cluster_size())),
        }
    }

    /// The units of a cluster that lie in a run.
    fn units_of(&self, run: GuestRange, cluster: u64) -> Units {
        let start = self.geometry.start(cluster);
        let size = self.geometry.cluster_size();
        self.geometry.units(
            run.start.0.max(start) - start,
            run.end()
                .min(start.saturating_add(size))
                .saturating_sub(start),
        )
    }

    /// The entry that a cluster gets, and whether what it named is given up; `None` to leave it.
    fn changed_entry(
        &self,
        raw: L2Entry,
        before: Entry,
        cluster: u64,
        units: Units,
        becomes: Becomes,
    ) -> Option<(L2Entry, Option<Punch>)> {
        let geometry = &self.geometry;
        if becomes == Becomes::Gone {
            return (raw != L2Entry::default()).then_some((L2Entry::default(), Some(Punch::Yes)));
        }
        let compressed = matches!(before, Entry::Compressed(_));
        // A compressed cluster changes as a whole, also where the disk ends in it.
        let units = if compressed {
            geometry.all_units()
        } else {
            units
        };
        let (data, zero) = before.units(geometry);
        let (data, zero) = (Units(data.0 & !units.0), Units(zero.0 | units.0));
        let empty = before.host().is_none() && !compressed;
        if empty && becomes == Becomes::Discarded {
            let whole = GuestRange::new(geometry.start(cluster), geometry.cluster_size());
            // What has nothing below reads as zeroes as it is. Where zeroes were asked for the entry
            // says so, whatever the backing file is some day.
            if self.in_backing(whole).len == 0 {
                return None;
            }
        }
        let keeps = match before {
            Entry::Compressed(_) => None,
            // The rest of the cluster is still in use, shared or not.
            _ if !data.is_empty() => before.host(),
            _ if becomes == Becomes::ZeroKept || self.discard_no_unref => before.own_host(),
            _ => None,
        };
        if keeps.is_some() || empty {
            let after = if geometry.extended {
                raw.with_units(data, zero)
            } else {
                L2Entry::zero(keeps, geometry)
            };
            return Some((after, None));
        }
        // A shared zero cluster says all there is to say.
        if becomes == Becomes::ZeroKept && matches!(before, Entry::Zero { .. }) {
            return None;
        }
        let after = if geometry.extended {
            L2Entry::default().with_units(Units::NONE, zero)
        } else if geometry.zero_flag {
            L2Entry::zero(None, geometry)
        } else {
            L2Entry::default()
        };
        let punch = if becomes.gives_back() {
            Punch::Yes
        } else {
            Punch::No
        };
        Some((after, Some(punch)))
    }

    /// Zeroes reach a data file that is a raw disk by itself, before the map says so.
    async fn clear_raw_data(&self, io: &Io, run: GuestRange, becomes: Becomes) -> Result<()> {
        if !self.raw_data || becomes == Becomes::Gone {
            return Ok(());
        }
        let len = run.len.min(
            self.size
                .load(Ordering::Acquire)
                .saturating_sub(run.start.0),
        );
        if len == 0 {
            return Ok(());
        }
        let mode = if becomes.gives_back() {
            FallocateMode::PunchHole
        } else {
            FallocateMode::ZeroRange
        };
        match io.fallocate(self.data_file, mode, run.start.0, len).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            result => return result,
        }
        let mut at = run.start.0;
        let end = at + len;
        while at < end {
            let step = (end - at).min(ZERO_PIECE);
            let zeroes = AlignedBuf::zeroed(step as usize);
            io.write(self.data_file, at, zeroes).await?;
            at += step;
        }
        Ok(())
    }

    /// Gives the space of host clusters back that stay where they are: those of a data file, and all
    /// where references are kept. Nobody else can be given them, so it happens at once, and before the
    /// map says zero: a write after that must find its cluster untouched.
    async fn punch_in_place(
        &self,
        io: &Io,
        slice: &WritePin,
        run: GuestRange,
        becomes: Becomes,
    ) -> Result<()> {
        let stays = self.geometry.data_file || self.discard_no_unref;
        let passed = becomes.gives_back() && self.pass_discards.request;
        if !stays || self.raw_data || !passed {
            return Ok(());
        }
        let (first, stop) = self.geometry.touched(run);
        let mut hole: Option<(u64, u64)> = None;
        for cluster in first..=stop {
            let whole = cluster < stop
                && self
                    .units_of(run, cluster)
                    .contain(self.geometry.all_units());
            let host = if whole {
                self.read_entry(slice, cluster)?.own_host()
            } else {
                None
            };
            let size = self.geometry.cluster_size();
            hole = match (hole, host) {
                (Some((start, len)), Some(host)) if start + len == host => {
                    Some((start, len + size))
                }
                (before, host) => {
                    if let Some((start, len)) = before {
                        let mode = FallocateMode::PunchHole;
                        let punched = io.fallocate(self.data_file, mode, start, len).await;
                        if let Err(error) = punched {
                            // The map says zero all the same.
                            tracing::debug!(%error, "no space given back");
                        }
                    }
                    host.map(|host| (host, size))
                }
            };
        }
        Ok(())
    }
}
