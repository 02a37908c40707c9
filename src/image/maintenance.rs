//! What is done to qcow2 images as a whole: making, checking, snapshots.

use std::path::Path;

use block::{AsyncDiskFile, Error, Result};

use crate::image::create::Qcow2Create;

/// What `check` found and did.
#[derive(Clone, Debug, Default)]
pub(crate) struct CheckReport {
    /// Lines about single findings, in order, as QEMU words them.
    pub(crate) messages: Vec<String>,
    pub(crate) corruptions: u64,
    pub(crate) leaks: u64,
    pub(crate) check_errors: u64,
    pub(crate) corruptions_fixed: u64,
    pub(crate) leaks_fixed: u64,
    pub(crate) image_end_offset: Option<u64>,
    pub(crate) total_clusters: u64,
    pub(crate) allocated_clusters: u64,
    pub(crate) compressed_clusters: u64,
    pub(crate) fragmented_clusters: u64,
}

/// What `check` may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repair {
    None,
    Leaks,
    All,
}

/// Makes a qcow2 image.
pub(crate) fn create_qcow2(path: &Path, _create: &Qcow2Create) -> Result<()> {
    Err(not_here_yet(path))
}

/// Checks an image; `None` where the format has no checks.
pub(crate) fn check(disk: &dyn AsyncDiskFile, _repair: Repair) -> Result<Option<CheckReport>> {
    if disk.format() != block::Format::Qcow2 {
        return Ok(None);
    }
    Err(not_here_yet(disk.path()))
}

/// Makes an internal snapshot.
pub(crate) fn snapshot_create(disk: &dyn AsyncDiskFile, _name: &str) -> Result<()> {
    Err(not_here_yet(disk.path()))
}

/// Goes back to an internal snapshot.
pub(crate) fn snapshot_apply(disk: &dyn AsyncDiskFile, _name: &str) -> Result<()> {
    Err(not_here_yet(disk.path()))
}

/// Deletes an internal snapshot.
pub(crate) fn snapshot_delete(disk: &dyn AsyncDiskFile, _name: &str) -> Result<()> {
    Err(not_here_yet(disk.path()))
}

/// The disk as an internal snapshot has it; for reading.
#[expect(clippy::needless_pass_by_value, reason = "the disk becomes another")]
pub(crate) fn snapshot_view(
    disk: Box<dyn AsyncDiskFile>,
    _name: &str,
) -> Result<Box<dyn AsyncDiskFile>> {
    Err(not_here_yet(disk.path()))
}

fn not_here_yet(path: &Path) -> Error {
    Error::unsupported("not supported yet").path(path)
}
