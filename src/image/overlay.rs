//! Temporary overlays: what is written goes to a file that nobody sees.

use block::{AsyncDiskFile, Format};

use crate::{
    image::{
        maintenance,
        maintenance::Qcow2Create,
        open::{self, OpenHow},
        secrets,
        spec::ImageSpec,
    },
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};

/// Opens a temporary overlay of the image. Its file has no name any more when this returns.
pub(crate) fn open(
    spec: &ImageSpec,
    how: &OpenHow,
    persona: Persona,
) -> Outcome<Box<dyn AsyncDiskFile>> {
    let below = OpenHow {
        read_only: true,
        ..how.clone()
    };
    let base = open::open(spec, &below, persona)?;
    let format = base.format();
    let create = Qcow2Create {
        size: base.size(),
        ..Qcow2Create::default()
    };
    base.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    // Not in /tmp, which is often memory.
    let folder = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let file = tempfile::Builder::new()
        .prefix("platter-overlay-")
        .tempfile_in(&folder)
        .map_err(|error| {
            Failure::new(format!("{}: {error}", folder.to_string_lossy()))
                .context("temporary overlay")
        })?;
    maintenance::create_qcow2(file.path(), &create)
        .map_err(|error| Failure::new(error.to_string()))?;
    let how = OpenHow {
        read_only: false,
        backing: Some(ImageSpec::plain(&spec.path, Some(format))),
        ..how.clone()
    };
    let mut overlay = ImageSpec::plain(file.path(), Some(Format::Qcow2));
    overlay.options = secrets::below(&spec.options);
    open::open(&overlay, &how, persona)
}
