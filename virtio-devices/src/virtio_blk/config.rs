//! Features and configuration space.

use block::{AsyncDiskFile, DiskTopology};
use virtio_bindings::bindings::{virtio_blk as spec, virtio_config, virtio_ring};

use super::VirtioBlkConfig;

/// Bytes of a sector, the unit of every request.
pub const SECTOR: u64 = 512;

/// Bytes of the configuration space, the zoned fields (always 0) included.
pub const CONFIG_SPACE: usize = 96;

/// The offset of the `writeback` field in the configuration space.
pub const WRITEBACK_OFFSET: usize = 32;

/// The largest segment that a driver may send, in bytes. Nothing is allocated for it.
pub(crate) const SIZE_MAX: u32 = 1 << 30;

/// Feature bits by name, as masks.
pub mod feature {
    use super::{spec, virtio_config, virtio_ring};

    /// The device follows the specification, version 1.0 or later.
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    /// Chains may be in indirect tables.
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Doorbells and interrupts are suppressed by index.
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << spec::VIRTIO_BLK_F_SIZE_MAX;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << spec::VIRTIO_BLK_F_SEG_MAX;
    /// The disk is read-only.
    pub const RO: u64 = 1 << spec::VIRTIO_BLK_F_RO;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << spec::VIRTIO_BLK_F_BLK_SIZE;
    /// Flush requests are understood.
    pub const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << spec::VIRTIO_BLK_F_TOPOLOGY;
    /// The driver may switch between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << spec::VIRTIO_BLK_F_CONFIG_WCE;
    /// There is more than one queue.
    pub const MQ: u64 = 1 << spec::VIRTIO_BLK_F_MQ;
    /// Discard requests are understood.
    pub const DISCARD: u64 = 1 << spec::VIRTIO_BLK_F_DISCARD;
    /// Write zeroes requests are understood.
    pub const WRITE_ZEROES: u64 = 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES;
    /// Secure erase requests are understood.
    pub const SECURE_ERASE: u64 = 1 << spec::VIRTIO_BLK_F_SECURE_ERASE;
}

/// What the device offers for this disk.
pub(crate) fn offered(disk: &dyn AsyncDiskFile, config: &VirtioBlkConfig) -> u64 {
    let capabilities = disk.capabilities();
    let writable = capabilities.writable && !config.read_only;
    let mut features = feature::VERSION_1
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::FLUSH
        | feature::CONFIG_WCE;
    if config.num_queues > 1 {
        features |= feature::MQ;
    }
    if !writable {
        features |= feature::RO;
        return features;
    }
    if config.write_zeroes {
        features |= feature::WRITE_ZEROES;
    }
    if config.discard && capabilities.discard {
        features |= feature::DISCARD;
        if capabilities.secure_erase {
            features |= feature::SECURE_ERASE;
        }
    }
    features
}

/// The most segments of one request: what fits the queue beside header and status.
pub(crate) fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size).saturating_sub(2).max(1)
}

/// Everything in the configuration space that stays: all but capacity and writeback.
pub(crate) fn static_space(
    features: u64,
    topology: DiskTopology,
    discard_granularity: u32,
    config: &VirtioBlkConfig,
) -> [u8; CONFIG_SPACE] {
    let mut space = [0; CONFIG_SPACE];
    let mut put = |offset: usize, bytes: &[u8]| {
        space[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    let logical = topology.logical_block_size.max(512);
    let blocks = |bytes: u32| bytes / logical;
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &seg_max(config.queue_size).to_le_bytes());
    put(20, &logical.to_le_bytes());
    let exponent = (topology.physical_block_size / logical)
        .max(1)
        .trailing_zeros();
    put(24, &[exponent as u8, 0]);
    let minimum = u16::try_from(blocks(topology.minimum_io_size)).unwrap_or(0);
    put(26, &minimum.to_le_bytes());
    put(28, &blocks(topology.optimal_io_size).to_le_bytes());
    if features & feature::MQ != 0 {
        put(34, &config.num_queues.to_le_bytes());
    }
    let alignment = (discard_granularity / SECTOR as u32).max(logical / SECTOR as u32);
    if features & feature::DISCARD != 0 {
        put(36, &config.max_discard_sectors.to_le_bytes());
        put(40, &config.max_discard_segments.to_le_bytes());
        put(44, &alignment.to_le_bytes());
    }
    if features & feature::WRITE_ZEROES != 0 {
        put(48, &config.max_discard_sectors.to_le_bytes());
        put(52, &config.max_discard_segments.to_le_bytes());
        put(56, &[u8::from(features & feature::DISCARD != 0)]);
    }
    if features & feature::SECURE_ERASE != 0 {
        put(60, &config.max_discard_sectors.to_le_bytes());
        put(64, &config.max_discard_segments.to_le_bytes());
        put(68, &alignment.to_le_bytes());
    }
    space
}
