//! Compressed clusters: decompressed on the blocking pool, once, and kept for a while. Of a read of several,
//! those that it covers are decompressed for it alone, a few with one read and one job.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use smallvec::SmallVec;

use super::{
    Qcow2,
    header::CompressionType,
    l2::{Compressed, Entry, Geometry},
};
use crate::{
    Error, ErrorKind, FileId, GuestRange, Result,
    codec::{self, DEFAULT_INFLATE, Inflate},
    encryption::Place,
    image::{ExtentKind, Extents},
    io::{AlignedBuf, Buffers, Io},
    serve,
    sync::{Notify, join_all, lock},
};

/// The most bytes of clusters that are decompressed by one job.
const GROUP_BYTES: usize = 512 << 10;

/// The most bytes of clusters that the thread of the queue may decompress rather than sleep.
const SHORT_BYTES: usize = 64 << 10;

/// Groups of one request at a time.
const GROUPS_AT_A_TIME: usize = 2;

/// How the clusters of an image are compressed.
#[derive(Clone, Copy)]
pub(super) struct Codec {
    kind: CompressionType,
    inflate: &'static dyn Inflate,
}

impl Codec {
    fn decompress(&self, input: &[u8], output: &mut [u8]) -> Result<()> {
        match self.kind {
            CompressionType::Zlib => self.inflate.inflate(input, output),
            CompressionType::Zstd => codec::zstd_decompress(input, output),
        }
    }

    /// The compressed cluster; `None` when it is not smaller.
    pub(super) fn compress(&self, cluster: &[u8]) -> Option<Vec<u8>> {
        let limit = cluster.len() - 1;
        match self.kind {
            CompressionType::Zlib => codec::deflate(cluster, limit),
            CompressionType::Zstd => codec::zstd_compress(cluster, limit),
        }
    }
}

/// Decompresses a cluster into a slice.
type Fill<'a> = &'a dyn Fn(&mut [u8]) -> Result<()>;

/// What a request wants of one cluster.
struct Wanted {
    key: Compressed,
    /// Where in the cluster, and how many bytes.
    start: usize,
    len: usize,
    /// Where in the request.
    at: u64,
}

impl Wanted {
    fn copy(&self, cluster: &[u8], buffers: &Buffers) {
        buffers.copy_in(self.at, &cluster[self.start..self.start + self.len]);
    }

    /// Whether this and the next are wanted whole, and their data lies together.
    fn continues(&self, next: &Wanted, cluster_size: usize) -> bool {
        let near = self.key.offset..=self.key.end();
        self.len == cluster_size && next.len == cluster_size && near.contains(&next.key.offset)
    }
}

enum Slot {
    Loading,
    Ready { data: Arc<AlignedBuf>, used: u64 },
}

#[derive(Default)]
struct Cache {
    slots: HashMap<Compressed, Slot>,
    clock: u64,
}

/// The decompressed clusters of one image that are in memory.
pub(super) struct Decompressed {
    codec: Codec,
    cluster_size: usize,
    capacity: usize,
    cache: Mutex<Cache>,
    loaded: Notify,
}

/// Ends a load, whatever became of it.
struct Load<'a> {
    owner: &'a Decompressed,
    key: Compressed,
    data: Option<Arc<AlignedBuf>>,
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        let mut cache = lock(&self.owner.cache);
        cache.clock += 1;
        let used = cache.clock;
        match self.data.take() {
            // Forgotten meanwhile: what was read may be of no use any more.
            _ if !cache.slots.contains_key(&self.key) => {}
            Some(data) => {
                cache.slots.insert(self.key, Slot::Ready { data, used });
            }
            None => {
                cache.slots.remove(&self.key);
            }
        }
        drop(cache);
        self.owner.loaded.notify_all();
    }
}

impl Decompressed {
    pub(super) fn new(bytes: u64, geometry: Geometry, kind: CompressionType) -> Self {
        let cluster_size = geometry.cluster_size();
        Self {
            codec: Codec {
                kind,
                inflate: DEFAULT_INFLATE,
            },
            cluster_size: cluster_size as usize,
            capacity: (bytes / cluster_size).clamp(2, 1024) as usize,
            cache: Mutex::default(),
            loaded: Notify::default(),
        }
    }

    pub(super) fn codec(&self) -> Codec {
        self.codec
    }

    /// Forgets everything. Nobody is reading.
    pub(super) fn forget_all(&self) {
        lock(&self.cache).slots.clear();
    }

    /// Forgets a cluster whose place may be used again.
    pub(super) fn forget(&self, key: Compressed) {
        lock(&self.cache).slots.remove(&key);
        self.loaded.notify_all();
    }

    /// The content of a compressed cluster.
    async fn get(&self, io: &Io, file: FileId, key: Compressed) -> Result<Arc<AlignedBuf>> {
        let found = self
            .loaded
            .until(|| {
                let mut cache = lock(&self.cache);
                cache.clock += 1;
                let now = cache.clock;
                match cache.slots.get_mut(&key) {
                    Some(Slot::Ready { data, used }) => {
                        *used = now;
                        Some(Ok(Arc::clone(data)))
                    }
                    Some(Slot::Loading) => None,
                    None => {
                        let old = cache.make_room(self.capacity);
                        cache.slots.insert(key, Slot::Loading);
                        Some(Err(old))
                    }
                }
            })
            .await;
        let old = match found {
            Ok(data) => return Ok(data),
            Err(old) => old,
        };
        let mut load = Load {
            owner: self,
            key,
            data: None,
        };
        let cluster_size = self.cluster_size;
        // The buffer of the cluster that went, if nobody reads from it any more: new ones cost
        // zeroing and page faults.
        let make = move |fill: Fill<'_>| {
            let old = old.and_then(Arc::into_inner);
            let mut output = old.unwrap_or_else(|| AlignedBuf::zeroed(cluster_size));
            fill(&mut output)?;
            Ok(output)
        };
        let data = self.decompress(io, file, vec![(key, make)]).await?;
        let data = data.into_iter().next();
        let data = data.ok_or_else(|| Error::new(ErrorKind::Cancelled))?;
        let data = Arc::new(data);
        load.data = Some(Arc::clone(&data));
        Ok(data)
    }

    /// The content of a cluster, if it is in memory.
    fn ready(&self, key: Compressed) -> Option<Arc<AlignedBuf>> {
        match lock(&self.cache).slots.get(&key) {
            Some(Slot::Ready { data, .. }) => Some(Arc::clone(data)),
            _ => None,
        }
    }

    /// Decompresses clusters that lie behind each other in the file: one read, one job, which lets the
    /// caller's functions have each content where they want it.
    async fn decompress<M, T>(
        &self,
        io: &Io,
        file: FileId,
        clusters: Vec<(Compressed, M)>,
    ) -> Result<Vec<T>>
    where
        M: FnOnce(Fill<'_>) -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let keys = clusters.iter().map(|(key, _)| *key);
        let start = keys.clone().map(|key| key.offset).min().unwrap_or(0);
        let end = keys.map(Compressed::end).max().unwrap_or(0);
        let len = usize::try_from(end - start).map_err(|_| Error::new(ErrorKind::OutOfRange))?;
        let is_short = clusters.len() * self.cluster_size <= SHORT_BYTES;
        let mut batch = Batch {
            codec: self.codec,
            start,
            clusters,
        };
        let size = |span: usize| span.next_multiple_of(self.cluster_size);
        if let Some(cached) = io.cached_file(file) {
            let mut input = io.spare.take(size(len));
            let work = move || match cached.try_read(start, &mut input[..len]) {
                true => Ok(batch.run(input, 0)),
                false => Err((input, batch)),
            };
            let tried = run(io, is_short, work).await?;
            io.cached_read_went(tried.is_ok());
            match tried {
                Ok((input, result)) => {
                    io.spare.keep(input);
                    return result;
                }
                Err((input, untouched)) => {
                    io.spare.keep(input);
                    batch = untouched;
                }
            }
        }
        let take = |span| io.spare.take(size(span));
        let (input, lead) = io.read_padded_into(file, start, len, take).await?;
        let (input, result) = run(io, is_short, move || batch.run(input, lead)).await?;
        io.spare.keep(input);
        result
    }
}

/// Clusters that lie behind each other in the file, and what takes the content of each.
struct Batch<M> {
    codec: Codec,
    start: u64,
    clusters: Vec<(Compressed, M)>,
}

impl<M> Batch<M> {
    /// Decompresses them; their data begins at `lead` of `input`, which it gives back.
    fn run<T>(self, input: AlignedBuf, lead: usize) -> (AlignedBuf, Result<Vec<T>>)
    where
        M: FnOnce(Fill<'_>) -> Result<T>,
    {
        let each = self.clusters.into_iter().map(|(key, make)| {
            let at = lead + (key.offset - self.start) as usize;
            let data = &input[at..at + key.len as usize];
            make(&|output| self.codec.decompress(data, output))
                .map_err(|error| error.offset(key.offset))
        });
        let result = each.collect();
        (input, result)
    }
}

/// Runs work on the pool, or on this thread if it is short and no other is free.
async fn run<T, F>(io: &Io, is_short: bool, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    match is_short {
        true => io.run_short(work).await,
        false => io.run(work).await,
    }
}

impl Cache {
    /// Drops the clusters that were not used for longest, when there are too many; returns the last.
    fn make_room(&mut self, capacity: usize) -> Option<Arc<AlignedBuf>> {
        let mut dropped = None;
        while self.slots.len() >= capacity {
            let oldest = self
                .slots
                .iter()
                .filter_map(|(key, slot)| match slot {
                    Slot::Ready { used, .. } => Some((*used, *key)),
                    Slot::Loading => None,
                })
                .min_by_key(|(used, _)| *used);
            let Some((_, key)) = oldest else { break };
            if let Some(Slot::Ready { data, .. }) = self.slots.remove(&key) {
                dropped = Some(data);
            }
        }
        dropped
    }
}

impl Qcow2 {
    /// Reads a range of compressed clusters.
    pub(super) async fn read_compressed(
        &self,
        io: &Io,
        mut range: GuestRange,
        buffers: &Buffers,
        mut at: u64,
    ) -> Result<()> {
        let mut wanted: SmallVec<[Wanted; 1]> = SmallVec::new();
        while range.len > 0 {
            let cluster = self.geometry.cluster(range.start);
            let part = self.until(range, cluster + 1);
            match self.entry(io, cluster).await? {
                Entry::Compressed(key) => wanted.push(Wanted {
                    key,
                    start: self.geometry.in_cluster(part.start.0) as usize,
                    len: part.len as usize,
                    at,
                }),
                // Written or discarded since it was looked up: what it is now is as good.
                _ => self.read_changed(io, part, buffers, at).await?,
            }
            at += part.len;
            range = range.skip(part.len);
        }
        if let [one] = &wanted[..] {
            return self.read_kept(io, one, buffers).await;
        }
        let cluster_size = self.decompressed.cluster_size;
        let groups: Vec<_> = wanted
            .chunk_by(|one, next| one.continues(next, cluster_size))
            .flat_map(|run| run.chunks((GROUP_BYTES / cluster_size).max(1)))
            .collect();
        for some in groups.chunks(GROUPS_AT_A_TIME) {
            let reads = some.iter().map(|group| self.read_group(io, group, buffers));
            join_all(reads).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// Reads of one cluster, which is kept for the next read of it.
    async fn read_kept(&self, io: &Io, one: &Wanted, buffers: &Buffers) -> Result<()> {
        let data = self.decompressed.get(io, self.file, one.key).await?;
        one.copy(&data, buffers);
        Ok(())
    }

    /// Reads clusters whole that lie behind each other.
    async fn read_group(&self, io: &Io, group: &[Wanted], buffers: &Buffers) -> Result<()> {
        if let [one] = group {
            return self.read_kept(io, one, buffers).await;
        }
        let is_missing = |one: &&Wanted| match self.decompressed.ready(one.key) {
            Some(data) => {
                one.copy(&data, buffers);
                false
            }
            None => true,
        };
        let missing: Vec<&Wanted> = group.iter().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let clusters = missing.iter().map(|one| {
            let target = buffers.target(one.at, one.len as u64);
            (one.key, move |fill: Fill<'_>| target.fill(fill))
        });
        let clusters = clusters.collect();
        self.decompressed
            .decompress(io, self.file, clusters)
            .await?;
        Ok(())
    }

    /// Reads a part of a cluster that is not compressed any more.
    async fn read_changed(
        &self,
        io: &Io,
        mut part: GuestRange,
        buffers: &Buffers,
        mut at: u64,
    ) -> Result<()> {
        while part.len > 0 {
            let mut extents = Extents::default();
            self.map_loading(io, part, &mut extents).await?;
            for extent in extents.as_slice() {
                match extent.kind {
                    ExtentKind::Data { file, offset } => {
                        let segments = buffers.part(at, extent.len);
                        io.read_segments(file, offset.0, segments).await?;
                    }
                    ExtentKind::Encrypted {
                        depth,
                        file,
                        offset,
                    } => {
                        let place = Place {
                            file,
                            host: offset,
                            guest: part.start.0,
                        };
                        let segments = buffers.part(at, extent.len);
                        let holder = serve::image_at(self, u32::from(depth))?;
                        serve::encryption_of(holder)?
                            .read(io, place, segments)
                            .await?;
                    }
                    ExtentKind::Zero => buffers.fill_zero(at, extent.len),
                    // A cluster does not become compressed while requests are in flight, except by
                    // the same caller that would read it.
                    ExtentKind::Opaque { .. } => {
                        return Err(Error::corrupt("a cluster changed while it was read"));
                    }
                }
                at += extent.len;
                part = part.skip(extent.len);
            }
        }
        Ok(())
    }
}
