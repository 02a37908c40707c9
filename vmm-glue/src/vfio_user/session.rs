//! One connection: the commands of the client.

use std::{
    fs::File,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::Arc,
    time::{Duration, Instant},
};

use vm_memory::{GuestMemoryAtomic, Permissions};

use super::{
    Error, PausableFunction,
    interrupts::{INDICES, INTX, MSI, MSIX, VfioUserInterrupts},
    memory::{MemoryTable, NewRegion, VfioUserMemory},
    message::{Channel, MAX_DATA, MAX_FDS, Message},
};
use crate::pci::{ConfigSpace, Description};

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

/// Regions: six BARs, the ROM, the configuration space, VGA.
const REGIONS: u32 = 9;
const REGION_CONFIG: u32 = 7;
const CONFIG_BYTES: u64 = 4096;
const REGION_READABLE: u32 = 1;
const REGION_WRITABLE: u32 = 2;

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

type Answer = Result<Vec<u8>, i32>;

pub(super) struct Session {
    channel: Arc<Channel>,
    function: Arc<dyn PausableFunction>,
    description: Description,
    config: ConfigSpace,
    table: MemoryTable,
    memory: GuestMemoryAtomic<VfioUserMemory>,
    interrupts: Arc<VfioUserInterrupts>,
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
        let description = function.description();
        Ok(Self {
            channel: Arc::new(Channel::new(stream, stop)?),
            config: ConfigSpace::new(&description),
            description,
            function,
            table: MemoryTable::default(),
            memory,
            interrupts,
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
            if let Err(errno) = answer {
                tracing::debug!(command = message.command, errno, "refused");
            }
            self.channel.reply(&message, answer)?;
            if self.channel.take_moved(MAX_COPIED) {
                self.function.pause();
                self.table.forget_copies();
                self.function.resume();
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
        self.reset();
        self.interrupts.clear();
        self.table.clear();
        self.exchange_memory();
    }

    fn answer(&mut self, message: &mut Message) -> Answer {
        match message.command {
            VERSION => self.version(message),
            DMA_MAP => self.dma_map(message),
            DMA_UNMAP => self.dma_unmap(message),
            GET_INFO => {
                message.u32(0)?;
                Ok(words(&[16, DEVICE_RESET | DEVICE_PCI, REGIONS, INDICES]))
            }
            GET_REGION_INFO => self.region_info(message),
            // No doorbell is an ioeventfd: they are trapped.
            GET_REGION_IO_FDS => Ok(words(&[16, 0, message.u32(8)?, 0])),
            GET_IRQ_INFO => self.irq_info(message),
            SET_IRQS => self.set_irqs(message),
            REGION_READ => self.region_read(message),
            REGION_WRITE => self.region_write(message),
            RESET => {
                self.reset();
                Ok(Vec::new())
            }
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
        Ok(body)
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
        self.exchange_memory();
        Ok(Vec::new())
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
        self.exchange_memory();
        Ok(message.body.get(..24).unwrap_or_default().to_vec())
    }

    /// Nothing that was begun uses the old memory when this returns.
    fn exchange_memory(&self) {
        self.function.pause();
        if let Ok(guard) = self.memory.lock() {
            guard.replace(self.table.memory());
        }
        self.function.resume();
    }

    fn region_info(&self, message: &Message) -> Answer {
        let index = message.u32(8)?;
        let size = match index {
            REGION_CONFIG => CONFIG_BYTES,
            index if index < REGIONS => {
                let bars = self.description.bars.iter();
                let mut bars = bars.filter(|bar| u32::from(bar.index) == index);
                bars.next().map_or(0, |bar| bar.size)
            }
            _ => return Err(libc::EINVAL),
        };
        let flags = if size > 0 {
            REGION_READABLE | REGION_WRITABLE
        } else {
            0
        };
        let mut body = words(&[32, flags, index, 0]);
        body.extend_from_slice(&size.to_ne_bytes());
        body.extend_from_slice(&(u64::from(index) << 40).to_ne_bytes());
        Ok(body)
    }

    fn vectors(&self, index: u32) -> u32 {
        match index {
            INTX => u32::from(self.description.line),
            MSI => u32::from(self.description.msi),
            MSIX => self.description.msix.map_or(0, |it| u32::from(it.vectors)),
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
        Ok(words(&[16, flags, index, count]))
    }

    fn set_irqs(&mut self, message: &mut Message) -> Answer {
        let flags = message.u32(4)?;
        let (index, start, count) = (message.u32(8)?, message.u32(12)?, message.u32(16)?);
        let end = start.checked_add(count).ok_or(libc::EINVAL)?;
        if index >= INDICES || end > self.vectors(index) {
            return Err(libc::EINVAL);
        }
        let files: Vec<File> = std::mem::take(&mut message.files);
        let data = flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD);
        match (flags & (ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER), data) {
            (ACTION_TRIGGER, DATA_NONE) if count == 0 => self.interrupts.disable(index),
            (ACTION_TRIGGER, DATA_NONE) => {
                for vector in start..end {
                    self.interrupts.trigger(index, vector as usize);
                }
            }
            (ACTION_TRIGGER, DATA_BOOL) => {
                for (vector, on) in (start..end).zip(message.body.get(20..).unwrap_or_default()) {
                    if *on != 0 {
                        self.interrupts.trigger(index, vector as usize);
                    }
                }
            }
            (ACTION_TRIGGER, DATA_EVENTFD) => {
                if files.len() > count as usize {
                    return Err(libc::EINVAL);
                }
                let mut list: Vec<Option<File>> = files.into_iter().map(Some).collect();
                list.resize_with(count as usize, || None);
                self.interrupts.set(index, start as usize, list)?;
            }
            (ACTION_MASK, DATA_NONE) if index == INTX => self.interrupts.mask_line(true),
            (ACTION_UNMASK, DATA_NONE) if index == INTX => self.interrupts.mask_line(false),
            _ => return Err(libc::ENOTSUP),
        }
        self.function.use_messages(self.interrupts.uses_messages());
        Ok(Vec::new())
    }

    fn region(&self, message: &Message) -> Result<(u64, u32, usize), i32> {
        let (offset, region, count) = (message.u64(0)?, message.u32(8)?, message.u32(12)?);
        let count = count as usize;
        if count > MAX_DATA {
            return Err(libc::E2BIG);
        }
        let size = match region {
            REGION_CONFIG => CONFIG_BYTES,
            region => {
                let bars = self.description.bars.iter();
                let mut bars = bars.filter(|bar| u32::from(bar.index) == region);
                bars.next().ok_or(libc::EINVAL)?.size
            }
        };
        let end = offset.checked_add(count as u64).ok_or(libc::EINVAL)?;
        if end > size {
            return Err(libc::EINVAL);
        }
        Ok((offset, region, count))
    }

    fn region_read(&self, message: &Message) -> Answer {
        let (offset, region, count) = self.region(message)?;
        let mut body = message.body.get(..16).unwrap_or_default().to_vec();
        let mut data = vec![0; count];
        if region == REGION_CONFIG {
            self.config.read(offset, &mut data);
        } else {
            self.function.read_bar(region as u8, offset, &mut data);
        }
        body.extend_from_slice(&data);
        Ok(body)
    }

    fn region_write(&mut self, message: &Message) -> Answer {
        let (offset, region, count) = self.region(message)?;
        let data = message.body.get(16..).and_then(|data| data.get(..count));
        let data = data.ok_or(libc::EINVAL)?;
        if region == REGION_CONFIG {
            let changes = self.config.write(offset, data);
            if changes.reset {
                self.reset();
            }
        } else {
            self.function.write_bar(region as u8, offset, data);
        }
        Ok(message.body.get(..16).unwrap_or_default().to_vec())
    }

    /// Function-level reset: answered when nothing of the guest is in use any more.
    fn reset(&mut self) {
        self.config.reset();
        self.function.reset();
        let started = Instant::now();
        while !self.function.is_idle() {
            if started.elapsed() > Duration::from_secs(5) {
                tracing::warn!("a reset waits for the disk");
                std::thread::sleep(Duration::from_millis(100));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
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
