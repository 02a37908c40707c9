//! `convert --bitmaps`: persistent bitmaps are copied, too.

use block::{AsyncDiskFile, BitmapChange, DiskFile};

use crate::{
    grumble,
    image::bitmaps,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};

/// Makes sure, before anything is made, that the bitmaps of the only source can be copied.
pub(super) fn check_source(
    sources: &[(u64, Box<dyn AsyncDiskFile>)],
    skip_broken: bool,
    persona: Persona,
) -> Outcome<()> {
    let [(_, source)] = sources else {
        return Err(Failure::new(
            "Copying bitmaps only possible with single source",
        ));
    };
    if !bitmaps::supported(&**source) {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    // The last one first, as QEMU looks at them.
    let list = source.extras().bitmaps();
    let broken = list.iter().rev().find(|bitmap| bitmap.inconsistent);
    match broken {
        Some(bitmap) if !skip_broken => Err(Failure::new(format!(
            "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use '{} bitmap \
             --remove' to delete it",
            bitmap.name,
            persona.name()
        ))),
        _ => Ok(()),
    }
}

/// Makes sure that the target can keep bitmaps.
pub(super) fn check_target(target: &dyn DiskFile) -> Outcome<()> {
    if bitmaps::supported(target) {
        return Ok(());
    }
    let format = target.format();
    Err(Failure::new(format!(
        "Format driver '{format}' does not support bitmaps"
    )))
}

/// Copies the bitmaps that can be copied.
pub(super) fn copy(source: &dyn DiskFile, target: &dyn DiskFile, persona: Persona) -> Outcome<()> {
    let list = source.extras().bitmaps();
    for bitmap in list.iter().rev().filter(|bitmap| bitmap.inconsistent) {
        grumble!(
            "{}: warning: Skipping inconsistent bitmap '{}'",
            persona.name(),
            bitmap.name
        );
    }
    for bitmap in list.iter().filter(|bitmap| !bitmap.inconsistent) {
        let name = &bitmap.name;
        let add = BitmapChange::Add {
            granularity: Some(bitmap.granularity),
            enabled: bitmap.enabled,
        };
        let made = target.extras().change_bitmap(name, add);
        made.map_err(|error| {
            Failure::new(format!(
                "Failed to create bitmap {name}: {}",
                error.message()
            ))
        })?;
        let merged = source.extras().bitmap_bits(name).and_then(|bits| {
            target
                .extras()
                .change_bitmap(name, BitmapChange::Merge(&bits))
        });
        if let Err(error) = merged {
            // What it could not be filled with is not there at all.
            let _ = target.extras().change_bitmap(name, BitmapChange::Remove);
            return Err(Failure::new(format!(
                "Failed to populate bitmap {name}: {}",
                bitmaps::explain(&error, persona)
            )));
        }
    }
    Ok(())
}
