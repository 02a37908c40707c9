//! Snapshots, VM state and bitmaps of an opened image.

use std::sync::{Arc, atomic::Ordering};

use super::{
    Qcow2,
    snapshot::{SnapshotTable, ops::Editor},
};
use crate::{
    DirtyBits, Error, Result,
    extras::{BitmapChange, BitmapInfo, ImageExtras, NewSnapshot},
    hooks::Hook,
    io::Io,
    sync::{LocalFuture, lock},
};

impl Qcow2 {
    /// Changes the snapshots. The disk is drained; what is in memory follows the file afterwards.
    async fn edit<T>(
        &self,
        io: &Io,
        work: impl AsyncFnOnce(&mut Editor<'_>) -> Result<T>,
    ) -> Result<T> {
        self.check_writable()?;
        self.refcounts.end_packing();
        self.settle(io).await?;
        let mut header = lock(&self.header).clone();
        let editor = Editor::new(io, self.file, &mut header, &self.refcounts);
        let mut editor = editor.punching(self.pass_discards.snapshot);
        let result = work(&mut editor).await;
        if editor.is_torn() {
            self.marks.set_torn();
        }
        // Also after an error: tables on the disk may have changed, if only in their flags.
        self.slices.retire(0, u64::MAX);
        self.overlap.forget();
        self.decompressed.forget_all();
        self.l1.set(header.l1_table_offset, header.l1_size);
        self.refcounts.l1_moved(
            header.l1_table_offset >> header.cluster_bits,
            (u64::from(header.l1_size) * 8).div_ceil(header.cluster_size()),
        );
        self.size.store(header.size, Ordering::Release);
        *lock(&self.header) = header.clone();
        let table = SnapshotTable::read(io, self.file, &header).await?;
        *lock(&self.snapshots) = table;
        result
    }

    async fn take_snapshot(&self, io: &Io, new: &NewSnapshot) -> Result<String> {
        let id = self
            .edit(io, async |editor| editor.create(new).await)
            .await?;
        if new.vm_state_size > 0 {
            // The snapshot has it; here it would only cost copies.
            self.drop_vm_state(io).await?;
            self.settle(io).await?;
        }
        Ok(id)
    }

    async fn go_back(&self, io: &Io, id_or_name: &str) -> Result<()> {
        if !self.bitmaps.is_empty() {
            return Err(Error::invalid_argument("Device has active dirty bitmaps"));
        }
        self.edit(io, async |editor| editor.apply(id_or_name).await)
            .await
    }
}

impl ImageExtras for Qcow2 {
    fn create_snapshot<'a>(
        &'a self,
        io: &'a Io,
        new: &'a NewSnapshot,
    ) -> LocalFuture<'a, Result<String>> {
        Box::pin(self.take_snapshot(io, new))
    }

    fn apply_snapshot<'a>(
        &'a self,
        io: &'a Io,
        id_or_name: &'a str,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.go_back(io, id_or_name))
    }

    fn delete_snapshot<'a>(
        &'a self,
        io: &'a Io,
        id_or_name: &'a str,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.edit(io, async move |editor: &mut Editor<'_>| {
            editor.delete(id_or_name).await
        }))
    }

    fn read_vm_state<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        buf: &'a mut [u8],
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.vm_state(io, offset, buf))
    }

    fn write_vm_state<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        data: &'a [u8],
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.set_vm_state(io, offset, data))
    }

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.bitmaps.infos()
    }

    fn bitmap_bits<'a>(&'a self, io: &'a Io, name: &'a str) -> LocalFuture<'a, Result<DirtyBits>> {
        Box::pin(self.bits_of(io, name))
    }

    fn change_bitmap<'a>(
        &'a self,
        io: &'a Io,
        name: &'a str,
        change: BitmapChange<'a>,
    ) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.alter_bitmap(io, name, change))
    }

    fn recorder(&self) -> Arc<dyn Hook> {
        self.bitmaps.recorder()
    }
}
