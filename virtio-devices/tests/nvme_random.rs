//! Random traffic: legal commands against a model of the disk, illegal ones against nothing but survival.
#![allow(missing_docs, clippy::unwrap_used)]

mod nvme_common;

use nvme_common::{ACQ, AQA, ASQ, CAP, CC, CSTS, DATA, Guest, MEMORY, NSSR, Setup, flush, read};
use virtio_devices::{
    nvme::{NamespaceConfig, Status, driver::Entry},
    testing::MockDiskConfig,
};

/// xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A number, mostly one of those that break things.
    fn nasty(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => self.below(64),
            4 => MEMORY as u64 - self.below(4096),
            5 => DATA + self.below(1 << 16),
            6 => 1 << self.below(64),
            _ => self.next(),
        }
    }
}

const BLOCK: usize = 512;
const BLOCKS: u64 = 1024;
/// Guest memory of one command: room for two pages, wherever they start.
const SLOT: u64 = 32 << 10;

/// What must come back for a command.
enum Expected {
    Status(Status),
    /// Success, and these bytes at this place of guest memory, which may be in two pieces.
    Bytes(Vec<(u64, Vec<u8>)>),
}

/// Two pages, the first from an offset on: where the bytes of a transfer are.
fn pages(random: &mut Random, slot: u64, len: usize) -> Vec<(u64, usize)> {
    let base = DATA + slot * SLOT;
    let most = 8192 - len as u64;
    let offset = random.below(most.min(4092) + 1) & !3;
    let first = len.min(4096 - offset as usize);
    let mut list = vec![(base + offset, first)];
    if first < len {
        // Not the next page.
        list.push((base + 3 * 4096, len - first));
    }
    list
}

struct Model {
    disk: Vec<u8>,
    /// Blocks that a command of this batch changes, or looks at.
    busy: Vec<bool>,
}

impl Model {
    fn range(&mut self, random: &mut Random) -> Option<(u64, u64)> {
        let count = 1 + random.below(16);
        let start = random.below(BLOCKS - count + 1);
        let range = start as usize..(start + count) as usize;
        if self.busy[range.clone()].iter().any(|busy| *busy) {
            return None;
        }
        self.busy[range].fill(true);
        Some((start, count))
    }

    fn bytes(&mut self, start: u64, count: u64) -> &mut [u8] {
        &mut self.disk[start as usize * BLOCK..(start + count) as usize * BLOCK]
    }

    /// A legal command, or one that fails for a known reason.
    fn command(&mut self, guest: &Guest, random: &mut Random, slot: u64) -> (Entry, Expected) {
        let success = Expected::Status(Status::SUCCESS);
        let Some((start, count)) = self.range(random) else {
            return (flush(), success);
        };
        let len = count as usize * BLOCK;
        let place = pages(random, slot, len);
        let second = place.get(1).map_or(0, |it| it.0);
        let entry = |opcode| {
            let entry = Entry::new(opcode).nsid(1).data(place[0].0, second);
            entry.blocks(start, count as u32)
        };
        let fill = |bytes: &[u8]| {
            let mut at = 0;
            for (address, len) in &place {
                guest.put(*address, &bytes[at..at + len]);
                at += len;
            }
        };
        match random.below(9) {
            0..=2 => {
                let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
                fill(&bytes);
                self.bytes(start, count).copy_from_slice(&bytes);
                (entry(1), success)
            }
            3 | 4 => {
                let bytes = self.bytes(start, count);
                let mut at = 0;
                let pieces = place.iter().map(|(address, len)| {
                    at += len;
                    (*address, bytes[at - len..at].to_vec())
                });
                let expected = Expected::Bytes(pieces.collect());
                (entry(2), expected)
            }
            5 => {
                self.bytes(start, count).fill(0);
                let entry = Entry::new(8).nsid(1).blocks(start, count as u32);
                (entry, success)
            }
            6 => {
                let mut bytes = self.bytes(start, count).to_vec();
                let same = random.below(2) == 0;
                if !same {
                    bytes[random.below(len as u64) as usize] ^= 1;
                }
                fill(&bytes);
                let status = if same {
                    Status::SUCCESS
                } else {
                    Status::COMPARE_FAILURE
                };
                (entry(5), Expected::Status(status))
            }
            7 => {
                // Beyond the end, and a namespace that is not there.
                let entry = entry(2);
                if random.below(2) == 0 {
                    let entry = entry.blocks(BLOCKS - count + 1, count as u32);
                    (entry, Expected::Status(Status::LBA_OUT_OF_RANGE))
                } else {
                    (
                        entry.nsid(9999),
                        Expected::Status(Status::INVALID_NAMESPACE),
                    )
                }
            }
            _ => {
                let Some((from, most)) = self.range(random) else {
                    return (flush(), success);
                };
                let count = count.min(most);
                let bytes = self.bytes(from, count).to_vec();
                self.bytes(start, count).copy_from_slice(&bytes);
                let mut descriptor = [0; 32];
                descriptor[8..16].copy_from_slice(&from.to_le_bytes());
                descriptor[16..18].copy_from_slice(&(count as u16 - 1).to_le_bytes());
                let at = DATA + slot * SLOT;
                guest.put(at, &descriptor);
                let entry = Entry::new(0x19).nsid(1).data(at, 0);
                let entry = entry.cdw(10, start as u32).cdw(11, 0).cdw(12, 0);
                (entry, success)
            }
        }
    }
}

/// Batches on several queues, completed in any order: what is read is what was written.
#[test]
fn legal_traffic_against_a_model() {
    for seed in 1..=12 {
        let mut random = Random::new(seed);
        let disk = MockDiskConfig {
            size: BLOCKS * BLOCK as u64,
            capacity: if seed % 3 == 0 { 5 } else { 0 },
            ..MockDiskConfig::default()
        };
        let setup = Setup {
            disks: vec![(disk, NamespaceConfig::default())],
            ..Setup::default()
        };
        let mut guest = Guest::with_queues(setup, 3);
        let mut model = Model {
            disk: vec![0; disk.size as usize],
            busy: vec![false; BLOCKS as usize],
        };
        for _ in 0..60 {
            model.busy.fill(false);
            let count = 1 + random.below(24);
            let commands: Vec<_> = (0..count)
                .map(|slot| model.command(&guest, &mut random, slot))
                .collect();
            let pair = random.below(3) as usize;
            let entries: Vec<Entry> = commands.iter().map(|it| it.0).collect();
            let ended = guest.io_all(pair, &entries);
            for ((entry, expected), ended) in commands.iter().zip(ended) {
                match expected {
                    Expected::Status(status) => {
                        assert_eq!(ended.status, *status, "seed {seed}: {entry:x?}");
                    }
                    Expected::Bytes(pieces) => {
                        assert!(ended.status.is_success(), "seed {seed}: {entry:x?}");
                        for (address, bytes) in pieces {
                            let found = guest.bytes(*address, bytes.len());
                            assert!(found == *bytes, "seed {seed}: {entry:x?}");
                        }
                    }
                }
            }
            if random.below(16) == 0 {
                guest.disable();
                guest.enable();
                for id in 1..=3 {
                    guest.create_pair(id, 64);
                }
            }
        }
        assert!(guest.disks[0].contents() == model.disk, "seed {seed}");
    }
}

fn random_entry(random: &mut Random) -> Entry {
    let mut entry = Entry::new(random.below(0x30) as u8);
    if random.below(4) == 0 {
        entry = Entry::new(random.next() as u8);
    }
    let nsid = if random.below(2) == 0 {
        1
    } else {
        random.nasty() as u32
    };
    entry = entry
        .nsid(nsid)
        .flags((random.next() & 0xc3) as u8)
        .data(random.nasty(), random.nasty());
    for dword in 10..16 {
        entry = entry.cdw(dword, random.nasty() as u32);
    }
    entry
}

/// Registers and doorbells of any size at any place, and entries of random bytes: what is constant stays so, and
/// afterwards a reset makes everything good again.
#[test]
fn illegal_traffic_is_survived() {
    let registers = [CC, CSTS, AQA, ASQ, ACQ, NSSR, 0x0c, 0x10];
    for seed in 1..=40 {
        let mut random = Random::new(seed);
        let mut guest = Guest::with_queues(Setup::default(), 2);
        let (cap, version) = (guest.read64(CAP), guest.read32(8));
        for _ in 0..200 {
            match random.below(8) {
                0 => {
                    let offset = if random.below(2) == 0 {
                        registers[random.below(registers.len() as u64) as usize]
                    } else {
                        random.nasty()
                    };
                    let value = random.nasty().to_le_bytes();
                    let len = 1 + random.below(8) as usize;
                    guest.controller.write(offset, &value[..len]);
                    let mut back = [0; 8];
                    guest.controller.read(offset, &mut back[..len]);
                }
                1 => {
                    let doorbell = 0x1000 + 4 * random.below(300);
                    let value = random.nasty() as u32;
                    guest.controller.write(doorbell, &value.to_le_bytes());
                }
                2 => guest.process(),
                3 | 4 => {
                    let entry = random_entry(&mut random);
                    // A queue that is gone, or full, takes nothing.
                    guest.post_admin(entry);
                }
                _ => {
                    let entry = random_entry(&mut random);
                    let pair = random.below(2) as usize;
                    guest.post(pair, &[entry]);
                }
            }
            assert_eq!((guest.read64(CAP), guest.read32(8)), (cap, version));
        }
        guest.disable();
        guest.enable();
        guest.create_pair(1, 64);
        for (index, byte) in [0x11, 0x22].into_iter().enumerate() {
            guest.fill(DATA, BLOCK, byte);
            let mut write = Entry::new(1).nsid(1).data(DATA, 0);
            write = write.blocks(index as u64, 1);
            guest.io_ok(write);
            guest.fill(DATA, BLOCK, 0);
            guest.io_ok(read(index as u64, 1).data(DATA, 0));
            assert_eq!(guest.bytes(DATA, BLOCK), vec![byte; BLOCK], "seed {seed}");
        }
    }
}
