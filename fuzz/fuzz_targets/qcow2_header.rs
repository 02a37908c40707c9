//! A header of any bytes parses or is refused; one that parses is written back as it was.
#![no_main]

use block::formats::qcow2::header::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes)
        && let Ok(written) = header.to_bytes()
    {
        let same = written.len().min(bytes.len());
        assert_eq!(written[..same], bytes[..same]);
    }
});
