//! The file gate: which files an image may name (backing files, data files, extents).
//!
//! An image is untrusted, and its header can name any path. The gate decides before anything is
//! opened.

use std::path::{Component, Path, PathBuf};

use crate::{
    Error, ErrorKind, Result,
    io::{FileOptions, Host, HostFile},
};

/// Which files an image may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FileGate {
    /// Regular files inside the folder of the image that names them, links included. The default.
    #[default]
    Folder,
    /// As [`Folder`](FileGate::Folder), and files inside these folders.
    Folders(Vec<PathBuf>),
    /// Any file that this process can open: only for images that are trusted.
    Everything,
    /// None: an image that names a file does not open.
    Nothing,
}

/// The path that `name`, found in the header of `image`, stands for.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) for a protocol or a driver string.
pub fn resolve_name(image: &Path, name: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let protocol = name
        .find([':', '/'])
        .filter(|at| name.as_bytes()[*at] == b':');
    if protocol.is_some() {
        return Err(Error::unsupported(format!(
            "named file {name:?}: protocols and driver strings are not followed"
        )));
    }
    let folder = image.parent().unwrap_or(Path::new(""));
    Ok(folder.join(name))
}

impl FileGate {
    /// Opens the file that the header of `image` calls `name`.
    ///
    /// # Errors
    /// [`Denied`](ErrorKind::Denied) when the gate refuses it; the host's error otherwise.
    pub(crate) fn open(
        &self,
        host: &dyn Host,
        image: &Path,
        name: &str,
        options: FileOptions,
    ) -> Result<HostFile> {
        let path = resolve_name(image, name)?;
        let folder = match image.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let more: &[PathBuf] = match self {
            FileGate::Everything => return host.open(&path, options),
            FileGate::Nothing => return Err(denied(image, &path, "no named files are allowed")),
            FileGate::Folder => &[],
            FileGate::Folders(folders) => folders,
        };
        let mut refused = None;
        for allowed in std::iter::once(folder).chain(more.iter().map(PathBuf::as_path)) {
            let Some(relative) = relative_to(host, allowed, folder, name) else {
                continue;
            };
            match host.open_beneath(allowed, &relative, options) {
                Err(error) if error.kind() == ErrorKind::Denied => refused = Some(error),
                result => return result,
            }
        }
        let error = denied(image, &path, "it lies outside the folders that are allowed");
        Err(match refused {
            Some(cause) => error.source(cause),
            None => error,
        })
    }
}

fn denied(image: &Path, path: &Path, why: &str) -> Error {
    Error::with_message(
        ErrorKind::Denied,
        format!("names the file {}: {why}", path.display()),
    )
    .path(image)
}

/// `name` as a path relative to `allowed`, if it can be one.
fn relative_to(host: &dyn Host, allowed: &Path, folder: &Path, name: &str) -> Option<PathBuf> {
    let name = Path::new(name.strip_prefix("file:").unwrap_or(name));
    if name.is_relative() && allowed == folder {
        return Some(name.to_owned());
    }
    let absolute = host.absolute(&folder.join(name))?;
    let root = host.absolute(allowed)?;
    let relative = absolute.strip_prefix(root).ok()?;
    relative
        .components()
        .all(|component| matches!(component, Component::Normal(_)))
        .then(|| relative.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_beside_the_image() {
        let image = Path::new("/images/top.qcow2");
        let resolve = |name| resolve_name(image, name).unwrap();
        assert_eq!(resolve("base.raw"), Path::new("/images/base.raw"));
        assert_eq!(resolve("file:base.raw"), Path::new("/images/base.raw"));
        assert_eq!(resolve("/else/base.raw"), Path::new("/else/base.raw"));
        assert_eq!(resolve("a/b:c"), Path::new("/images/a/b:c"));
        for name in ["json:{}", "nbd://host/x", "https://host/x", "rbd:pool/x"] {
            assert_eq!(
                resolve_name(image, name).unwrap_err().kind(),
                ErrorKind::Unsupported,
                "{name}"
            );
        }
    }
}
