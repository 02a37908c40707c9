//! Compressed clusters: decompressed on the blocking pool, once, and kept for a while.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use super::{
    Qcow2,
    header::CompressionType,
    l2::{Compressed, Entry, Geometry},
};
use crate::{
    Error, GuestRange, Result,
    codec::{self, DEFAULT_INFLATE, Inflate},
    encryption::Place,
    image::{ExtentKind, Extents},
    io::{AlignedBuf, Buffers, Io},
    serve,
    sync::{Notify, lock},
};

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
    async fn get(&self, io: &Io, file: crate::FileId, key: Compressed) -> Result<Arc<AlignedBuf>> {
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
        let len = key.len as usize;
        let (input, start) = io
            .read_padded_into(file, key.offset, len, |span| {
                io.spare.take(span.next_multiple_of(cluster_size))
            })
            .await?;
        let codec = self.codec;
        let (input, result) = io
            .run(move || {
                // The buffer of the cluster that went, if nobody reads from it any more: new ones
                // cost zeroing and page faults.
                let old = old.and_then(Arc::into_inner);
                let mut output = old.unwrap_or_else(|| AlignedBuf::zeroed(cluster_size));
                let result = codec.decompress(&input[start..start + len], &mut output);
                (input, result.map(|()| output))
            })
            .await?;
        io.spare.keep(input);
        let data = result.map_err(|error| error.offset(key.offset))?;
        let data = Arc::new(data);
        load.data = Some(Arc::clone(&data));
        Ok(data)
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
        while range.len > 0 {
            let cluster = self.geometry.cluster(range.start);
            let part = self.until(range, cluster + 1);
            match self.entry(io, cluster).await? {
                Entry::Compressed(key) => {
                    let data = self.decompressed.get(io, self.file, key).await?;
                    let start = self.geometry.in_cluster(part.start.0) as usize;
                    buffers.copy_in(at, &data[start..start + part.len as usize]);
                }
                // Written or discarded since it was looked up: what it is now is as good.
                _ => self.read_changed(io, part, buffers, at).await?,
            }
            at += part.len;
            range = range.skip(part.len);
        }
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
