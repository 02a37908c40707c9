//! `platter dd`: copies a part of a disk into a new image.

use block::{Format, io::EngineKind};
use clap::Args;

use crate::{
    image::{
        create::{self, CreateRequest},
        open::{self, OpenHow, ShareArgs},
        spec::ImageSpec,
    },
    util::{
        bytes,
        failure::{Failure, Outcome},
        keyval::KeyVals,
        persona::Persona,
        size,
    },
};

/// Copy a part of a disk into a new image
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  The first mebibyte of a disk, as raw:
    platter dd if=disk.qcow2 of=start.raw bs=1M count=1

  A qcow2 image of everything but the first two blocks:
    platter dd -O qcow2 if=disk.raw of=rest.qcow2 bs=64k skip=2")]
pub(crate) struct DdArgs {
    /// The format of the source; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The format of the target; raw if not given
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// The engine: sync, io_uring or linux-aio
    #[arg(long, value_name = "ENGINE", value_parser = crate::util::persona::engine)]
    engine: Option<EngineKind>,
    #[command(flatten)]
    share: ShareArgs,
    /// if=FILE of=FILE [bs=SIZE] [count=BLOCKS] [skip=BLOCKS]
    #[arg(value_name = "OPERAND=VALUE")]
    operands: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &DdArgs, persona: Persona) -> Outcome {
    let mut values = KeyVals::default();
    for operand in &args.operands {
        let (key, value) = operand
            .split_once('=')
            .ok_or_else(|| Failure::new(format!("unrecognized operand {operand}")))?;
        if !["if", "of", "bs", "count", "skip"].contains(&key) {
            return Err(Failure::new(format!("unrecognized operand {key}")));
        }
        values.push(key, value);
    }
    let mut number = |key: &str| -> Outcome<Option<u64>> {
        let read = |text: String| {
            size::parse(&text)
                .map_err(|_| Failure::new(format!("Invalid {key} specified: '{text}'.")))
        };
        values.take(key).map(read).transpose()
    };
    let (bs, count, skip) = (
        number("bs")?.unwrap_or(512),
        number("count")?,
        number("skip")?,
    );
    if !(1..=i32::MAX as u64).contains(&bs) {
        return Err(Failure::new(
            "Invalid bs specified. Must be between 1 and 2147483647.",
        ));
    }
    let (Some(input), Some(output)) = (values.take("if"), values.take("of")) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let target_format = Format::from_name(&args.target_format)
        .ok_or_else(|| Failure::new(format!("Unknown file format '{}'", args.target_format)))?;
    let how = OpenHow {
        force_share: args.share.force_share,
        engine: args.engine,
        ..OpenHow::reading()
    };
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(&input, args.share.image_opts, format, persona)?;
    let source = open::open(&spec, &how, persona)?;
    let start = skip.unwrap_or(0).saturating_mul(bs);
    let end = match count {
        Some(count) => start.saturating_add(count.saturating_mul(bs)),
        None => u64::MAX,
    }
    .min(source.size());
    let len = end.saturating_sub(start);
    let path = ImageSpec::parse(&output, false, None, persona)?.path;
    let new = path.symlink_metadata().is_err();
    let request = CreateRequest {
        path: path.clone(),
        name: output.clone(),
        format: target_format,
        options: KeyVals::default(),
        size: Some(len),
        unchecked_backing: false,
    };
    let named = |failure: Failure| failure.context(&output);
    create::plan(request, persona)
        .and_then(create::Plan::execute)
        .map_err(named)?;
    let copy = || -> Outcome<()> {
        let how = OpenHow {
            engine: args.engine,
            ..OpenHow::default()
        };
        let spec = ImageSpec::plain(&path, Some(target_format));
        let target = open::open(&spec, &how, persona)?;
        let failed = |error: block::Error| Failure::new(error.to_string());
        let mut buf = vec![0; bs.clamp(64 << 10, 16 << 20) as usize];
        let mut at = start;
        while at < end {
            let now = (end - at).min(buf.len() as u64);
            let buf = &mut buf[..now as usize];
            source.read_at(buf, at).map_err(failed)?;
            if !bytes::is_zero(buf) {
                target.write_at(buf, at - start).map_err(failed)?;
            }
            at += now;
        }
        target.close().map_err(failed)
    };
    let result = copy();
    if result.is_err() && new {
        // What failed matters, not that its remains could not be removed.
        let _ = std::fs::remove_file(&path);
    }
    result.map(|()| 0)
}
