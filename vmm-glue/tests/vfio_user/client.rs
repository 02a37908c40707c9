//! A vfio-user client for tests: messages, and guest memory in a memfd.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const MEMORY: u64 = 4 << 20;
pub const BASE: u64 = 0x1_0000_0000;
/// The most bytes of data in a message, as the client says.
pub const MAX_DATA: usize = 1000;
/// The region of the configuration space.
pub const CONFIG: u32 = 7;
/// The command register: memory, bus master.
pub const MASTER: u32 = 6;

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
    /// The number of the last message.
    pub next: u16,
    pub memory: File,
    /// Accesses of the server to memory by messages: reads, writes.
    pub accesses: [usize; 2],
    /// Accesses below this address are refused.
    pub refused_below: u64,
    /// It answers no accesses while it waits for a reply itself.
    pub deaf: bool,
    /// What came with the last message.
    pub received: Option<File>,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        Self::with_memory(path, memfd())
    }

    /// The same guest with another server: it has the memory that it had.
    pub fn with_memory(path: &Path, memory: File) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut client = Self {
            socket,
            next: 0,
            memory,
            accesses: [0; 2],
            refused_below: 0,
            deaf: false,
            received: None,
        };
        let mut body = vec![0; 4];
        body.extend_from_slice(b"{\"capabilities\":{\"max_data_xfer_size\":1000}}\0");
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
        let mut later = Vec::new();
        let answer = loop {
            let (header, body) = self.receive();
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            if word(8) & 15 == 0 {
                if self.deaf {
                    later.push((header, body));
                } else {
                    self.access_memory(&header, &body);
                }
                continue;
            }
            assert_eq!(word(8) & 15, 1);
            assert_eq!(header[..2], self.next.to_ne_bytes());
            if word(8) & 1 << 5 != 0 {
                break Err(word(12));
            }
            break Ok(body);
        };
        for (header, body) in later {
            self.access_memory(&header, &body);
        }
        answer
    }

    fn receive(&mut self) -> ([u8; 16], Vec<u8>) {
        let mut header = [0; 16];
        let (bytes, file) = self.socket.recv_with_fd(&mut header).unwrap();
        assert_ne!(bytes, 0, "the connection is gone");
        self.socket.read_exact(&mut header[bytes..]).unwrap();
        self.received = file;
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
        let mut body = vec![0; size as usize - 16];
        self.socket.read_exact(&mut body).unwrap();
        (header, body)
    }

    /// Answers DMA_READ and DMA_WRITE.
    fn access_memory(&mut self, header: &[u8; 16], body: &[u8]) {
        let command = u16::from_ne_bytes([header[2], header[3]]);
        let address = u64::from_ne_bytes(body[..8].try_into().unwrap());
        let count = u64::from_ne_bytes(body[8..16].try_into().unwrap()) as usize;
        assert!(count <= MAX_DATA);
        let mut answer = body[..16].to_vec();
        let mut flags = 1_u32;
        if address < self.refused_below {
            flags |= 1 << 5;
            answer.clear();
        } else if command == 11 {
            let mut data = vec![0; count];
            self.memory
                .read_exact_at(&mut data, address - BASE)
                .unwrap();
            answer.extend_from_slice(&data);
            self.accesses[0] += 1;
        } else {
            assert_eq!(command, 12);
            assert_eq!(body.len(), 16 + count);
            self.memory
                .write_all_at(&body[16..], address - BASE)
                .unwrap();
            self.accesses[1] += 1;
        }
        let mut bytes = header[..4].to_vec();
        bytes.extend_from_slice(&(16 + answer.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&14_u32.to_ne_bytes());
        bytes.extend_from_slice(&answer);
        std::io::Write::write_all(&mut self.socket, &bytes).unwrap();
    }

    /// Sets the command register, as a driver does before it uses the function.
    pub fn set_command(&mut self, value: u32) {
        let mut body = Self::access(4, CONFIG, 2);
        body.extend_from_slice(&(value as u16).to_ne_bytes());
        self.call(10, &body, &[]).unwrap();
    }

    /// VFIO_USER_DEVICE_FEATURE: the data of the answer.
    pub fn feature(&mut self, flags: u32, data: &[u8]) -> Result<Vec<u8>, u32> {
        let mut body: Vec<u8> = [64, flags].iter().flat_map(|it| it.to_ne_bytes()).collect();
        body.extend_from_slice(data);
        let answer = self.call(16, &body, &[])?;
        assert_eq!(answer[4..8], flags.to_ne_bytes());
        Ok(answer[8..].to_vec())
    }

    /// Whether a message waits.
    pub fn has_message(&self) -> bool {
        let mut entry = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd structure, which outlives the call.
        unsafe { libc::poll(&raw mut entry, 1, 0) > 0 }
    }

    /// Answers one access if there is one; whether the server has closed the connection.
    pub fn is_gone(&mut self) -> bool {
        if !self.has_message() {
            return false;
        }
        let mut header = [0; 16];
        if self.socket.read_exact(&mut header).is_err() {
            return true;
        }
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
        let mut body = vec![0; size as usize - 16];
        self.socket.read_exact(&mut body).unwrap();
        self.access_memory(&header, &body);
        false
    }

    /// Answers what the server asks for now.
    pub fn pump(&mut self) {
        while self.has_message() {
            let (header, body) = self.receive();
            self.access_memory(&header, &body);
        }
    }

    pub fn words(&mut self, command: u16, words: &[u32], fds: &[i32]) -> Result<Vec<u8>, u32> {
        let body: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        self.call(command, &body, fds)
    }

    pub fn map(&mut self) {
        let fd = self.memory.as_raw_fd();
        self.map_range(3, BASE, MEMORY, &[fd]).unwrap();
    }

    /// Memory without a descriptor, so that it is reached by messages.
    pub fn map_by_messages(&mut self) {
        self.map_range(3, BASE, MEMORY, &[]).unwrap();
    }

    /// Memory with its descriptor up to `data`, and a page without one from there on.
    pub fn map_mixed(&mut self, data: u64) {
        let fd = self.memory.as_raw_fd();
        self.map_range(3, BASE, data, &[fd]).unwrap();
        self.map_range(3, BASE + data, 0x1000, &[]).unwrap();
    }

    pub fn map_range(&mut self, flags: u32, at: u64, len: u64, fds: &[i32]) -> Result<(), u32> {
        let mut body: Vec<u8> = [32, flags].iter().flat_map(|it| it.to_ne_bytes()).collect();
        let offset = if fds.is_empty() { 0 } else { at - BASE };
        for value in [offset, at, len] {
            body.extend_from_slice(&value.to_ne_bytes());
        }
        self.call(2, &body, fds).map(|_| ())
    }

    pub fn unmap(&mut self) -> Result<Vec<u8>, u32> {
        self.unmap_range(BASE, MEMORY)
    }

    pub fn unmap_range(&mut self, at: u64, len: u64) -> Result<Vec<u8>, u32> {
        let mut body: Vec<u8> = [24_u32, 0].iter().flat_map(|it| it.to_ne_bytes()).collect();
        body.extend_from_slice(&at.to_ne_bytes());
        body.extend_from_slice(&len.to_ne_bytes());
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
        loop {
            self.pump();
            if done(self) {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
