//! Snapshots, VM state and bitmaps of an opened disk.

use crate::{
    Disk, DiskFile, Error, ErrorKind, Result,
    dirty::DirtyBits,
    extras::{
        BitmapChange, BitmapInfo, DiskExtras, ImageExtras, NewSnapshot, SnapshotInfo, keeps_none,
    },
    io::Io,
};

impl Disk {
    fn image_extras(&self, what: &str) -> Result<&dyn ImageExtras> {
        let image = &self.shared.served.image;
        image
            .extras()
            .ok_or_else(|| keeps_none(image.format(), what).path(self.path()))
    }

    /// Runs a section that reads, or one that changes the image, on the drained disk.
    fn on_extras<T>(
        &self,
        (what, operation): (&str, &'static str),
        changes: bool,
        work: impl AsyncFnOnce(&dyn ImageExtras, &Io) -> Result<T>,
    ) -> Result<T> {
        let extras = self.image_extras(what)?;
        if changes && self.shared.served.policy.read_only {
            return Err(Error::new(ErrorKind::ReadOnly)
                .operation(operation)
                .path(self.path()));
        }
        self.with_drained(async |io| work(extras, io).await)
            .map_err(|error| error.operation(operation).path(self.path()))
    }
}

impl DiskExtras for Disk {
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.info().snapshots
    }

    fn create_snapshot(&self, new: &NewSnapshot) -> Result<String> {
        self.on_extras(
            ("internal snapshots", "create snapshot"),
            true,
            async |extras, io| extras.create_snapshot(io, new).await,
        )
    }

    fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        let before = self.size();
        self.on_extras(
            ("internal snapshots", "apply snapshot"),
            true,
            async |extras, io| extras.apply_snapshot(io, id_or_name).await,
        )?;
        if self.size() != before {
            self.shared.resized(self.size());
        }
        Ok(())
    }

    fn delete_snapshot(&self, id_or_name: &str) -> Result<()> {
        self.on_extras(
            ("internal snapshots", "delete snapshot"),
            true,
            async |extras, io| extras.delete_snapshot(io, id_or_name).await,
        )
    }

    fn read_vm_state(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.on_extras(("VM state", "read VM state"), false, async |extras, io| {
            extras.read_vm_state(io, offset, buf).await
        })
    }

    fn write_vm_state(&self, data: &[u8], offset: u64) -> Result<()> {
        self.on_extras(("VM state", "write VM state"), true, async |extras, io| {
            extras.write_vm_state(io, offset, data).await
        })
    }

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        let extras = self.shared.served.image.extras();
        extras.map(ImageExtras::bitmaps).unwrap_or_default()
    }

    fn bitmap_bits(&self, name: &str) -> Result<DirtyBits> {
        self.on_extras(("bitmaps", "read bitmap"), false, async |extras, io| {
            extras.bitmap_bits(io, name).await
        })
    }

    fn change_bitmap(&self, name: &str, change: BitmapChange<'_>) -> Result<()> {
        let hooks = &self.shared.served.hooks;
        self.on_extras(("bitmaps", "change bitmap"), true, async |extras, io| {
            extras.change_bitmap(io, name, change).await?;
            // Until there is a bitmap, requests need not look for any.
            hooks.attach_once(extras.recorder());
            Ok(())
        })
    }
}
