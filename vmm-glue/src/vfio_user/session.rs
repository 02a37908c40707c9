//! One connection: the commands of the client.

use std::{
    fs::File,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::Arc,
};

use vm_memory::{GuestMemoryAtomic, Permissions};

use super::{
    Error, PausableFunction,
    device::Device,
    interrupts::{INDICES, INTX, MSI, MSIX, VfioUserInterrupts},
    memory::{MemoryTable, NewRegion, VfioUserMemory},
    message::{Channel, MAX_DATA, MAX_FDS, Message, Reply},
    migration::{FLAGS, Migration},
};

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_REGION_IO_FDS: u16 = 6;
const GET_IRQ_INFO: u16 = 7;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const RESET: u16 = 13;
const FEATURE: u16 = 16;
const MIG_DATA_READ: u16 = 17;
const MIG_DATA_WRITE: u16 = 18;

/// Regions: six BARs, the ROM, the configuration space, VGA.
const REGIONS: u32 = 9;
const REGION_CONFIG: u32 = 7;
const CONFIG_BYTES: u64 = 4096;
const REGION_READABLE: u32 = 1;
const REGION_WRITABLE: u32 = 2;
const REGION_MAPPABLE: u32 = 4;
const REGION_CAPABILITIES: u32 = 8;
/// Bytes of the answer to GET_REGION_INFO before the capabilities.
const REGION_INFO: u32 = 32;

const FEATURE_GET: u32 = 1 << 16;
const FEATURE_SET: u32 = 1 << 17;
const FEATURE_PROBE: u32 = 1 << 18;
const FEATURE_MIGRATION: u32 = 1;
const FEATURE_STATE: u32 = 2;
const FEATURE_DATA_SIZE: u32 = 9;

const DEVICE_RESET: u32 = 1;
const DEVICE_PCI: u32 = 2;

const IRQ_EVENTFD: u32 = 1;
const IRQ_MASKABLE: u32 = 2;
const IRQ_AUTOMASKED: u32 = 4;
const IRQ_NORESIZE: u32 = 8;

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

/// The most bytes of guest memory that are copied before the memory of the copies is given back.
const MAX_COPIED: u64 = 64 << 20;

/// DMA_MAP: the client's memory may be read, written, both.
const MAP_READABLE: u32 = 1;
const MAP_WRITABLE: u32 = 1 << 1;
const MAP_READ_WRITE: u32 = MAP_READABLE | MAP_WRITABLE;

/// DMA_UNMAP of everything.
const UNMAP_ALL: u32 = 1 << 1;

type Answer = Result<Reply, i32>;

pub(super) struct Session {
    channel: Arc<Channel>,
    device: Device,
    migration: Migration,
    table: MemoryTable,
    greeted: bool,
}

impl Session {
    pub(super) fn new(
        stream: UnixStream,
        stop: BorrowedFd<'_>,
        function: Arc<dyn PausableFunction>,
        memory: GuestMemoryAtomic<VfioUserMemory>,
        interrupts: Arc<VfioUserInterrupts>,
    ) -> Result<Self, Error> {
        Ok(Self {
            channel: Arc::new(Channel::new(stream, stop)?),
            device: Device::new(function, memory, interrupts),
            migration: Migration::default(),
            table: MemoryTable::default(),
            greeted: false,
        })
    }

    /// Answers commands until the client is gone or the server is to stop.
    pub(super) fn serve(&mut self) -> Result<(), Error> {
        while let Some(mut message) = self.channel.receive()? {
            if !self.greeted && message.command != VERSION {
                return Err(Error::Client("the first message is no version".to_owned()));
            }
            let answer = self.answer(&mut message);
            if let Err(errno) = &answer {
                tracing::debug!(command = message.command, errno, "refused");
            }
            self.channel.reply(&message, answer)?;
            if self.channel.take_moved(MAX_COPIED) {
                self.device.held(|_| self.table.forget_copies());
            }
        }
        Ok(())
    }

    /// The client is gone: the device forgets everything of it.
    pub(super) fn end(&mut self) {
        // Whoever waits for its memory waits no longer.
        self.channel.close();
        if self.table.is_lost() {
            tracing::warn!("the client has shortened the file of its guest's memory");
        }
        self.table.clear();
        self.device.end();
    }

    fn answer(&mut self, message: &mut Message) -> Answer {
        match message.command {
            VERSION => self.version(message),
            DMA_MAP => self.dma_map(message),
            DMA_UNMAP => self.dma_unmap(message),
            GET_INFO => {
                message.u32(0)?;
                Ok(words(&[16, DEVICE_RESET | DEVICE_PCI, REGIONS, INDICES]).into())
            }
            GET_REGION_INFO => self.region_info(message),
            // No doorbell is an ioeventfd: they are trapped.
            GET_REGION_IO_FDS => Ok(words(&[16, 0, message.u32(8)?, 0]).into()),
            GET_IRQ_INFO => self.irq_info(message),
            SET_IRQS => self.set_irqs(message),
            REGION_READ => self.region_read(message),
            REGION_WRITE => self.region_write(message),
            RESET => {
                self.device.reset();
                self.migration.reset();
                Ok(Reply::default())
            }
            FEATURE => self.feature(message),
            MIG_DATA_READ => self.migration_read(message),
            MIG_DATA_WRITE => self.migration_write(message),
            _ => Err(libc::ENOTSUP),
        }
    }

    fn version(&mut self, message: &Message) -> Answer {
        let numbers = message.u32(0)?;
        let (major, minor) = (numbers as u16, (numbers >> 16) as u16);
        if major != 0 {
            return Err(libc::EINVAL);
        }
        self.greeted = true;
        if let Some(bytes) = max_data(message.body.get(4..).unwrap_or_default()) {
            self.channel.limit_data(bytes);
        }
        let mut body = Vec::new();
        body.extend_from_slice(&0_u16.to_ne_bytes());
        body.extend_from_slice(&minor.min(1).to_ne_bytes());
        let text = format!(
            "{{\"capabilities\":{{\"max_msg_fds\":{MAX_FDS},\"max_data_xfer_size\":{MAX_DATA}}}}}"
        );
        body.extend_from_slice(text.as_bytes());
        body.push(0);
        Ok(body.into())
    }

    fn dma_map(&mut self, message: &mut Message) -> Answer {
        let (flags, at) = (message.u32(4)?, message.u64(8)?);
        let access = match flags {
            0 => Permissions::No,
            MAP_READABLE => Permissions::Read,
            MAP_WRITABLE => Permissions::Write,
            MAP_READ_WRITE => Permissions::ReadWrite,
            _ => return Err(libc::EINVAL),
        };
        let new = NewRegion {
            guest: message.u64(16)?,
            size: message.u64(24)?,
            at,
            access,
        };
        let file = message.files.pop();
        self.table.map(new, file.as_ref(), &self.channel)?;
        self.device.exchange_memory(self.table.memory());
        Ok(Reply::default())
    }

    fn dma_unmap(&mut self, message: &Message) -> Answer {
        let (flags, address, size) = (message.u32(4)?, message.u64(8)?, message.u64(16)?);
        if flags & !UNMAP_ALL != 0 {
            return Err(libc::ENOTSUP);
        }
        if flags & UNMAP_ALL != 0 {
            self.table.clear();
        } else {
            self.table.unmap(address, size)?;
        }
        self.device.exchange_memory(self.table.memory());
        Ok(message.body.get(..24).unwrap_or_default().to_vec().into())
    }

    /// Bytes of a region; `None` for one that there never is.
    fn region_bytes(&self, index: u32) -> Option<u64> {
        match index {
            REGION_CONFIG => Some(CONFIG_BYTES),
            index if index < REGIONS => {
                let bars = self.device.description().bars.iter();
                let mut bars = bars.filter(|bar| u32::from(bar.index) == index);
                Some(bars.next().map_or(0, |bar| bar.size))
            }
            _ => None,
        }
    }

    fn region_info(&self, message: &Message) -> Answer {
        let (argsz, index) = (message.u32(0)?, message.u32(8)?);
        let size = self.region_bytes(index).ok_or(libc::EINVAL)?;
        let mut flags = if size > 0 {
            REGION_READABLE | REGION_WRITABLE
        } else {
            0
        };
        let part = u8::try_from(index).ok().filter(|_| index < REGION_CONFIG);
        let part = part.and_then(|bar| self.device.mappable(bar));
        let mut capability = Vec::new();
        if let Some(part) = &part {
            flags |= REGION_MAPPABLE | REGION_CAPABILITIES;
            // Sparse areas, version 1, the last capability; one area.
            capability = words(&[1 | 1 << 16, 0, 1, 0]);
            capability.extend_from_slice(&part.offset.to_ne_bytes());
            capability.extend_from_slice(&part.bytes.to_ne_bytes());
        }
        let total = REGION_INFO + capability.len() as u32;
        // A client with no room for the capabilities is told how much it needs.
        let whole = argsz >= total;
        let place = if part.is_some() && whole {
            REGION_INFO
        } else {
            0
        };
        let mut body = words(&[total, flags, index, place]);
        body.extend_from_slice(&size.to_ne_bytes());
        // Of one that is mapped, it is the place in the file.
        let offset = if part.is_some() {
            0
        } else {
            u64::from(index) << 40
        };
        body.extend_from_slice(&offset.to_ne_bytes());
        let mut file = None;
        if whole {
            body.extend_from_slice(&capability);
            file = part.map(|part| part.file);
        }
        Ok(Reply { body, file })
    }

    fn vectors(&self, index: u32) -> u32 {
        match index {
            INTX => u32::from(self.device.description().line),
            MSI => u32::from(self.device.description().msi),
            MSIX => {
                let msix = self.device.description().msix;
                msix.map_or(0, |it| u32::from(it.vectors))
            }
            _ => 0,
        }
    }

    fn irq_info(&self, message: &Message) -> Answer {
        let index = message.u32(8)?;
        if index >= INDICES {
            return Err(libc::EINVAL);
        }
        let count = self.vectors(index);
        let flags = match index {
            _ if count == 0 => 0,
            INTX => IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
            _ => IRQ_EVENTFD | IRQ_NORESIZE,
        };
        Ok(words(&[16, flags, index, count]).into())
    }

    fn set_irqs(&mut self, message: &mut Message) -> Answer {
        let flags = message.u32(4)?;
        let (index, start, count) = (message.u32(8)?, message.u32(12)?, message.u32(16)?);
        let end = start.checked_add(count).ok_or(libc::EINVAL)?;
        if index >= INDICES || end > self.vectors(index) {
            return Err(libc::EINVAL);
        }
        let files: Vec<File> = std::mem::take(&mut message.files);
        let interrupts = self.device.interrupts();
        let data = flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD);
        match (flags & (ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER), data) {
            (ACTION_TRIGGER, DATA_NONE) if count == 0 => interrupts.disable(index),
            (ACTION_TRIGGER, DATA_NONE) => {
                for vector in start..end {
                    interrupts.trigger(index, vector as usize);
                }
            }
            (ACTION_TRIGGER, DATA_BOOL) => {
                for (vector, on) in (start..end).zip(message.body.get(20..).unwrap_or_default()) {
                    if *on != 0 {
                        interrupts.trigger(index, vector as usize);
                    }
                }
            }
            (ACTION_TRIGGER, DATA_EVENTFD) => {
                if files.len() > count as usize {
                    return Err(libc::EINVAL);
                }
                let mut list: Vec<Option<File>> = files.into_iter().map(Some).collect();
                list.resize_with(count as usize, || None);
                interrupts.set(index, start as usize, list)?;
            }
            (ACTION_MASK, DATA_NONE) if index == INTX => interrupts.mask_line(true),
            (ACTION_UNMASK, DATA_NONE) if index == INTX => interrupts.mask_line(false),
            _ => return Err(libc::ENOTSUP),
        }
        self.device.use_messages();
        Ok(Reply::default())
    }

    fn region(&self, message: &Message) -> Result<(u64, u32, usize), i32> {
        let (offset, region, count) = (message.u64(0)?, message.u32(8)?, message.u32(12)?);
        let count = count as usize;
        if count > MAX_DATA {
            return Err(libc::E2BIG);
        }
        let size = self.region_bytes(region).filter(|size| *size > 0);
        let size = size.ok_or(libc::EINVAL)?;
        let end = offset.checked_add(count as u64).ok_or(libc::EINVAL)?;
        if end > size {
            return Err(libc::EINVAL);
        }
        Ok((offset, region, count))
    }

    fn region_read(&mut self, message: &Message) -> Answer {
        let (offset, region, count) = self.region(message)?;
        let mut body = message.body.get(..16).unwrap_or_default().to_vec();
        let mut data = vec![0; count];
        if region == REGION_CONFIG {
            self.device.read_config(offset, &mut data);
        } else {
            self.device.read_bar(region as u8, offset, &mut data);
        }
        body.extend_from_slice(&data);
        Ok(body.into())
    }

    fn region_write(&mut self, message: &Message) -> Answer {
        let (offset, region, count) = self.region(message)?;
        let data = message.body.get(16..).and_then(|data| data.get(..count));
        let data = data.ok_or(libc::EINVAL)?;
        if region == REGION_CONFIG {
            if self.device.write_config(offset, data) {
                self.migration.reset();
            }
        } else {
            self.device.write_bar(region as u8, offset, data);
        }
        Ok(message.body.get(..16).unwrap_or_default().to_vec().into())
    }

    /// Device features: those of migration.
    fn feature(&mut self, message: &Message) -> Answer {
        let (argsz, flags) = (message.u32(0)?, message.u32(4)?);
        let request = || message.body.clone();
        let (index, asked) = (flags & 0xffff, flags & (FEATURE_GET | FEATURE_SET));
        let methods = match index {
            _ if !self.device.can_migrate() => return Err(libc::ENOTTY),
            FEATURE_MIGRATION | FEATURE_DATA_SIZE => FEATURE_GET,
            FEATURE_STATE => FEATURE_GET | FEATURE_SET,
            // DMA is not logged, and VFIO has more features that are not ours.
            _ => return Err(libc::ENOTTY),
        };
        if flags & !(0xffff | asked | FEATURE_PROBE) != 0 || asked & !methods != 0 {
            return Err(libc::EINVAL);
        }
        if flags & FEATURE_PROBE != 0 {
            return Ok(request().into());
        }
        let data = match (index, asked) {
            (FEATURE_STATE, FEATURE_SET) => {
                self.migration.go(message.u32(8)?, &mut self.device)?;
                return Ok(request().into());
            }
            (FEATURE_MIGRATION, FEATURE_GET) => FLAGS.to_ne_bytes().to_vec(),
            (FEATURE_DATA_SIZE, FEATURE_GET) => self.migration.size().to_ne_bytes().to_vec(),
            // The second word would be a descriptor: -1 is none.
            (FEATURE_STATE, FEATURE_GET) => words(&[self.migration.state(), u32::MAX]),
            _ => return Err(libc::EINVAL),
        };
        let total = 8 + data.len() as u32;
        let mut body = words(&[total, flags]);
        if argsz >= total {
            body.extend_from_slice(&data);
        }
        Ok(body.into())
    }

    fn migration_read(&mut self, message: &Message) -> Answer {
        let (argsz, size) = (message.u32(0)?, message.u32(4)? as usize);
        if size > self.channel.max_data() || (argsz as usize) < size.saturating_add(8) {
            return Err(libc::EINVAL);
        }
        let data = self.migration.read(size)?;
        let mut body = words(&[8 + data.len() as u32, data.len() as u32]);
        body.extend_from_slice(data);
        Ok(body.into())
    }

    fn migration_write(&mut self, message: &Message) -> Answer {
        let size = message.u32(4)? as usize;
        let data = message.body.get(8..).and_then(|data| data.get(..size));
        self.migration
            .write(data.ok_or(libc::EINVAL)?, &self.device)?;
        Ok(Reply::default())
    }
}

/// `max_data_xfer_size` of the client's version text, if it has it.
fn max_data(text: &[u8]) -> Option<u64> {
    let text = text.split(|byte| *byte == 0).next()?;
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    value["capabilities"]["max_data_xfer_size"].as_u64()
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
