//! A control socket: one line in, one line out.
//!
//! What the lines mean is the embedder's matter. Whoever may connect may do everything that the
//! lines can ask for, so the socket file is made for its owner alone.

use std::{
    fs::{self, File, Permissions},
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use crate::{socket::Listening, sys};

/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// The most connections at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 16;

/// Answers a line; neither has a newline.
pub type Answer = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// A thread of a connection, and the socket that ends it.
type Connection = (UnixStream, JoinHandle<()>);

/// A control socket that is served by threads of its own until it is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    stop: File,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Listens at `path`. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// With the reason when something else is there, or a thread cannot be started.
    pub fn serve(path: &Path, answer: Answer) -> Result<Self, String> {
        let listening = Listening::bind(path)?;
        let owner_alone = Permissions::from_mode(0o600);
        fs::set_permissions(path, owner_alone).map_err(|error| error.to_string())?;
        let stop = sys::event().map_err(|error| error.to_string())?;
        let watched = stop.try_clone().map_err(|error| error.to_string())?;
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || listen(&listening, &watched, &answer))
            .map_err(|error| error.to_string())?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if sys::signal(&self.stop).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the control socket panicked");
        }
    }
}

fn listen(listening: &Listening, stop: &File, answer: &Answer) {
    let connections: Mutex<Vec<Connection>> = Mutex::default();
    loop {
        let fds = [
            (listening.as_fd(), libc::POLLIN),
            (stop.as_fd(), libc::POLLIN),
        ];
        match sys::poll(fds, None) {
            Ok([_, 0]) => {}
            Ok(_) => break,
            Err(error) => {
                tracing::error!(%error, "the control socket is no longer served");
                break;
            }
        }
        let mut connections = connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain(|(_, thread)| !thread.is_finished());
        match listening.accept() {
            Ok(Some(stream)) if connections.len() < MAX_CONNECTIONS => {
                match start(stream, answer) {
                    Ok(connection) => connections.push(connection),
                    Err(error) => tracing::warn!(%error, "a control connection cannot be served"),
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "a control connection cannot be taken");
                thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
    let connections = connections
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    for (stream, _) in &connections {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for (_, thread) in connections {
        let _ = thread.join();
    }
}

fn start(stream: UnixStream, answer: &Answer) -> io::Result<Connection> {
    stream.set_nonblocking(false)?;
    let handle = stream.try_clone()?;
    let answer = Arc::clone(answer);
    let thread = thread::Builder::new()
        .name("control-peer".to_owned())
        .spawn(move || {
            if let Err(error) = converse(&stream, &answer) {
                tracing::debug!(%error, "a control connection has ended");
            }
            // The listening thread has the socket, too.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
    Ok((handle, thread))
}

fn converse(stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader
            .by_ref()
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        if line.pop() != Some(b'\n') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a line that is too long, or has no end",
            ));
        }
        let mut text = answer(&String::from_utf8_lossy(&line));
        text.push('\n');
        (&*stream).write_all(text.as_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_answered_and_a_wrong_one_costs_its_connection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        let answer: Answer = Arc::new(|line| format!("<{line}>"));
        let socket = ControlSocket::serve(&path, answer).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let ask = |stream: &UnixStream, text: &[u8]| {
            let mut stream = stream;
            // The peer may close in the midst of a line that is too long.
            let _ = stream.write_all(text);
            let mut line = String::new();
            let _ = BufReader::new(stream).read_line(&mut line);
            line
        };
        let first = UnixStream::connect(&path).unwrap();
        let second = UnixStream::connect(&path).unwrap();
        assert_eq!(ask(&first, b"one\n"), "<one>\n");
        assert_eq!(ask(&second, b"two\n"), "<two>\n");
        assert_eq!(ask(&first, &vec![b'x'; 1 << 17]), "");
        assert_eq!(ask(&second, b"\n"), "<>\n");
        // An open connection does not keep it.
        drop(socket);
        assert!(!path.exists());
        assert_eq!(ask(&second, b"more\n"), "");
    }
}
