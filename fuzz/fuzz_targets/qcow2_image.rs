//! An image of any bytes is opened, read, written, flushed and closed, in memory.
#![no_main]

use std::sync::Arc;

use block::{
    DiskFile, Format, OpenOptions,
    io::sim::{SimConfig, SimHost},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let host = SimHost::new(SimConfig::seeded(1));
    host.create("image", bytes);
    let options = OpenOptions::new()
        .format(Format::Qcow2)
        .metadata_cache_size(64 << 10);
    let Ok(disk) = options.open_on("image", Arc::new(host)) else {
        return;
    };
    let mut buffer = vec![0; 64 << 10];
    let len = disk.size().min(buffer.len() as u64);
    let last = disk.size() - len;
    for offset in [0, last / 2, last] {
        let bytes = &mut buffer[..len as usize];
        let _ = disk.read_at(bytes, offset);
        let _ = disk.write_at(bytes, offset);
        let _ = disk.discard(offset, len);
        let _ = disk.write_zeroes(offset, len, false);
    }
    let _ = disk.flush();
    let _ = disk.close();
});
