//! The listening socket and its file.

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// A socket that listens, and the file it made. The file goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    socket: UnixListener,
    file: Option<SocketFile>,
}

/// A socket file, by path and identity: another server may have put its own there since.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listening {
    /// Listens at `path`. A socket file there that nobody listens on is replaced; one that somebody
    /// listens on, and anything that is not a socket, is an error.
    pub(crate) fn bind(path: &Path) -> Result<Self, String> {
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(|cause| cause.to_string())?;
        let meta = fs::symlink_metadata(path).map_err(|cause| cause.to_string())?;
        let file = SocketFile {
            path: path.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
        };
        let listening = Self {
            socket,
            file: Some(file),
        };
        listening
            .socket
            .set_nonblocking(true)
            .map_err(|cause| cause.to_string())?;
        Ok(listening)
    }

    /// Listens on a socket of somebody else, whose file stays theirs.
    pub(crate) fn adopt(socket: UnixListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file: None })
    }

    /// Takes a connection, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            // Nobody there any more; or no descriptor left, which may pass.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        let ours = fs::symlink_metadata(&file.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (file.device, file.inode));
        if ours && let Err(error) = fs::remove_file(&file.path) {
            tracing::warn!(path = %file.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), String> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !meta.file_type().is_socket() {
        return Err("exists and is not a socket".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another server listens there".into()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| error.to_string())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_a_stale_socket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = Listening::bind(&path).unwrap();
        assert!(first.accept().unwrap().is_none());
        let error = Listening::bind(&path).unwrap_err();
        assert!(error.ends_with("another server listens there"), "{error}");
        drop(first);
        assert!(!path.exists());

        fs::write(&path, "text").unwrap();
        let error = Listening::bind(&path).unwrap_err();
        assert!(error.ends_with("exists and is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    #[test]
    fn leaves_the_socket_of_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Listening::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Listening::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
