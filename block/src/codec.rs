//! Compression of clusters: deflate behind a small trait with two implementations, and Zstandard.

use std::cell::RefCell;

use crate::{Error, ErrorKind, Result};

/// Something that inflates a raw deflate stream (RFC 1951).
pub trait Inflate: Send + Sync {
    /// Its name.
    fn name(&self) -> &'static str;

    /// Inflates the start of `input` until `output` is full. What follows the stream in `input` is
    /// ignored; a stream that would yield more is good too.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) when the stream is broken or ends before `output` is full.
    fn inflate(&self, input: &[u8], output: &mut [u8]) -> Result<()>;
}

fn broken(codec: &str, why: impl std::fmt::Display) -> Error {
    Error::with_message(
        ErrorKind::Corrupt,
        format!("compressed cluster: {codec} stream {why}"),
    )
}

/// Inflate by zlib-rs.
#[derive(Clone, Copy, Debug, Default)]
pub struct ZlibRs;

/// Bits of the deflate window that QEMU writes and expects: 4 KiB, as raw deflate.
const WINDOW_BITS: u8 = 12;

impl Inflate for ZlibRs {
    fn name(&self) -> &'static str {
        "zlib-rs"
    }

    fn inflate(&self, input: &[u8], output: &mut [u8]) -> Result<()> {
        // The window decides what a streaming decoder keeps; one call into one buffer sees all of
        // the output, and other writers use larger windows.
        let mut state = zlib_rs::Inflate::new(false, 15);
        let status = state
            .decompress(input, output, zlib_rs::InflateFlush::Finish)
            .map_err(|error| broken("deflate", format_args!("is invalid: {error:?}")))?;
        if state.total_out() == output.len() as u64 && status != zlib_rs::Status::Ok {
            return Ok(());
        }
        Err(broken("deflate", "ends before the cluster is full"))
    }
}

/// Inflate by miniz_oxide, which has no unsafe code.
#[derive(Clone, Copy, Debug, Default)]
pub struct MinizOxide;

impl Inflate for MinizOxide {
    fn name(&self) -> &'static str {
        "miniz_oxide"
    }

    fn inflate(&self, input: &[u8], output: &mut [u8]) -> Result<()> {
        use miniz_oxide::inflate::{
            TINFLStatus,
            core::{DecompressorOxide, decompress, inflate_flags},
        };
        let mut state = DecompressorOxide::new();
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, written) = decompress(&mut state, input, output, 0, flags);
        match status {
            TINFLStatus::Done | TINFLStatus::HasMoreOutput if written == output.len() => Ok(()),
            TINFLStatus::Done | TINFLStatus::NeedsMoreInput => {
                Err(broken("deflate", "ends before the cluster is full"))
            }
            status => Err(broken("deflate", format_args!("is invalid: {status:?}"))),
        }
    }
}

/// The inflater that images use: zlib-rs, 1.5 times as fast as miniz_oxide.
pub const DEFAULT_INFLATE: &dyn Inflate = &ZlibRs;

thread_local! {
    /// One context a worker: setting one up costs about as much as a twentieth of a cluster.
    static ZSTD: RefCell<Option<zstd::zstd_safe::DCtx<'static>>> = const { RefCell::new(None) };
}

/// Decompresses the Zstandard frame at the start of `input` until `output` is full.
///
/// # Errors
/// [`Corrupt`](ErrorKind::Corrupt) when the frame is broken or ends before `output` is full.
pub fn zstd_decompress(input: &[u8], output: &mut [u8]) -> Result<()> {
    use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, ResetDirective};
    ZSTD.with_borrow_mut(|context| {
        let context = context.get_or_insert_with(DCtx::create);
        let invalid = |code| {
            broken(
                "zstd",
                format_args!("is invalid: {}", zstd::zstd_safe::get_error_name(code)),
            )
        };
        context
            .reset(ResetDirective::SessionOnly)
            .map_err(invalid)?;
        let mut input = InBuffer::around(input);
        let mut output = OutBuffer::around(output);
        // The input is padded to a sector, so the end of the frame is found by decoding.
        loop {
            let (read, written) = (input.pos(), output.pos());
            let hint = context
                .decompress_stream(&mut output, &mut input)
                .map_err(invalid)?;
            if output.pos() == output.capacity() {
                return Ok(());
            }
            let stuck = input.pos() == read && output.pos() == written;
            if hint == 0 || stuck {
                return Err(broken("zstd", "ends before the cluster is full"));
            }
        }
    })
}

/// The level: the first of this library that looks for matches of three bytes, as zlib does at its
/// default. Those below are faster, and up to 3 % larger.
const LEVEL: i32 = 9;

/// Compresses with raw deflate and the window that QEMU uses. `None` when the result is not smaller
/// than `limit` bytes.
#[must_use]
pub fn deflate(input: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; limit];
    let mut state = zlib_rs::Deflate::new(LEVEL, false, WINDOW_BITS);
    let status = state.compress(input, &mut output, zlib_rs::DeflateFlush::Finish);
    match status {
        Ok(zlib_rs::Status::StreamEnd) => {
            output.truncate(usize::try_from(state.total_out()).ok()?);
            Some(output)
        }
        _ => None,
    }
}

/// Compresses with Zstandard at its default level. `None` when the result is not smaller than
/// `limit` bytes.
#[must_use]
pub fn zstd_compress(input: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; limit];
    let written = zstd::bulk::compress_to_buffer(input, &mut output, 0).ok()?;
    output.truncate(written);
    Some(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        (0..65536u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .take(65536)
            .collect()
    }

    fn padded(mut stream: Vec<u8>) -> Vec<u8> {
        stream.extend([0xee; 400]);
        stream
    }

    const INFLATERS: [&dyn Inflate; 2] = [&ZlibRs, &MinizOxide];

    #[test]
    fn both_inflaters_read_what_deflate_writes() {
        let data = sample();
        let stream = padded(deflate(&data, data.len()).unwrap());
        for inflater in INFLATERS {
            let mut out = vec![0; data.len()];
            inflater.inflate(&stream, &mut out).unwrap();
            assert_eq!(out, data, "{}", inflater.name());
            // A stream with more in it than the cluster is good.
            let mut half = vec![0; data.len() / 2];
            inflater.inflate(&stream, &mut half).unwrap();
            assert_eq!(half, data[..half.len()], "{}", inflater.name());
        }
    }

    #[test]
    fn both_inflaters_refuse_broken_streams() {
        let data = sample();
        let stream = deflate(&data, data.len()).unwrap();
        for inflater in INFLATERS {
            let mut out = vec![0; data.len()];
            let cut = inflater.inflate(&stream[..stream.len() / 2], &mut out);
            assert_eq!(
                cut.unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{}",
                inflater.name()
            );
            let garbage = inflater.inflate(&[0xff; 512], &mut out);
            assert!(garbage.is_err(), "{}", inflater.name());
            let mut longer = vec![0; data.len() + 1];
            assert!(
                inflater.inflate(&stream, &mut longer).is_err(),
                "{}",
                inflater.name()
            );
        }
    }

    #[test]
    fn zstd_finds_the_end_of_a_padded_frame() {
        let data = sample();
        let stream = zstd_compress(&data, data.len()).unwrap();
        let mut out = vec![0; data.len()];
        zstd_decompress(&padded(stream.clone()), &mut out).unwrap();
        assert_eq!(out, data);
        assert!(zstd_decompress(&stream[..stream.len() / 2], &mut out).is_err());
        assert!(zstd_decompress(&[0; 64], &mut out).is_err());
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        let mut seed = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 56) as u8
        })
        .take(4096)
        .collect();
        assert!(deflate(&noise, 4096).is_none());
        assert!(zstd_compress(&noise, 4096).is_none());
    }
}
