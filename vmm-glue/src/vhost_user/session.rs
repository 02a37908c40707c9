//! One connection: what the front end has set up so far, and what each message does to it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use vhost::vhost_user::{
    VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
    message::{
        FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
        VhostUserMemory as RegionCount, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    },
};
use virtio_devices::virtio_blk::{VirtioBlk, WRITEBACK_OFFSET};
use vm_memory::ByteValued;

use super::{
    Error,
    inflight::{self, InflightArea},
    memory::{DirtyLog, MAX_REGIONS, MemoryTable, VhostUserMemory},
    message::{Channel, Message, Received},
    notify::Notifier,
    rings::Rings,
};
use crate::{queue_thread::QueueHandle, sys};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: rings start disabled.
const F_PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// `VHOST_F_LOG_ALL`: changed pages are logged.
const F_LOG: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// The most bytes of configuration space that the protocol knows: `VHOST_USER_MAX_CONFIG_SIZE`.
const CONFIG_SPACE: u32 = 256;

/// What this server offers.
pub(super) fn protocol_features() -> Protocol {
    Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The front end closed the connection, after so many messages.
    Closed {
        /// The number of messages it had sent.
        messages: u64,
    },
    /// The server was asked to stop.
    Stopped,
}

/// One connection.
pub(super) struct Session<'a> {
    device: &'a VirtioBlk,
    notifier: &'a Notifier,
    stop: BorrowedFd<'a>,
    channel: Channel,
    features: u64,
    protocol: Protocol,
    rings: Rings<'a>,
    log: Option<Arc<DirtyLog>>,
    messages: u64,
}

impl<'a> Session<'a> {
    /// A session that begins.
    pub(super) fn new(
        socket: UnixStream,
        device: &'a VirtioBlk,
        queues: &'a mut [QueueHandle<Arc<VhostUserMemory>>],
        notifier: &'a Notifier,
        stop: BorrowedFd<'a>,
    ) -> io::Result<Self> {
        Ok(Self {
            rings: Rings::new(queues, device.config().queue_size),
            device,
            notifier,
            stop,
            channel: Channel::new(socket)?,
            features: 0,
            protocol: Protocol::empty(),
            log: None,
            messages: 0,
        })
    }

    /// Serves until the front end is gone, breaks the protocol, or the server is to stop. In any
    /// case every queue is drained and nothing of the front end is left.
    pub(super) fn serve(mut self) -> Result<End, Error> {
        let result = self.receive();
        self.rings.stop_all();
        self.notifier.clear();
        self.device.reset();
        match result {
            Err(Error::Stopped) => Ok(End::Stopped),
            other => other,
        }
    }

    fn receive(&mut self) -> Result<End, Error> {
        loop {
            let [message, stop] = sys::poll(
                [
                    (self.channel.as_fd(), libc::POLLIN),
                    (self.stop, libc::POLLIN),
                ],
                None,
            )?;
            if stop != 0 {
                return Ok(End::Stopped);
            }
            if message == 0 {
                continue;
            }
            let Received::Message(message) = self.channel.receive(self.stop)? else {
                return Ok(End::Closed {
                    messages: self.messages,
                });
            };
            self.messages += 1;
            self.handle(message)?;
        }
    }

    /// Does what a message asks for and answers it.
    fn handle(&mut self, mut message: Message) -> Result<(), Error> {
        let request = message.request;
        tracing::trace!(
            request,
            bytes = message.body.len(),
            files = message.files.len(),
            "message"
        );
        let result = self.dispatch(&mut message);
        let acknowledge = message.need_reply && self.protocol.contains(Protocol::REPLY_ACK);
        match result {
            Ok(Answer::Body(body)) => self.reply(request, &body, None),
            Ok(Answer::File(body, file)) => self.reply(request, &body, Some(&file)),
            Ok(Answer::Done) if acknowledge => self.reply(request, &0u64.to_ne_bytes(), None),
            Ok(Answer::Done) => Ok(()),
            // The front end asked for a reply and hears of the failure; what it does then is its
            // business. One that did not ask would go on in the belief that all is well.
            Err(error @ Error::Message { .. }) if acknowledge && !answers_itself(request) => {
                tracing::warn!(%error, "message refused");
                self.reply(request, &1u64.to_ne_bytes(), None)
            }
            Err(error) => Err(error),
        }
    }

    fn reply(&mut self, request: u32, body: &[u8], file: Option<&File>) -> Result<(), Error> {
        self.channel.reply(request, body, file, self.stop)
    }

    fn dispatch(&mut self, message: &mut Message) -> Result<Answer, Error> {
        use FrontendReq as Req;
        let Ok(request) = Req::try_from(message.request) else {
            return Err(message.bad("is not known"));
        };
        match request {
            Req::GET_FEATURES => {
                let features = self.device.features() | F_PROTOCOL | F_LOG;
                Ok(Answer::number(features))
            }
            Req::GET_PROTOCOL_FEATURES => Ok(Answer::number(protocol_features().bits())),
            Req::GET_QUEUE_NUM => Ok(Answer::number(self.rings.len() as u64)),
            Req::GET_MAX_MEM_SLOTS => Ok(Answer::number(MAX_REGIONS as u64)),
            Req::SET_OWNER | Req::SET_LOG_FD => Ok(Answer::Done),
            Req::SET_FEATURES => self.set_features(message),
            Req::SET_PROTOCOL_FEATURES => self.set_protocol_features(message),
            Req::RESET_OWNER | Req::RESET_DEVICE => {
                self.reset();
                Ok(Answer::Done)
            }
            Req::SET_MEM_TABLE => self.set_mem_table(message),
            Req::ADD_MEM_REG => {
                let file = message.file()?;
                let region: VhostUserSingleMemoryRegion = message.payload()?;
                let channel = &self.channel;
                let add = |memory: &mut MemoryTable| memory.add(&region, &file, channel.as_fd());
                self.rings.change_memory(message, add).map(Answer::done)
            }
            Req::REM_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = message.payload()?;
                self.change_memory(message, |memory| memory.remove(&region))
            }
            Req::SET_LOG_BASE => self.set_log_base(message),
            Req::SET_VRING_NUM => self.rings.set_num(message).map(Answer::done),
            Req::SET_VRING_ADDR => self.rings.set_addr(message).map(Answer::done),
            Req::SET_VRING_BASE => self.rings.set_base(message).map(Answer::done),
            Req::GET_VRING_BASE => {
                let state = self.rings.get_base(message)?;
                self.notifier.set_call(state.index as usize, None);
                Ok(Answer::Body(state.as_slice().to_vec()))
            }
            Req::SET_VRING_KICK => self.rings.set_kick(message).map(Answer::done),
            Req::SET_VRING_CALL => {
                let (index, file) = self.rings.file_of(message)?;
                self.notifier.set_call(index, file);
                Ok(Answer::Done)
            }
            Req::SET_VRING_ERR => {
                let (index, file) = self.rings.file_of(message)?;
                self.notifier.set_err(index, file);
                Ok(Answer::Done)
            }
            Req::SET_VRING_ENABLE => self.rings.set_enable(message).map(Answer::done),
            Req::GET_CONFIG => self.get_config(message),
            Req::SET_CONFIG => self.set_config(message),
            Req::SET_BACKEND_REQ_FD => {
                let file = message.file()?;
                let channel = UnixStream::from(OwnedFd::from(file));
                self.notifier.set_channel(Some(Channel::new(channel)?));
                Ok(Answer::Done)
            }
            Req::GET_INFLIGHT_FD => self.get_inflight_fd(message),
            Req::SET_INFLIGHT_FD => self.set_inflight_fd(message),
            _ => Err(message.bad("belongs to a feature that was not offered")),
        }
    }

    fn set_features(&mut self, message: &Message) -> Result<Answer, Error> {
        let features: u64 = message.payload()?;
        let changed = features ^ self.features;
        if changed & !(F_LOG | F_PROTOCOL) != 0 {
            if self.rings.is_running() {
                return Err(message.bad("changes features of a running device"));
            }
            self.device
                .ack_features(features & !(F_LOG | F_PROTOCOL))
                .map_err(|error| message.bad(error.to_string()))?;
        }
        self.features = features;
        self.rings.set_features(features);
        if changed & F_PROTOCOL != 0 {
            // Without the bit there is no SET_VRING_ENABLE, and a ring runs as soon as it can.
            if features & F_PROTOCOL == 0 {
                self.rings.enable_all();
            }
        }
        if changed & F_LOG != 0 {
            self.apply_log(message)?;
        }
        Ok(Answer::Done)
    }

    fn set_protocol_features(&mut self, message: &Message) -> Result<Answer, Error> {
        let bits: u64 = message.payload()?;
        match Protocol::from_bits(bits) {
            Some(features) if protocol_features().contains(features) => {
                self.protocol = features;
                Ok(Answer::Done)
            }
            _ => Err(message.bad(format!("accepts {bits:#x}, which was not offered"))),
        }
    }

    /// Stops everything and forgets what the driver set up; memory, descriptors for interrupts and
    /// the inflight area stay the front end's to change.
    fn reset(&mut self) {
        self.rings.reset(self.features & F_PROTOCOL == 0);
        self.device.reset();
        self.features &= F_PROTOCOL | F_LOG;
        self.rings.set_features(self.features);
    }

    fn set_mem_table(&mut self, message: &mut Message) -> Result<Answer, Error> {
        let header = size_of::<RegionCount>();
        let entry = size_of::<VhostUserMemoryRegion>();
        let files = std::mem::take(&mut message.files);
        let Some((head, rest)) = message.body.split_at_checked(header) else {
            return Err(message.bad("is too short"));
        };
        let mut table = RegionCount::default();
        table.as_mut_slice().copy_from_slice(head);
        let count = table.num_regions as usize;
        if count != files.len() || rest.len() != count * entry {
            return Err(message.bad(format!(
                "has {count} regions, {} descriptors and {} bytes",
                files.len(),
                rest.len()
            )));
        }
        let regions: Vec<_> = rest
            .chunks_exact(entry)
            .map(|bytes| {
                let mut region = VhostUserMemoryRegion::default();
                region.as_mut_slice().copy_from_slice(bytes);
                region
            })
            .collect();
        let channel = &self.channel;
        let replace = |memory: &mut MemoryTable| memory.replace(&regions, &files, channel.as_fd());
        self.rings.change_memory(message, replace).map(Answer::done)
    }

    /// Changes the memory table, with the queues drained meanwhile.
    fn change_memory(
        &mut self,
        message: &Message,
        change: impl FnOnce(&mut MemoryTable) -> Result<(), String>,
    ) -> Result<Answer, Error> {
        self.rings.change_memory(message, change).map(Answer::done)
    }

    fn set_log_base(&mut self, message: &mut Message) -> Result<Answer, Error> {
        let file = message.file()?;
        let log: VhostUserLog = message.payload()?;
        let mapped = DirtyLog::new(&file, log.mmap_offset, log.mmap_size)
            .map_err(|text| message.bad(text))?;
        self.log = Some(Arc::new(mapped));
        self.apply_log(message)?;
        Ok(Answer::Body(message.body.clone()))
    }

    /// Logging is on when there is a log and the front end accepted `VHOST_F_LOG_ALL`.
    fn apply_log(&mut self, message: &Message) -> Result<(), Error> {
        let log = self.log.clone().filter(|_| self.features & F_LOG != 0);
        self.change_memory(message, |memory| memory.set_log(log))?;
        Ok(())
    }

    fn get_config(&mut self, message: &Message) -> Result<Answer, Error> {
        let (mut config, _) = config_of(message)?;
        let (offset, size) = (config.offset, config.size);
        let fits = offset
            .checked_add(size)
            .is_some_and(|end| end <= CONFIG_SPACE);
        if !fits {
            // A reply without content tells of the error.
            config.size = 0;
            return Ok(Answer::Body(config.as_slice().to_vec()));
        }
        let mut bytes = vec![0; size as usize];
        self.device.read_config(offset.into(), &mut bytes);
        let mut body = config.as_slice().to_vec();
        body.extend_from_slice(&bytes);
        Ok(Answer::Body(body))
    }

    fn set_config(&mut self, message: &Message) -> Result<Answer, Error> {
        let (config, bytes) = config_of(message)?;
        let (offset, size, flags) = (config.offset, config.size, config.flags);
        let fits = offset
            .checked_add(size)
            .is_some_and(|end| end <= CONFIG_SPACE);
        if !fits || bytes.len() != size as usize {
            return Err(message.bad(format!("writes {size} bytes at {offset}")));
        }
        let writable = offset as usize == WRITEBACK_OFFSET && size == 1;
        let migration = flags & VhostUserConfigFlags::LIVE_MIGRATION.bits() != 0;
        if !writable && !migration {
            return Err(message.bad(format!("writes read-only bytes at {offset}")));
        }
        // The read-only fields of a migrating front end are what this disk says they are.
        self.device.write_config(offset.into(), bytes);
        Ok(Answer::Done)
    }

    fn get_inflight_fd(&mut self, message: &Message) -> Result<Answer, Error> {
        let asked: VhostUserInflight = message.payload()?;
        let (queues, size) = (asked.num_queues, asked.queue_size);
        if queues == 0
            || usize::from(queues) > self.rings.len()
            || size == 0
            || size > self.device.config().queue_size
        {
            return Err(message.bad(format!("asks for {queues} queues of {size}")));
        }
        let (inflight, file) = inflight::create(queues, size)?;
        let area = InflightArea::map(&inflight, &file).map_err(|text| message.bad(text))?;
        self.rings.set_inflight(area);
        Ok(Answer::File(inflight.as_slice().to_vec(), file))
    }

    fn set_inflight_fd(&mut self, message: &mut Message) -> Result<Answer, Error> {
        let file = message.file()?;
        let inflight: VhostUserInflight = message.payload()?;
        if self.rings.is_running() {
            return Err(message.bad("comes while a ring runs"));
        }
        if inflight.queue_size > self.device.config().queue_size {
            return Err(message.bad(format!("has queues of {}", inflight.queue_size)));
        }
        let area = InflightArea::map(&inflight, &file).map_err(|text| message.bad(text))?;
        self.rings.set_inflight(area);
        Ok(Answer::Done)
    }
}

/// What a message is answered with.
enum Answer {
    /// Nothing, or an acknowledgement if one was asked for.
    Done,
    /// A body.
    Body(Vec<u8>),
    /// A body and a descriptor.
    File(Vec<u8>, File),
}

impl Answer {
    fn done((): ()) -> Self {
        Answer::Done
    }

    fn number(value: u64) -> Self {
        Answer::Body(value.to_ne_bytes().to_vec())
    }
}

/// Whether a message has a reply of its own, which `REPLY_ACK` does not replace.
fn answers_itself(request: u32) -> bool {
    use FrontendReq as Req;
    matches!(
        Req::try_from(request),
        Ok(Req::GET_FEATURES
            | Req::GET_PROTOCOL_FEATURES
            | Req::GET_QUEUE_NUM
            | Req::GET_MAX_MEM_SLOTS
            | Req::GET_VRING_BASE
            | Req::GET_CONFIG
            | Req::GET_INFLIGHT_FD
            | Req::SET_LOG_BASE)
    )
}

/// The head of a configuration space message, and the bytes behind it.
fn config_of(message: &Message) -> Result<(VhostUserConfig, &[u8]), Error> {
    let Some((head, bytes)) = message.body.split_at_checked(size_of::<VhostUserConfig>()) else {
        return Err(message.bad("is too short"));
    };
    let mut config = VhostUserConfig::default();
    config.as_mut_slice().copy_from_slice(head);
    Ok((config, bytes))
}
