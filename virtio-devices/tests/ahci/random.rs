//! Random traffic: legal against a model of the disk, illegal against nothing but survival.

use virtio_devices::{
    ahci::{
        driver::{Issue, command, queued},
        regs::px,
    },
    ata::{TaskFile, opcode},
    testing::MockDiskConfig,
};

use crate::common::{BASE, DATA, Machine, Setup};

/// xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

const SLOT: u64 = 16 << 10;
const SIZE: usize = 1 << 20;

/// What a slot is doing to the disk.
struct Flight {
    write: bool,
    start: usize,
    bytes: Vec<u8>,
}

/// Queued and unqueued transfers, completed in any order: what is read is what was written.
#[test]
fn legal_traffic_against_a_model() {
    for seed in 1..=12u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut machine = Machine::new(Setup {
            disk: MockDiskConfig {
                size: SIZE as u64,
                capacity: if seed % 3 == 0 { 5 } else { 0 },
                ..MockDiskConfig::default()
            },
            ..Setup::default()
        });
        let mut model = vec![0u8; SIZE];
        for _ in 0..60 {
            if random.below(3) == 0 {
                single(&mut machine, &mut random, &mut model);
            } else {
                batch(&mut machine, &mut random, &mut model);
            }
        }
        assert_eq!(machine.disk.contents(), model, "seed {seed}");
    }
}

fn pieces(random: &mut Random, at: u64, mut len: u32) -> Vec<(u64, u32)> {
    let (mut list, mut at) = (Vec::new(), at);
    while len > 0 {
        let take = if list.len() == 60 {
            len
        } else {
            (random.below(u64::from(len)) as u32 + 1) & !1
        }
        .max(2)
        .min(len);
        list.push((at, take));
        at += u64::from(take);
        len -= take;
    }
    list
}

fn single(machine: &mut Machine, random: &mut Random, model: &mut [u8]) {
    let sectors = random.below(16) + 1;
    let lba = random.below(SIZE as u64 / 512 - sectors);
    let (start, len) = (lba as usize * 512, sectors as usize * 512);
    let codes = [
        (opcode::READ_DMA_EXT, opcode::WRITE_DMA_EXT),
        (opcode::READ_SECTORS_EXT, opcode::WRITE_SECTORS_EXT),
        (opcode::READ_DMA_EXT, opcode::WRITE_DMA_FUA_EXT),
    ];
    let (read, write) = codes[random.below(3) as usize];
    let to_disk = random.below(2) == 0;
    let code = if to_disk { write } else { read };
    let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
    machine.driver.put(DATA, &bytes);
    let data = pieces(random, DATA, len as u32);
    machine
        .run_in(
            random.below(32) as u32,
            &Issue {
                task: command(code, lba, sectors as u16),
                write: to_disk,
                data: &data,
                ..Issue::default()
            },
        )
        .ok();
    assert_eq!(machine.driver.ended().count_ones(), 1);
    if to_disk {
        model[start..start + len].copy_from_slice(&bytes);
    } else {
        assert_eq!(machine.data(len), model[start..start + len]);
    }
}

/// Up to 32 queued commands, on sectors that do not overlap.
fn batch(machine: &mut Machine, random: &mut Random, model: &mut [u8]) {
    machine.disk.hold(true);
    let mut flights: Vec<Option<Flight>> = (0..32).map(|_| None).collect();
    let count = random.below(32) + 1;
    let share = SIZE as u64 / 512 / 32;
    for tag in 0..count {
        let sectors = random.below(share.min(16)) + 1;
        let lba = tag * share + random.below(share - sectors + 1);
        let (start, len) = (lba as usize * 512, sectors as usize * 512);
        let write = random.below(2) == 0;
        let at = DATA + tag * SLOT;
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        machine.driver.put(at, &bytes);
        let data = pieces(random, at, len as u32);
        machine.driver.prepare(
            tag as u32,
            &Issue {
                task: queued(tag as u8, write, lba, sectors as u16),
                write,
                data: &data,
                ..Issue::default()
            },
        );
        flights[tag as usize] = Some(Flight {
            write,
            start,
            bytes,
        });
        if random.below(4) == 0 {
            machine.driver.issue();
            machine.work();
        }
    }
    machine.driver.issue();
    let mut left = count;
    while left > 0 {
        machine.work();
        let held = machine.disk.held() as u64;
        for _ in 0..=random.below(held.max(1)) {
            let held = machine.disk.held() as u64;
            if held > 0 {
                machine.disk.release(random.below(held) as usize);
            }
        }
        machine.work();
        let ended = machine.driver.ended();
        for tag in (0..32).filter(|tag| ended & 1 << tag != 0) {
            let flight = flights[tag].take().unwrap();
            let range = flight.start..flight.start + flight.bytes.len();
            if flight.write {
                model[range].copy_from_slice(&flight.bytes);
            } else {
                let got = machine
                    .driver
                    .take(DATA + tag as u64 * SLOT, flight.bytes.len());
                assert_eq!(got, model[range]);
            }
            left -= 1;
        }
    }
    machine.disk.hold(false);
    assert_eq!(machine.driver.get(px::TFD) & 0xff, 0x50);
}

/// Random register writes, random bytes in command list and tables, completions held and released:
/// no panic, no hang; and after a reset of the HBA the port works.
#[test]
fn illegal_traffic_survives() {
    for seed in 1..=40u64 {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut machine = Machine::new(Setup::default());
        if seed % 4 == 0 {
            let disc = virtio_devices::testing::NullDisk(700 << 20);
            machine
                .hba
                .plug_optical(0, Some(Box::new(disc)), Default::default())
                .unwrap();
        }
        for _ in 0..400 {
            step(&mut machine, &mut random);
        }
        machine.disk.hold(false);
        machine.disk.release_all();
        machine.work();
        machine.driver.set_global(4, 1);
        machine.work();
        assert_eq!(machine.worker.in_flight(), 0, "seed {seed}");
        assert_eq!(machine.driver.global(4), 0x8000_0000, "seed {seed}");
        machine.driver.set(px::CMD, 0);
        machine.start();
        let identify = if seed % 4 == 0 {
            opcode::IDENTIFY_PACKET_DEVICE
        } else {
            opcode::IDENTIFY_DEVICE
        };
        machine.read(command(identify, 0, 0), 512).ok();
    }
}

fn step(machine: &mut Machine, random: &mut Random) {
    match random.below(12) {
        0 => machine
            .driver
            .set(random.below(32) * 4, random.next() as u32),
        1 => {
            let bit = 1 << random.below(32);
            machine.driver.set(px::SACT, bit);
            machine.driver.set(px::CI, bit);
        }
        2 => machine.driver.set(px::CI, random.next() as u32),
        3 => {
            // Somewhere in the list or the tables.
            let at = BASE + random.below(0x4000);
            machine.driver.put(at, &random.next().to_le_bytes());
        }
        4 => {
            let tag = random.below(32) as u8;
            let task = TaskFile {
                command: random.next() as u8,
                features: random.below(4) as u16,
                count: u16::from(tag) << 3,
                lba: random.below(20000),
                device: 0x40,
                auxiliary: random.below(2) as u32,
            };
            let mut packet = [0; 16];
            packet[..8].copy_from_slice(&random.next().to_le_bytes());
            machine.driver.prepare(
                u32::from(tag),
                &Issue {
                    task,
                    write: random.below(2) == 0,
                    packet: Some(packet),
                    data: &[(DATA, random.below(1 << 20) as u32 + 1)],
                },
            );
            machine.driver.issue();
        }
        5 => machine.driver.set(px::CMD, 0x11),
        6 => machine.disk.hold(random.below(2) == 0),
        7 => machine.disk.release_all(),
        8 => machine.driver.set(px::SCTL, random.below(5) as u32),
        9 => {
            machine.driver.set(px::CLB, BASE as u32);
            machine.driver.set(px::CLBU, 0);
            machine.driver.set(px::FB, BASE as u32 + 0x400);
            machine.driver.set(px::FBU, 0);
        }
        10 => {
            let at = random.below(0x1100);
            machine
                .hba
                .write(at, &random.next().to_le_bytes()[..random.below(9) as usize]);
            let mut data = [0; 8];
            machine.hba.read(at, &mut data);
        }
        _ => {
            machine.work();
        }
    }
    if random.below(3) == 0 {
        machine.worker.process();
    }
}
