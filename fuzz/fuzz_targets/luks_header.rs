//! A LUKS volume of any bytes: its header parses or is refused, and one that parses is written back
//! as it was; the volume opens without its key, and with one where that takes no time.
#![no_main]

use std::sync::Arc;

use block::{
    DiskFile, Format, OpenOptions,
    crypto::{Secret, luks::LuksHeader},
    io::sim::{SimConfig, SimHost},
};
use libfuzzer_sys::fuzz_target;

/// Rounds of key derivation that are done here.
const MOST_ROUNDS: u32 = 8;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = LuksHeader::parse(bytes) else {
        return;
    };
    let written = header.to_bytes();
    let same = written.len().min(bytes.len());
    assert_eq!(written[..same], bytes[..same]);
    let host = SimHost::new(SimConfig::seeded(1));
    host.create("volume", bytes);
    let options = OpenOptions::new().format(Format::Luks);
    let locked = options.clone().locked(true);
    if let Ok(disk) = locked.open_on("volume", Arc::new(host.clone())) {
        let _ = disk.info();
    }
    let rounds = header.slots.iter().map(|slot| slot.iterations);
    if rounds.chain([header.master_key_iterations]).max() <= Some(MOST_ROUNDS) {
        let _ = options
            .key(Secret::new(b"key".to_vec()))
            .open_on("volume", Arc::new(host));
    }
});
