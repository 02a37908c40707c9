//! Compressed clusters of any bytes: an error or a full cluster, and both inflaters say the same.
#![no_main]

use block::codec::{Inflate, MinizOxide, ZlibRs, zstd_decompress};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut first = vec![0; 4096];
    let mut second = vec![0; 4096];
    let by_zlib = ZlibRs.inflate(bytes, &mut first);
    let by_miniz = MinizOxide.inflate(bytes, &mut second);
    if by_zlib.is_ok() && by_miniz.is_ok() {
        assert_eq!(first, second);
    }
    let _ = zstd_decompress(bytes, &mut first);
});
