//! Opening, changing and storing bitmaps.

use std::sync::{Arc, atomic::Ordering};

use super::{
    Bitmap, Bitmaps,
    directory::{
        BitmapEntry, GRANULARITY_BITS, MAX_DATA_SIZE, MAX_NAME_SIZE, directory_bytes,
        directory_len, read_bitmaps, table_size_for,
    },
    table::{Place, Stored},
};
use crate::{
    DirtyBits, Error, ErrorKind, FileId, Result,
    extras::BitmapChange,
    formats::qcow2::{
        Qcow2,
        header::{
            Autoclear, BitmapsExtension, ExtensionType, Header, MAX_BITMAP_DIRECTORY_SIZE,
            MAX_BITMAPS,
        },
        read_only,
    },
    io::{AlignedBuf, Io},
    sync::lock,
};

/// Most bytes of memory that the bits of all bitmaps of an image take when they are read: 1 GiB.
const MAX_MEMORY: u64 = 1 << 30;

impl Bitmaps {
    /// Reads the list of an image. One that is opened for reading opens even if it is damaged.
    pub(in crate::formats::qcow2) async fn read(
        io: &Io,
        file: FileId,
        header: &Header,
        writable: bool,
    ) -> Result<Self> {
        match read_bitmaps(io, file, header).await {
            Ok(list) => Ok(Self::new(list, header.size)),
            Err(error) if !writable && error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(path = %io.file_path(file).display(), %error, "bitmaps cannot be used");
                Ok(Self::damaged(error.message()))
            }
            Err(error) => Err(error),
        }
    }

    /// Marks all that are up to date as in use, durably: before the image changes in any other way.
    pub(in crate::formats::qcow2) async fn mark_in_use(
        &self,
        io: &Io,
        file: FileId,
        header: &Header,
    ) -> Result<()> {
        let marked = |one: &Arc<Bitmap>| {
            one.listed_as(true)
                .is_none_or(|e| e.flags == one.entry.flags)
        };
        if self.recorder.all().iter().all(marked) {
            return Ok(());
        }
        self.write_flags(io, file, header, true).await
    }

    /// Writes the directory where it is: only flags differ from what is there, so that it is a good
    /// one however much of it gets written.
    async fn write_flags(
        &self,
        io: &Io,
        file: FileId,
        header: &Header,
        in_use: bool,
    ) -> Result<()> {
        let list = self.recorder.all();
        let Some(extension) = header.bitmaps().filter(|_| !list.is_empty()) else {
            return Ok(());
        };
        let entries: Vec<_> = list
            .iter()
            .filter_map(|one| one.listed_as(in_use))
            .collect();
        let bytes = directory_bytes(&entries);
        if bytes.len() as u64 != extension.bitmap_directory_size {
            return Err(Error::corrupt(format!(
                "bitmap_directory_size: {}, expected {}",
                extension.bitmap_directory_size,
                bytes.len()
            )));
        }
        let bytes = AlignedBuf::from_slice(&bytes);
        io.write(file, extension.bitmap_directory_offset, bytes)
            .await?;
        io.sync(file).await
    }
}

impl Qcow2 {
    fn bitmap_place<'a>(&self, io: &'a Io) -> Place<'a> {
        Place {
            io,
            file: self.file,
            geometry: self.geometry,
        }
    }

    /// Reads the stored bits of a bitmap, unless that was done.
    async fn read_bitmap(&self, io: &Io, bitmap: &Bitmap) -> Result<()> {
        bitmap.check_usable()?;
        let (stored, mut bits) = {
            let state = lock(&bitmap.state);
            match state.stored.filter(|_| state.unread) {
                Some(stored) => (stored, state.bits.clone()),
                None => return Ok(()),
            }
        };
        let name = bitmap.entry.name_text();
        self.bitmap_place(io)
            .read_bits(&name, stored, &mut bits)
            .await?;
        let others: u64 = self
            .bitmaps
            .recorder
            .all()
            .iter()
            .map(|other| lock(&other.state).bits.memory())
            .sum();
        if others.saturating_add(bits.memory()) > MAX_MEMORY {
            return Err(Error::unsupported(format!(
                "Bitmap '{name}': the bitmaps take {} bytes of memory, expected at most {MAX_MEMORY}",
                others.saturating_add(bits.memory())
            )));
        }
        let mut state = lock(&bitmap.state);
        state.bits = bits;
        state.unread = false;
        Ok(())
    }

    /// The bits of a bitmap.
    pub(in crate::formats::qcow2) async fn bits_of(
        &self,
        io: &Io,
        name: &str,
    ) -> Result<DirtyBits> {
        let bitmap = self.bitmaps.find(name)?;
        self.read_bitmap(io, &bitmap).await?;
        Ok(lock(&bitmap.state).bits.clone())
    }

    /// Changes a bitmap.
    pub(in crate::formats::qcow2) async fn alter_bitmap(
        &self,
        io: &Io,
        name: &str,
        change: BitmapChange<'_>,
    ) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        self.bitmaps.check_damage()?;
        match change {
            BitmapChange::Add {
                granularity,
                enabled,
            } => return self.add_bitmap(name, granularity, enabled),
            BitmapChange::Remove => return self.remove_bitmap(io, name).await,
            _ => {}
        }
        let bitmap = self.bitmaps.find(name)?;
        bitmap.check_usable()?;
        match change {
            BitmapChange::Clear => {
                let mut state = lock(&bitmap.state);
                state.bits.clear();
                state.unread = false;
                state.changed = true;
            }
            BitmapChange::Enable => lock(&bitmap.state).enabled = true,
            BitmapChange::Disable => lock(&bitmap.state).enabled = false,
            BitmapChange::Merge(bits) => {
                let size = lock(&bitmap.state).bits.size();
                if bits.size() != size {
                    return Err(Error::invalid_argument(format!(
                        "Bitmaps are of different sizes (destination size is {size}, source size is \
                         {}) and can't be merged",
                        bits.size()
                    )));
                }
                let mut state = lock(&bitmap.state);
                state.bits.merge(bits);
                state.changed = true;
            }
            BitmapChange::Add { .. } | BitmapChange::Remove => {}
        }
        Ok(())
    }

    fn add_bitmap(&self, name: &str, granularity: Option<u64>, enabled: bool) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let granularity = granularity.unwrap_or(cluster_size.clamp(4096, 65536));
        if name.is_empty() {
            return Err(Error::invalid_argument("Bitmap name cannot be empty"));
        }
        if !granularity.is_power_of_two() || granularity < 512 {
            return Err(Error::invalid_argument(
                "Granularity must be power of 2 and at least 512",
            ));
        }
        let list = self.bitmaps.recorder.all();
        if list.iter().any(|one| one.entry.name == name.as_bytes()) {
            return Err(Error::invalid_argument(format!(
                "Bitmap already exists: {name}"
            )));
        }
        let size = crate::image::Image::size(self);
        let bits = granularity.trailing_zeros() as u8;
        let refuse = |why: String| {
            Err(Error::invalid_argument(format!(
                "Can't make bitmap '{name}' persistent: {why}"
            )))
        };
        if lock(&self.header).version < 3 {
            return refuse("Cannot store dirty bitmaps in qcow2 v2 files".into())
                .map_err(|error| error.field("version", 2, "3"));
        }
        if !GRANULARITY_BITS.contains(&bits) {
            return refuse(format!(
                "Granularity exceeds maximum ({} bytes)",
                1u64 << GRANULARITY_BITS.end()
            ));
        }
        if table_size_for(size, bits, cluster_size).saturating_mul(cluster_size) > MAX_DATA_SIZE {
            return refuse(
                "Too much space will be occupied by the bitmap. Use larger granularity".into(),
            );
        }
        if name.len() > MAX_NAME_SIZE {
            return refuse(format!(
                "Name length exceeds maximum ({MAX_NAME_SIZE} characters)"
            ));
        }
        if list.len() >= MAX_BITMAPS as usize {
            return refuse("Maximum number of persistent bitmaps is already reached".into());
        }
        let bitmap = Bitmap::new(name, bits, enabled, size);
        let mut entries: Vec<_> = list.iter().map(|one| one.entry.clone()).collect();
        entries.push(bitmap.entry.clone());
        if directory_len(&entries) > MAX_BITMAP_DIRECTORY_SIZE {
            return refuse("Not enough space in the bitmap directory".into());
        }
        self.bitmaps
            .recorder
            .change(|list| list.push(Arc::new(bitmap)));
        self.bitmaps.list_changed();
        Ok(())
    }

    /// Removes a bitmap, in the image at once.
    async fn remove_bitmap(&self, io: &Io, name: &str) -> Result<()> {
        let bitmap = self.bitmaps.find(name)?;
        let before = self.bitmaps.recorder.all();
        self.bitmaps
            .recorder
            .change(|list| list.retain(|other| !Arc::ptr_eq(other, &bitmap)));
        let Some(stored) = lock(&bitmap.state).stored else {
            return Ok(());
        };
        self.settle(io).await?;
        if let Err(error) = self.write_directory(io, true).await {
            self.bitmaps.recorder.change(|list| *list = before);
            return Err(error);
        }
        self.free_bitmap(io, name, stored).await;
        self.write_counts_now(io).await
    }

    /// Gives a bitmap's clusters back; what cannot be read is left to a check.
    async fn free_bitmap(&self, io: &Io, name: &str, stored: Stored) {
        let freed = self
            .bitmap_place(io)
            .free(&self.refcounts, name, stored)
            .await;
        if let Err(error) = freed {
            tracing::warn!(%error, "clusters of a bitmap stay allocated: a check will find them");
        }
    }

    async fn write_counts_now(&self, io: &Io) -> Result<()> {
        self.write_refcounts(io).await?;
        io.sync(self.file).await
    }

    /// Writes the directory to a new place and makes the header name it; the old place is given back.
    /// Everything it names is in the file.
    async fn write_directory(&self, io: &Io, in_use: bool) -> Result<()> {
        let entries: Vec<BitmapEntry> = self
            .bitmaps
            .recorder
            .all()
            .iter()
            .filter_map(|one| one.listed_as(in_use))
            .collect();
        let mut taken = Vec::new();
        let result = self.switch_directory(io, &entries, &mut taken).await;
        let old = match result {
            Ok(old) => old,
            Err(error) => {
                for (first, count) in taken {
                    self.refcounts.release(io, first, count).await?;
                }
                return Err(error);
            }
        };
        if let Some(old) = old {
            let first = old.bitmap_directory_offset >> self.geometry.cluster_bits;
            let clusters = old
                .bitmap_directory_size
                .div_ceil(self.geometry.cluster_size());
            self.refcounts.release(io, first, clusters).await?;
        }
        Ok(())
    }

    async fn switch_directory(
        &self,
        io: &Io,
        entries: &[BitmapEntry],
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<Option<BitmapsExtension>> {
        let mut extension = None;
        if !entries.is_empty() {
            let bytes = directory_bytes(entries);
            let offset = self
                .bitmap_place(io)
                .write_clusters(&self.refcounts, &bytes, taken)
                .await?;
            extension = Some(BitmapsExtension {
                nb_bitmaps: entries.len() as u32,
                bitmap_directory_size: bytes.len() as u64,
                bitmap_directory_offset: offset,
            });
        }
        self.write_counts_now(io).await?;
        let before = lock(&self.header).clone();
        let consistent = before.autoclear_features.contains(Autoclear::BITMAPS);
        let old = before.bitmaps().filter(|_| consistent);
        if let Err(error) = self.name_directory(io, &before, extension).await {
            // It may be there all the same: then what it names must stay.
            if before.write(io, self.file).await.is_err() {
                taken.clear();
            }
            return Err(error);
        }
        Ok(old)
    }

    /// Makes the header name another directory. While its extension is being written, which need
    /// not lie in one sector, nobody trusts it.
    async fn name_directory(
        &self,
        io: &Io,
        before: &Header,
        extension: Option<BitmapsExtension>,
    ) -> Result<()> {
        let mut header = before.clone();
        if header.autoclear_features.contains(Autoclear::BITMAPS) {
            header.autoclear_features.remove(Autoclear::BITMAPS);
            header.write_features(io, self.file).await?;
        }
        header.set_extension(
            ExtensionType::BITMAPS,
            extension.map(BitmapsExtension::to_bytes),
        );
        header.write(io, self.file).await?;
        if extension.is_some() {
            header.autoclear_features.insert(Autoclear::BITMAPS);
            header.write_features(io, self.file).await?;
        }
        *lock(&self.header) = header;
        Ok(())
    }

    /// Stores what changed and marks everything as up to date. The disk is drained and everything
    /// else is durable.
    pub(in crate::formats::qcow2) async fn store_bitmaps(&self, io: &Io) -> Result<()> {
        let list = self.bitmaps.recorder.all();
        let mut replaced = Vec::new();
        let mut failed = None;
        let mut stored_any = self.bitmaps.list_changed.load(Ordering::Acquire);
        for bitmap in &list {
            if bitmap.check_usable().is_err() || !lock(&bitmap.state).changed {
                continue;
            }
            match self.store_bitmap(io, bitmap).await {
                Ok(old) => {
                    stored_any = true;
                    replaced.extend(old.map(|old| (bitmap.entry.name_text(), old)));
                }
                // It stays marked as in use.
                Err(error) => failed = Some(error),
            }
        }
        if stored_any {
            self.write_directory(io, false).await?;
            for (name, old) in replaced {
                self.free_bitmap(io, &name, old).await;
            }
            self.write_counts_now(io).await?;
            self.bitmaps.list_changed.store(false, Ordering::Release);
        } else {
            let header = lock(&self.header).clone();
            self.bitmaps
                .write_flags(io, self.file, &header, false)
                .await?;
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Writes a bitmap to new clusters; returns where it was.
    async fn store_bitmap(&self, io: &Io, bitmap: &Bitmap) -> Result<Option<Stored>> {
        self.read_bitmap(io, bitmap).await?;
        let bits = std::mem::replace(&mut lock(&bitmap.state).bits, DirtyBits::new(0, 9));
        let written = self
            .bitmap_place(io)
            .write_bits(&self.refcounts, &bits)
            .await;
        let mut state = lock(&bitmap.state);
        let new = match written {
            Ok(new) => new,
            Err(error) => {
                state.bits = bits;
                return Err(error);
            }
        };
        // What is stored is all there is now; the memory can be used again.
        state.bits = DirtyBits::new(bits.size(), u32::from(bitmap.entry.granularity_bits));
        state.unread = true;
        state.changed = false;
        Ok(state.stored.replace(new))
    }

    /// Reads all bitmaps and checks that they can be those of a disk of `size` bytes, before the disk
    /// gets that size.
    pub(in crate::formats::qcow2) async fn prepare_bitmaps_for(
        &self,
        io: &Io,
        size: u64,
    ) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        for bitmap in self.bitmaps.recorder.all() {
            self.read_bitmap(io, &bitmap).await?;
            let bits = bitmap.entry.granularity_bits;
            if table_size_for(size, bits, cluster_size).saturating_mul(cluster_size) > MAX_DATA_SIZE
            {
                return Err(Error::invalid_argument(format!(
                    "size: {size}, expected one for which bitmap '{}' takes at most {MAX_DATA_SIZE} \
                     bytes",
                    bitmap.entry.name_text()
                )));
            }
        }
        Ok(())
    }

    /// The disk has another size now.
    pub(in crate::formats::qcow2) fn resize_bitmaps(&self, size: u64) {
        for bitmap in self.bitmaps.recorder.all() {
            let mut state = lock(&bitmap.state);
            state.bits.resize(size);
            state.changed = true;
        }
    }
}
