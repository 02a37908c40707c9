//! Features, configuration space, state.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use block::{Capabilities, DiskTopology};
use common::{Guest, Setup};
use virtio_devices::{
    Error,
    testing::{MockDisk, MockDiskConfig},
    virtio::QueueSnapshot,
    virtio_blk::{CONFIG_SPACE, VirtioBlk, VirtioBlkConfig, VirtioBlkState, feature},
};
use vm_memory::GuestAddress;

fn device(disk: MockDiskConfig, config: VirtioBlkConfig) -> (MockDisk, Arc<VirtioBlk>) {
    let disk = MockDisk::new(disk);
    let device = VirtioBlk::new(Box::new(disk.clone()), config).unwrap();
    (disk, device)
}

fn plain() -> (MockDisk, Arc<VirtioBlk>) {
    device(MockDiskConfig::default(), VirtioBlkConfig::default())
}

fn field<const N: usize>(device: &VirtioBlk, offset: u64) -> [u8; N] {
    let mut out = [0xaa; N];
    device.read_config(offset, &mut out);
    out
}

fn le16(device: &VirtioBlk, offset: u64) -> u16 {
    u16::from_le_bytes(field(device, offset))
}

fn le32(device: &VirtioBlk, offset: u64) -> u32 {
    u32::from_le_bytes(field(device, offset))
}

fn le64(device: &VirtioBlk, offset: u64) -> u64 {
    u64::from_le_bytes(field(device, offset))
}

#[test]
fn flush_is_offered_whenever_config_wce_is() {
    let read_only = VirtioBlkConfig {
        read_only: true,
        ..VirtioBlkConfig::default()
    };
    for config in [VirtioBlkConfig::default(), read_only] {
        let (_, device) = device(MockDiskConfig::default(), config);
        assert_ne!(device.features() & feature::CONFIG_WCE, 0);
        assert_ne!(device.features() & feature::FLUSH, 0);
    }
}

#[test]
fn writeback_is_0_with_config_wce_and_without_flush() {
    let (_, device) = plain();
    device
        .ack_features(device.features() & !feature::FLUSH)
        .unwrap();
    assert_eq!(field::<1>(&device, 32), [0]);
    device.reset();
    device.ack_features(device.features()).unwrap();
    assert_eq!(field::<1>(&device, 32), [1]);
}

#[test]
fn the_driver_toggles_writeback_only_after_accepting_config_wce() {
    let (_, device) = plain();
    device.write_config(32, &[0]);
    assert!(device.write_back());
    device.ack_features(device.features()).unwrap();
    device.write_config(32, &[0]);
    assert!(!device.write_back());
    // A wider write that covers the byte counts, one beside it does not.
    device.write_config(28, &[0, 0, 0, 0, 1, 0]);
    assert!(device.write_back());
    device.write_config(33, &[0]);
    device.write_config(0, &[0; 8]);
    device.write_config(u64::MAX, &[0; 8]);
    device.write_config(31, &[]);
    assert!(device.write_back());
    device.write_config(32, &[0]);
    device.reset();
    assert!(device.write_back(), "reset restores the configured mode");
}

#[test]
fn everything_else_in_the_configuration_space_is_read_only() {
    let (_, device) = plain();
    device.ack_features(device.features()).unwrap();
    let before = field::<CONFIG_SPACE>(&device, 0);
    device.write_config(0, &[0xff; 32]);
    device.write_config(33, &[0xff; 63]);
    assert_eq!(field::<CONFIG_SPACE>(&device, 0), before);
}

#[test]
fn unused_fields_are_zero() {
    let read_only = VirtioBlkConfig {
        read_only: true,
        ..VirtioBlkConfig::default()
    };
    let (_, device) = device(MockDiskConfig::default(), read_only);
    let space = field::<CONFIG_SPACE>(&device, 0);
    assert_eq!(space[16..20], [0; 4], "geometry");
    assert_eq!(space[33], 0, "unused0");
    assert_eq!(space[34..36], [0; 2], "num_queues without MQ");
    assert_eq!(space[36..60], [0; 24], "discard and write zeroes");
    assert_eq!(space[60..72], [0; 12], "secure erase");
    assert_eq!(space[72..96], [0; 24], "zoned");
}

#[test]
fn reads_beyond_the_end_are_zero() {
    let (_, device) = plain();
    assert_eq!(field::<8>(&device, 96), [0; 8]);
    assert_eq!(field::<8>(&device, u64::MAX), [0; 8]);
    let straddling = field::<200>(&device, 0);
    assert_eq!(straddling[96..], [0; 104]);
    device.read_config(0, &mut []);
}

#[test]
fn zoned_lifetime_geometry_and_ring_reset_are_not_offered() {
    let (_, device) = plain();
    for bit in [4, 15, 17, 34, 35, 40] {
        assert_eq!(device.features() & (1 << bit), 0, "bit {bit}");
    }
}

#[test]
fn accepting_what_is_not_offered_is_refused() {
    let (_, device) = plain();
    let zoned = device.features() | 1 << 17;
    assert!(matches!(
        device.ack_features(zoned),
        Err(Error::Features { .. })
    ));
    assert_eq!(device.acked_features(), 0);
    device.ack_features(feature::VERSION_1).unwrap();
}

#[test]
fn a_read_only_disk_offers_ro_and_nothing_that_writes() {
    let read_only_disk = MockDiskConfig {
        capabilities: Capabilities::default(),
        ..MockDiskConfig::default()
    };
    let (_, device) = device(read_only_disk, VirtioBlkConfig::default());
    assert_ne!(device.features() & feature::RO, 0);
    let writing = feature::DISCARD | feature::WRITE_ZEROES | feature::SECURE_ERASE;
    assert_eq!(device.features() & writing, 0);
}

#[test]
fn secure_erase_is_offered_only_where_it_means_something() {
    let (_, plain) = plain();
    assert_eq!(plain.features() & feature::SECURE_ERASE, 0);
    let mut disk = MockDiskConfig::default();
    disk.capabilities.secure_erase = true;
    let (_, erasing) = device(disk, VirtioBlkConfig::default());
    assert_ne!(erasing.features() & feature::SECURE_ERASE, 0);
    assert_ne!(le32(&erasing, 60), 0);
    assert_ne!(le32(&erasing, 64), 0);
    assert_ne!(le32(&erasing, 68), 0);
}

#[test]
fn capacity_sizes_and_topology_are_those_of_the_disk() {
    let disk = MockDiskConfig {
        size: 3 * 4096 + 100,
        topology: DiskTopology {
            logical_block_size: 512,
            physical_block_size: 4096,
            minimum_io_size: 4096,
            optimal_io_size: 65536,
        },
        ..MockDiskConfig::default()
    };
    let config = VirtioBlkConfig {
        num_queues: 4,
        queue_size: 128,
        ..VirtioBlkConfig::default()
    };
    let (_, device) = device(disk, config);
    assert_eq!(le64(&device, 0), 24, "whole sectors only");
    assert!(le32(&device, 8) >= 1 << 20, "size_max");
    assert_eq!(le32(&device, 12), 126, "seg_max");
    assert_eq!(le32(&device, 20), 512, "blk_size");
    assert_eq!(
        field::<2>(&device, 24),
        [3, 0],
        "8 logical blocks a physical"
    );
    assert_eq!(le16(&device, 26), 8, "minimum in logical blocks");
    assert_eq!(le32(&device, 28), 128, "optimal in logical blocks");
    assert_eq!(le16(&device, 34), 4, "num_queues");
    assert_eq!(le32(&device, 44), 8, "discard alignment in sectors");
    assert_eq!(field::<1>(&device, 56), [1], "write zeroes may unmap");
}

#[test]
fn resize_changes_capacity_and_generation_and_calls_back() {
    let (disk, device) = plain();
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    device.on_config_change(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let before = device.config_generation();
    device.resize(2 << 20).unwrap();
    assert_eq!(le64(&device, 0), (2 << 20) / 512);
    assert_ne!(device.config_generation(), before);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    // By whoever holds the disk, too.
    block::DiskFile::resize(&disk, 1 << 20).unwrap();
    assert_eq!(le64(&device, 0), (1 << 20) / 512);
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn nonsense_configurations_are_refused() {
    let good = VirtioBlkConfig::default;
    let bad = [
        VirtioBlkConfig {
            num_queues: 0,
            ..good()
        },
        VirtioBlkConfig {
            num_queues: 2000,
            ..good()
        },
        VirtioBlkConfig {
            queue_size: 0,
            ..good()
        },
        VirtioBlkConfig {
            queue_size: 100,
            ..good()
        },
        VirtioBlkConfig {
            serial: "x".repeat(21),
            ..good()
        },
        VirtioBlkConfig {
            max_discard_segments: 0,
            ..good()
        },
    ];
    for config in bad {
        let disk = MockDisk::new(MockDiskConfig::default());
        assert!(matches!(
            VirtioBlk::new(Box::new(disk), config),
            Err(Error::Config(_))
        ));
    }
}

#[test]
fn state_survives_a_save_and_a_restore() {
    let mut guest = Guest::new();
    guest.device.write_config(32, &[0]);
    guest.fill(common::DATA, 512, 7);
    guest.driver.write(1, &[(GuestAddress(common::DATA), 512)]);
    assert_eq!(guest.one().status, common::OK);
    guest.worker.drain().unwrap();
    let state = guest.device.save(vec![guest.worker.queue_state()]);
    let json = serde_json::to_string(&state).unwrap();

    // Another device over the same disk, the same guest memory and driver.
    let saved: VirtioBlkState = serde_json::from_str(&json).unwrap();
    assert_eq!(saved, state);
    let device =
        VirtioBlk::new(Box::new(guest.disk.clone()), guest.device.config().clone()).unwrap();
    let queues = device.restore(&saved).unwrap();
    assert!(!device.write_back());
    assert_eq!(device.acked_features(), guest.device.acked_features());
    guest.worker = device
        .queue_worker(
            0,
            &queues[0],
            Arc::clone(&guest.memory),
            guest.interrupt.clone(),
        )
        .unwrap();
    guest
        .driver
        .read(1, &[(GuestAddress(common::DATA + 4096), 512)]);
    assert_eq!(guest.one().status, common::OK);
    assert_eq!(guest.bytes(common::DATA + 4096, 512), vec![7; 512]);
    assert_eq!(guest.worker.queue_state().next_used, 2);
}

#[test]
fn hostile_states_are_refused_and_change_nothing() {
    let guest = Guest::new();
    let good = guest.device.save(vec![guest.worker.queue_state()]);
    let queue = |change: fn(&mut QueueSnapshot)| {
        let mut state = good.clone();
        change(&mut state.queues[0]);
        state
    };
    let mut version = good.clone();
    version.version = 99;
    let mut features = good.clone();
    features.acked_features |= 1 << 17;
    let mut many = good.clone();
    many.queues.push(many.queues[0].clone());
    let bad = [
        version,
        features,
        many,
        queue(|queue| queue.size = 0),
        queue(|queue| queue.size = 3),
        queue(|queue| queue.max_size = 0),
        queue(|queue| queue.desc_table = 1),
        queue(|queue| queue.used_ring = 2),
    ];
    let (_, fresh) = plain();
    for state in bad {
        assert!(matches!(fresh.restore(&state), Err(Error::State(_))));
        assert_eq!(fresh.acked_features(), 0);
    }
    assert_eq!(fresh.restore(&good).unwrap().len(), 1);
}

#[test]
fn a_queue_that_does_not_exist_or_is_not_ready_gives_an_error() {
    let setup = Setup::default();
    let guest = Guest::with(setup);
    let line: Arc<dyn virtio_devices::Interrupt> = guest.interrupt.clone();
    let missing = guest.device.queue_worker(
        1,
        &guest.driver.queue(),
        Arc::clone(&guest.memory),
        line.clone(),
    );
    assert!(matches!(missing, Err(Error::NoSuchQueue { .. })));
    let mut queue = guest.driver.queue();
    virtio_queue::QueueT::set_ready(&mut queue, false);
    let unready = guest
        .device
        .queue_worker(0, &queue, Arc::clone(&guest.memory), line);
    assert!(matches!(unready, Err(Error::Queue { .. })));
}
