//! Random guests, the same from the same seed: a model for legal traffic, survival for the rest.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::ErrorKind;
use common::{DATA, Guest, INDIRECT, IOERR, MEMORY, NEXT, OK, Random, Setup, UNSUPP, WRITE};
use virtio_devices::virtio_blk::driver::Range;
use vm_memory::{Bytes, GuestAddress};

/// What the guest expects of a request in flight.
#[derive(Clone)]
enum Expected {
    Data { at: u64, bytes: Vec<u8> },
    Nothing,
}

#[test]
fn legal_traffic_matches_a_model() {
    for seed in 1..=20 {
        let mut random = Random::seeded(seed);
        let mut setup = Setup::default();
        setup.driver.event_idx = random.chance(2);
        setup.driver.indirect = random.chance(2);
        setup.device.write_back = random.chance(2);
        setup.disk.capacity = if random.chance(2) {
            0
        } else {
            1 + random.below(5) as usize
        };
        setup.start = random.next() as u16;
        let mut guest = Guest::with(setup);
        let mut model = vec![0u8; 1 << 20];
        let mut pending: Vec<Option<Expected>> = vec![None; 64];
        guest.process();
        for _ in 0..200 {
            guest.disk.hold(random.chance(2));
            // Requests of one round touch places of their own, so that their order is free.
            let mut place = random.below(8);
            for _ in 0..random.below(8) {
                place += 1 + random.below(16);
                let sectors = 1 + random.below(8);
                let (sector, len) = (place * 8 % 2040, sectors * 512);
                let place_in_memory = DATA + place * 4096;
                let cut = 512 * random.below(sectors) + random.below(2) * random.below(511);
                let mut data = vec![(GuestAddress(place_in_memory + cut), (len - cut) as u32)];
                if cut > 0 {
                    data.insert(0, (GuestAddress(place_in_memory), cut as u32));
                }
                let range = (sector * 512) as usize..(sector * 512 + len) as usize;
                let (slot, expected) = match random.below(6) {
                    0 | 1 => {
                        guest.fill(place_in_memory, len as usize, 0xee);
                        let expected = Expected::Data {
                            at: place_in_memory,
                            bytes: model[range].to_vec(),
                        };
                        (guest.driver.read(sector, &data), expected)
                    }
                    2 | 3 => {
                        let byte = random.next() as u8;
                        guest.fill(place_in_memory, len as usize, byte);
                        let slot = guest.driver.write(sector, &data);
                        if slot.is_some() {
                            model[range].fill(byte);
                        }
                        (slot, Expected::Nothing)
                    }
                    4 => {
                        let zeroes = Range {
                            sector,
                            sectors: sectors as u32,
                            flags: random.below(2) as u32,
                        };
                        let slot = guest.driver.write_zeroes(&[zeroes]);
                        if slot.is_some() {
                            model[range].fill(0);
                        }
                        (slot, Expected::Nothing)
                    }
                    _ => (guest.driver.flush(), Expected::Nothing),
                };
                if let Some(slot) = slot {
                    pending[usize::from(slot)] = Some(expected);
                }
            }
            let mut ended = guest.turn();
            // All of it ends before the next round, in a random order.
            while guest.disk.held() > 0 {
                let index = random.below(guest.disk.held() as u64) as usize;
                guest.disk.release(index);
                guest.process();
                ended.extend(guest.poll());
            }
            guest.disk.hold(false);
            guest.process();
            ended.extend(guest.poll());
            for used in ended {
                let expected = pending[usize::from(used.slot)].take().unwrap();
                assert_eq!(used.status, OK, "seed {seed}");
                if let Expected::Data { at, bytes } = expected {
                    assert_eq!(used.len as usize, bytes.len() + 1);
                    assert_eq!(guest.bytes(at, bytes.len()), bytes, "seed {seed}");
                }
            }
            assert!(pending.iter().all(Option::is_none), "seed {seed}");
            assert_eq!(guest.worker.outstanding(), 0);
        }
        assert_eq!(guest.disk.contents(), model, "seed {seed}");
        assert!(!guest.device.needs_reset());
    }
}

fn hostile_address(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.next(),
        1 => u64::MAX - random.below(600),
        2 => MEMORY as u64 - random.below(600),
        3 => random.below(0x4000),
        _ => DATA + random.below(0x10000),
    }
}

fn hostile_len(random: &mut Random) -> u32 {
    match random.below(8) {
        0 => random.next() as u32,
        1 => 0,
        2 => random.below(32) as u32,
        3 => 16,
        4 => 1,
        _ => 512 * random.below(9) as u32,
    }
}

#[test]
fn illegal_traffic_never_panics_and_never_hangs() {
    let (mut broken, mut returned) = (0, 0);
    for seed in 1..=200 {
        let mut random = Random::seeded(seed);
        let mut setup = Setup::default();
        setup.driver.event_idx = random.chance(2);
        setup.disk.capacity = random.below(4) as usize;
        setup.disk.capabilities.secure_erase = random.chance(2);
        setup.device.read_only = random.chance(8);
        setup.start = random.next() as u16;
        let mut guest = Guest::with(setup);
        let faults = random.next();
        let mut failing = Random(faults | 1);
        guest.disk.fail_with(move |_| {
            failing
                .chance(8)
                .then_some([ErrorKind::Io(5), ErrorKind::NoSpace, ErrorKind::Unsupported][0])
        });
        for _ in 0..40 {
            guest.disk.hold(random.chance(2));
            // Mostly plausible chains with something wrong in them.
            for index in 0..64u16 {
                let flags = match random.below(16) {
                    0 => random.next() as u16,
                    1 => INDIRECT,
                    2..=5 => 0,
                    6..=8 => WRITE,
                    9..=11 => WRITE | NEXT,
                    _ => NEXT,
                };
                let next = match random.below(12) {
                    0 => random.next() as u16,
                    1 => random.below(64) as u16,
                    _ => index + 1,
                };
                let (address, len) = (hostile_address(&mut random), hostile_len(&mut random));
                guest.desc(index, address, len, flags, next);
                if random.chance(4) {
                    let at = DATA + 16 * random.below(0x1000);
                    guest.desc_at(at, address, len, flags, next);
                }
            }
            for _ in 0..16 {
                let kinds = [0, 1, 4, 8, 11, 13, 14, random.next() as u32];
                let kind = kinds[random.below(8) as usize];
                let sector = match random.below(4) {
                    0 => random.next(),
                    _ => random.below(2100),
                };
                guest.header(DATA + 16 * random.below(0x1000), kind, sector);
            }
            for _ in 0..random.below(12) {
                let head = match random.below(200) {
                    0 => random.next() as u16,
                    _ => random.below(64) as u16,
                };
                guest.driver.post(head);
            }
            if random.chance(100) {
                let at = guest.driver.avail_ring().0 + 2;
                let index = random.next() as u16;
                guest.memory.write_obj(index, GuestAddress(at)).unwrap();
            }
            let _ = guest.driver.publish();
            guest.process();
            while guest.disk.held() > 0 && !random.chance(10) {
                let index = random.below(guest.disk.held() as u64) as usize;
                guest.disk.release(index);
                guest.process();
            }
        }
        let state = guest.worker.queue_state();
        returned += usize::from(state.next_used.wrapping_sub(guest_start(seed)));
        broken += usize::from(guest.device.needs_reset());
        // Whatever happened, it can be stopped, and nothing is left at the disk.
        guest.disk.hold(false);
        guest.disk.release_all();
        guest.worker.reset().unwrap();
        assert_eq!(guest.worker.in_flight(), 0, "seed {seed}");
        assert_eq!(guest.worker.outstanding(), 0, "seed {seed}");
    }
    assert!(broken > 100, "{broken} queues broke");
    assert!(returned > 400, "{returned} requests were returned");
}

/// The index at which the guest of that seed started.
fn guest_start(seed: u64) -> u16 {
    let mut random = Random::seeded(seed);
    for _ in 0..4 {
        random.next();
    }
    random.next() as u16
}

#[test]
fn statuses_of_random_single_requests_are_those_of_the_specification() {
    let mut random = Random(0xdead_beef_cafe_f00d);
    let mut guest = Guest::new();
    let capacity = (1u64 << 20) / 512;
    for _ in 0..5000 {
        let kinds = [0, 1, 4, 8, 11, 13, 14, random.next() as u32];
        let kind = kinds[random.below(8) as usize];
        let sector = match random.below(4) {
            0 => random.next(),
            1 => capacity - random.below(10),
            _ => random.below(capacity),
        };
        let len = hostile_len(&mut random) % 0x10000;
        let writable = matches!(kind, 0 | 8);
        let (header, status) = (DATA - 0x1000, DATA - 0x800);
        guest.header(header, kind, sector);
        let segment = [sector, random.below(16) | (random.below(4) << 32)];
        for (index, word) in segment.iter().enumerate() {
            let at = GuestAddress(DATA + 8 * index as u64);
            guest.memory.write_obj(*word, at).unwrap();
        }
        let flags = if writable { WRITE } else { 0 };
        let parts = [(header, 16, 0), (DATA, len, flags), (status, 1, WRITE)];
        let (got, _) = guest.chain(&parts, status);
        let fits = |sectors: u64| {
            sector
                .checked_add(sectors)
                .is_some_and(|end| end <= capacity)
        };
        let expected = match kind {
            0 | 1 if len.is_multiple_of(512) && fits(u64::from(len) / 512) => OK,
            4 | 8 => OK,
            11 | 13 if len == 16 => {
                let flags = segment[1] >> 32;
                if flags > 1 || (flags == 1 && kind == 11) {
                    UNSUPP
                } else if fits(segment[1] & 0xffff_ffff) {
                    OK
                } else {
                    IOERR
                }
            }
            // Longer ones hold segments of whatever was read before.
            11 | 13 if len != 0 && len.is_multiple_of(16) => got,
            0 | 1 | 11 | 13 => IOERR,
            _ => UNSUPP,
        };
        assert_eq!(got, expected, "type {kind} sector {sector} len {len}");
    }
}
