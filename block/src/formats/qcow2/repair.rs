//! What an open for writing does to an image that was not closed.

use super::{
    check::{Repair, check},
    header::{ExtensionType, Header, Incompatible},
};
use crate::{Error, FileId, Result, io::Io};

/// Repairs the reference counts of a dirty image from its tables and clears the dirty bit; does
/// nothing to a clean one. Nobody else uses the image meanwhile.
///
/// # Errors
/// [`Corrupt`](crate::ErrorKind::Corrupt) when more is wrong than can be repaired; the host's.
pub async fn repair_dirty(io: &Io, file: FileId, header: &mut Header) -> Result<()> {
    let unfinished = header.extension(ExtensionType::UNFINISHED).is_some();
    if !header.has(Incompatible::DIRTY) && !unfinished {
        return Ok(());
    }
    let mut first = None;
    let report = check(io, file, header, Repair::All, &mut |line| {
        if line.starts_with("ERROR") {
            first.get_or_insert_with(|| line.to_owned());
        }
        tracing::debug!("{line}");
    })
    .await?;
    if report.check_errors > 0 || report.corruptions > 0 {
        return Err(Error::corrupt(format!(
            "Could not repair dirty image: {} corruptions remain ({})",
            report.corruptions,
            first.as_deref().unwrap_or("check failed")
        )));
    }
    tracing::info!(
        path = report.filename,
        corruptions = report.corruptions_fixed,
        leaks = report.leaks_fixed,
        "repaired an image that was not closed"
    );
    Ok(())
}
