//! Names that nobody configured: unique, and the same at every start.

use block::AsyncDiskFile;

/// What a disk is recognised by from start to start: its path, absolute if the host can tell.
pub(crate) fn seed(disk: &dyn AsyncDiskFile) -> String {
    let path = disk.path();
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_path_buf())
        .to_string_lossy()
        .into_owned()
}

/// A hash that will be the same for ever.
pub(crate) fn fnv(text: &str, salt: u8) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for byte in std::iter::once(salt).chain(text.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    // The last bytes would otherwise barely reach the top.
    hash ^= hash >> 29;
    hash.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ hash >> 32
}
