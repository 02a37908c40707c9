//! A vfio-user client for tests: messages, and guest memory in a memfd.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests"
)]

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const MEMORY: u64 = 4 << 20;
pub const BASE: u64 = 0x1_0000_0000;

fn memfd() -> File {
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the call above made this descriptor, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(MEMORY).unwrap();
    file
}

pub struct Client {
    pub socket: UnixStream,
    next: u16,
    pub memory: File,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut client = Self {
            socket,
            next: 0,
            memory: memfd(),
        };
        let mut body = vec![0; 4];
        body.extend_from_slice(b"{\"capabilities\":{}}\0");
        let answer = client.call(1, &body, &[]).unwrap();
        assert!(answer[4..].starts_with(b"{\"capabilities\":"));
        client
    }

    pub fn send(&mut self, command: u16, body: &[u8], fds: &[i32], flags: u32) {
        self.next += 1;
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.next.to_ne_bytes());
        bytes.extend_from_slice(&command.to_ne_bytes());
        bytes.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(body);
        let sent = self.socket.send_with_fds(&[bytes.as_slice()], fds).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub fn call(&mut self, command: u16, body: &[u8], fds: &[i32]) -> Result<Vec<u8>, u32> {
        self.send(command, body, fds, 0);
        let mut header = [0; 16];
        self.socket.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(header[..2], self.next.to_ne_bytes());
        let mut answer = vec![0; word(4) as usize - 16];
        self.socket.read_exact(&mut answer).unwrap();
        assert_eq!(word(8) & 15, 1);
        if word(8) & 1 << 5 != 0 {
            return Err(word(12));
        }
        Ok(answer)
    }

    pub fn words(&mut self, command: u16, words: &[u32], fds: &[i32]) -> Result<Vec<u8>, u32> {
        let body: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        self.call(command, &body, fds)
    }

    pub fn map(&mut self) {
        let mut body: Vec<u8> = [32_u32, 3].iter().flat_map(|it| it.to_ne_bytes()).collect();
        for value in [0, BASE, MEMORY] {
            body.extend_from_slice(&value.to_ne_bytes());
        }
        let fd = self.memory.as_raw_fd();
        self.call(2, &body, &[fd]).unwrap();
    }

    pub fn unmap(&mut self) -> Result<Vec<u8>, u32> {
        let mut body: Vec<u8> = [24_u32, 0].iter().flat_map(|it| it.to_ne_bytes()).collect();
        body.extend_from_slice(&BASE.to_ne_bytes());
        body.extend_from_slice(&MEMORY.to_ne_bytes());
        self.call(3, &body, &[])
    }

    pub fn access(offset: u64, region: u32, count: u32) -> Vec<u8> {
        let mut body = offset.to_ne_bytes().to_vec();
        body.extend_from_slice(&region.to_ne_bytes());
        body.extend_from_slice(&count.to_ne_bytes());
        body
    }

    pub fn read(&mut self, region: u32, offset: u64) -> u32 {
        let answer = self.call(9, &Self::access(offset, region, 4), &[]).unwrap();
        u32::from_ne_bytes(answer[16..20].try_into().unwrap())
    }

    /// A posted write to region 0, as QEMU's are.
    pub fn write(&mut self, offset: u64, value: u32) {
        self.write_to(0, offset, value);
    }

    /// A posted write.
    pub fn write_to(&mut self, region: u32, offset: u64, value: u32) {
        let mut body = Self::access(offset, region, 4);
        body.extend_from_slice(&value.to_ne_bytes());
        self.send(10, &body, &[], 1 << 4);
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < Duration::from_secs(20), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
