//! The backing chain by name, without opening what the files hold.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use block::{AsyncDiskFile, Format};

use crate::{
    image::{
        open::{self, OpenHow},
        spec::{ImageSpec, could_not_open},
    },
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};

/// Opens the image and, one by one, what backs it; each alone.
pub(crate) fn open_all(
    spec: &ImageSpec,
    how: &OpenHow,
    persona: Persona,
) -> Outcome<Vec<Box<dyn AsyncDiskFile>>> {
    let how = OpenHow {
        no_backing: true,
        ..how.clone()
    };
    let mut seen = HashSet::new();
    let mut list: Vec<Box<dyn AsyncDiskFile>> = Vec::new();
    let mut next = Some(spec.clone());
    while let Some(spec) = next {
        if !seen.insert(spec.path.clone()) {
            let name = spec.display();
            return Err(match persona.is_qemu() {
                true => Failure::new(format!("Backing file '{name}' creates an infinite loop.")),
                false => could_not_open(&name, "Backing chain is a loop", persona),
            });
        }
        let disk = open::open(&spec, &how, persona)?;
        next = backing_of(&*disk, persona);
        list.push(disk);
    }
    Ok(list)
}

fn backing_of(disk: &dyn AsyncDiskFile, persona: Persona) -> Option<ImageSpec> {
    let info = disk.info();
    let path = resolve(disk.path(), info.backing_file.as_deref()?);
    let format = info.backing_format.as_deref().and_then(Format::from_name);
    // A format that is not recorded is raw, except where QEMU would look.
    let format = format.or((!persona.is_qemu()).then_some(Format::Raw));
    Some(ImageSpec::plain(path, format))
}

/// The path that a name in the header of `image` stands for: relative to the image's folder.
pub(crate) fn resolve(image: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let image = image.to_string_lossy();
    match image.rfind('/') {
        Some(slash) if !name.starts_with('/') => {
            PathBuf::from(format!("{}{name}", &image[..=slash]))
        }
        _ => PathBuf::from(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image() {
        for (image, name, path) in [
            ("a", "b", "b"),
            ("./a", "b", "./b"),
            ("/x/a", "./b", "/x/./b"),
            ("/x/a", "/y/b", "/y/b"),
        ] {
            assert_eq!(resolve(Path::new(image), name), Path::new(path));
        }
    }
}
