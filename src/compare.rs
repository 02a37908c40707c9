//! `platter compare`: do two images hold the same disk?

use block::DiskFile;
use clap::Args;

use crate::{
    image::{
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
    },
    say,
    util::{
        bytes, errno,
        failure::{Failure, Outcome},
        persona::Persona,
        progress::Progress,
    },
};

/// Bytes compared at a time.
const CHUNK: u64 = 1 << 20;

/// Compare the contents of two images
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Is the copy good? Formats may differ:
    platter compare disk.qcow2 copy.raw

  Sizes and allocation must be the same, too:
    platter compare -s a.qcow2 b.qcow2

Images of different sizes are equal if the rest of the larger one reads as zeroes, unless -s is given.

EXIT STATUS
  0  equal
  1  different
  2  an image could not be opened
  3  reading the allocation failed
  4  reading failed")]
pub(crate) struct CompareArgs {
    /// The format of the first image; detected otherwise
    #[arg(short, long = "a-format", value_name = "FMT")]
    format: Option<String>,
    /// The format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<String>,
    /// Cache mode for both
    #[arg(
        short = 'T',
        long = "cache",
        value_name = "MODE",
        default_value = "writeback"
    )]
    cache: String,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Sizes and allocation must be equal, too
    #[arg(short, long)]
    strict: bool,
    #[command(flatten)]
    share: ShareArgs,
    /// The two images
    #[arg(value_name = "FILE1 FILE2")]
    files: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &CompareArgs, persona: Persona) -> Outcome {
    let [first_name, second_name] = args.files.as_slice() else {
        return Err(Failure::usage("compare", "Expecting two image file names"));
    };
    let how = OpenHow {
        force_share: args.share.force_share,
        cache: open::cache_mode(&args.cache)?,
        ..OpenHow::reading()
    };
    let open = |name: &str, format: Option<&str>| {
        ImageSpec::parse(name, args.share.image_opts, format, persona)
            .and_then(|spec| open::open(&spec, &how, persona))
            .map_err(|failure| failure.status(2))
    };
    let first = open(first_name, args.format.as_deref())?;
    let second = open(second_name, args.second_format.as_deref())?;
    let tell = |text: &str| {
        if !args.quiet {
            say!("{text}");
        }
    };
    let (a, b) = (first.size(), second.size());
    if args.strict && a != b {
        tell("Strict mode: Image size mismatch!");
        return Ok(1);
    }
    let progress = Progress::bytes(args.progress, persona, "comparing", a.max(b));
    let common = a.min(b);
    let disks: [(&dyn DiskFile, &str); 2] = [(&*first, first_name), (&*second, second_name)];
    let found = differs(disks, common, args.strict, &progress)?;
    if let Some(difference) = found {
        tell(&difference);
        return Ok(1);
    }
    if a != b {
        let larger = if a > b { disks[0] } else { disks[1] };
        let found = first_data(larger, common, &progress);
        if let (Err(failure), true) = (&found, persona.is_qemu()) {
            // QEMU's warning comes out last, because of how its standard output is buffered.
            let status = persona.report(failure);
            tell("Warning: Image size mismatch!");
            return Ok(status);
        }
        tell("Warning: Image size mismatch!");
        if let Some(offset) = found? {
            tell(&format!("Content mismatch at offset {offset}!"));
            return Ok(1);
        }
    }
    tell("Images are identical.");
    progress.finish();
    Ok(0)
}

struct Status {
    len: u64,
    /// Reads as zeroes.
    zero: bool,
    /// The image, or one below it, has something there.
    present: bool,
}

fn status(disk: &dyn DiskFile, offset: u64, len: u64) -> Outcome<Status> {
    let status = disk.block_status(offset, len).map_err(|error| {
        Failure::new(format!(
            "Sector allocation test failed at offset {offset}: {}",
            error.message()
        ))
        .status(3)
    })?;
    Ok(Status {
        len: status.len.clamp(1, len),
        zero: status.zero || !status.present,
        present: status.present,
    })
}

fn read(disk: &dyn DiskFile, name: &str, buf: &mut [u8], offset: u64) -> Outcome<()> {
    disk.read_at(buf, offset).map_err(|error| {
        Failure::new(format!(
            "Error while reading offset {offset} of {name}: {}",
            errno::request_text(error.kind())
        ))
        .status(4)
    })
}

/// What to say about the first difference in the first `size` bytes.
fn differs(
    [(first, first_name), (second, second_name)]: [(&dyn DiskFile, &str); 2],
    size: u64,
    strict: bool,
    progress: &Progress,
) -> Outcome<Option<String>> {
    let (mut a, mut b) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut at = 0;
    while at < size {
        let one = status(first, at, size - at)?;
        let two = status(second, at, size - at)?;
        let mut len = one.len.min(two.len);
        if strict && one.present != two.present {
            return Ok(Some(format!(
                "Strict mode: Offset {at} block status mismatch!"
            )));
        }
        if !(one.zero && two.zero) {
            len = len.min(CHUNK);
            let (a, b) = (&mut a[..len as usize], &mut b[..len as usize]);
            for (disk, name, buf, zero) in [
                (first, first_name, &mut *a, one.zero),
                (second, second_name, &mut *b, two.zero),
            ] {
                if zero {
                    buf.fill(0);
                } else {
                    read(disk, name, buf, at)?;
                }
            }
            if a != b {
                let byte = a.iter().zip(b.iter()).position(|(x, y)| x != y);
                let byte = byte.unwrap_or(0) as u64;
                return Ok(Some(mismatch(at + byte)));
            }
        }
        progress.advance(len);
        at += len;
    }
    Ok(None)
}

/// The message names the sector, as QEMU's does.
fn mismatch(offset: u64) -> String {
    format!("Content mismatch at offset {}!", offset / 512 * 512)
}

/// The sector of the first byte from `from` that is not zero.
fn first_data(
    (disk, name): (&dyn DiskFile, &str),
    from: u64,
    progress: &Progress,
) -> Outcome<Option<u64>> {
    let mut buf = vec![0; CHUNK as usize];
    let mut at = from;
    while at < disk.size() {
        let state = status(disk, at, disk.size() - at)?;
        let mut len = state.len;
        if !state.zero {
            len = len.min(CHUNK);
            let buf = &mut buf[..len as usize];
            read(disk, name, buf, at)?;
            if !bytes::is_zero(buf) {
                let byte = buf.iter().position(|byte| *byte != 0).unwrap_or(0) as u64;
                return Ok(Some((at + byte) / 512 * 512));
            }
        }
        progress.advance(len);
        at += len;
    }
    Ok(None)
}
