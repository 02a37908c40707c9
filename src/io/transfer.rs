//! Commands of the io language that move or drop bytes.

use std::time::Instant;

use block::{
    ErrorKind,
    io::{AlignedBuf, Buffers, RequestOp},
};

use crate::{
    image::vmstate,
    io::{
        Said,
        lang::{self, Command, Parsed},
        queue::{Opened, Pending},
        report::{self, Style},
    },
    say,
    util::{bytes, errno},
};

/// What a read finds where nothing was read.
const UNREAD: u8 = 0xab;
/// What a write writes unless told.
const DEFAULT_PATTERN: u8 = 0xcd;
/// The unit of compressed and VM state requests.
const SECTOR: u64 = 512;

fn style(args: &Parsed) -> Style {
    Style {
        machine: args.has('C'),
        quiet: args.has('q'),
        dump: args.has('v'),
    }
}

fn pattern(args: &Parsed) -> Result<Option<u8>, Said> {
    let value = args.value('P').map(lang::pattern);
    value.transpose().map_err(Said::Text)
}

/// Offset and length, which are all the operands there are.
fn range(command: &'static Command, args: &Parsed) -> Result<(u64, u64), Said> {
    let [offset, len] = args.operands.as_slice() else {
        return Err(Said::Usage(command));
    };
    let offset = lang::number(offset).map_err(Said::Text)?;
    Ok((offset, lang::length(len).map_err(Said::Text)?))
}

/// Offset and the sum of one or more lengths.
fn vector(command: &'static Command, args: &Parsed) -> Result<(u64, u64), Said> {
    let [offset, lens @ ..] = args.operands.as_slice() else {
        return Err(Said::Usage(command));
    };
    if lens.is_empty() {
        return Err(Said::Usage(command));
    }
    let offset = lang::number(offset).map_err(Said::Text)?;
    let mut total = 0u64;
    for len in lens {
        total += lang::length(len).map_err(Said::Text)?;
        if total > lang::MAX_REQUEST {
            return Err(Said::Text(format!(
                "length cannot exceed {}, given {total}",
                lang::MAX_REQUEST
            )));
        }
    }
    Ok((offset, total))
}

fn sector_aligned(offset: u64, len: u64) -> Result<(), Said> {
    for (value, what) in [(offset, "offset"), (len, "count")] {
        if !value.is_multiple_of(SECTOR) {
            return Err(Said::Text(format!(
                "{value} is not a sector-aligned value for '{what}'"
            )));
        }
    }
    Ok(())
}

/// Which bytes of what was read are compared with the pattern.
fn checked_part(command: &'static Command, args: &Parsed, len: u64) -> Result<(u64, u64), Said> {
    let start = args.value('s').map(lang::number).transpose();
    let start = start.map_err(Said::Text)?;
    let count = args.value('l').map(lang::number).transpose();
    let count = count.map_err(Said::Text)?;
    if !args.has('P') && (start.is_some() || count.is_some()) {
        return Err(Said::Usage(command));
    }
    let start = start.unwrap_or(0);
    let rest = len.checked_sub(start);
    let count = count.or(rest).unwrap_or(0);
    if rest.is_none_or(|rest| count > rest) {
        return Err(Said::Text(
            "pattern verification range exceeds end of read data".into(),
        ));
    }
    Ok((start, count))
}

/// `read` and `readv`.
pub(super) fn read(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
    vectored: bool,
) -> Result<(), Said> {
    let style = style(args);
    let expected = pattern(args)?;
    let (offset, len) = if vectored {
        vector(command, args)?
    } else {
        range(command, args)?
    };
    let part = checked_part(command, args, len)?;
    let vm_state = args.has('b');
    if vm_state {
        sector_aligned(offset, len)?;
    }
    let mut buf = AlignedBuf::zeroed(len as usize);
    buf.fill(UNREAD);
    let started = Instant::now();
    let (result, buf) = if vm_state {
        opened.drain();
        let result = vmstate::read(&*opened.disk, &mut buf, offset);
        (result.map_err(|error| error.kind()), Some(buf))
    } else if len == 0 {
        (Ok(()), Some(buf))
    } else {
        let buffers = Buffers::owned(buf);
        opened.perform(RequestOp::Read { offset, buffers })
    };
    let time = started.elapsed();
    if let Err(kind) = result {
        return Err(Said::Text(format!(
            "{} failed: {}",
            command.name,
            errno::request_text(kind)
        )));
    }
    let data: &[u8] = buf.as_deref().unwrap_or_default();
    let mut wrong = false;
    if let Some(expected) = expected {
        let (start, count) = (part.0 as usize, part.1 as usize);
        let checked = data.get(start..start + count).unwrap_or_default();
        if checked.len() != count || !bytes::all_equal(checked, expected) {
            say!(
                "Pattern verification failed at offset {}, {count} bytes",
                offset + part.0
            );
            wrong = true;
        }
    }
    if !style.quiet {
        if style.dump {
            say!("{}", report::dump(data, offset).trim_end_matches('\n'));
        }
        say!(
            "{}",
            report::lines("read", style, offset, len, len, 1, time)
        );
    }
    if wrong { Err(Said::Already) } else { Ok(()) }
}

/// `write` and `writev`.
pub(super) fn write(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
    vectored: bool,
) -> Result<(), Said> {
    let style = style(args);
    let (zero, compressed, vm_state) = (args.has('z'), args.has('c'), args.has('b'));
    let fua = args.has('f');
    let refuse = |text: &str| Err(Said::Text(text.to_owned()));
    if vm_state && zero {
        return refuse("-b and -z cannot be specified at the same time");
    }
    if fua && (vm_state || compressed) {
        return refuse("-f and -b or -c cannot be specified at the same time");
    }
    if args.has('n') && !zero {
        return refuse("-n requires -z to be specified");
    }
    if args.has('u') && !zero {
        return refuse("-u requires -z to be specified");
    }
    if [zero, args.has('P'), args.has('s')]
        .iter()
        .filter(|x| **x)
        .count()
        > 1
    {
        return refuse("Only one of -z, -P, and -s can be specified at the same time");
    }
    let fill = pattern(args)?;
    let (offset, len) = if vectored {
        vector(command, args)?
    } else {
        range(command, args)?
    };
    if vm_state || compressed {
        sector_aligned(offset, len)?;
    }
    let data = match (zero, args.value('s')) {
        (true, _) => AlignedBuf::zeroed(0),
        (false, Some(file)) => from_file(file, len)?,
        (false, None) => {
            let mut buf = AlignedBuf::zeroed(len as usize);
            buf.fill(fill.unwrap_or(DEFAULT_PATTERN));
            buf
        }
    };
    let started = Instant::now();
    let result = if vm_state {
        opened.drain();
        vmstate::write(&*opened.disk, &data, offset).map_err(|error| error.kind())
    } else if compressed {
        opened.drain();
        write_compressed(opened, &data, offset)
    } else if len == 0 {
        Ok(())
    } else if zero {
        if args.has('n') && !opened.disk.capabilities().write_zeroes {
            Err(ErrorKind::Unsupported)
        } else {
            write_zeroes(opened, offset, len, args.has('u'), fua)
        }
    } else {
        let buffers = Buffers::owned(data);
        let op = RequestOp::Write {
            offset,
            buffers,
            fua,
        };
        opened.perform(op).0
    };
    let time = started.elapsed();
    if let Err(kind) = result {
        return Err(Said::Text(format!(
            "{} failed: {}",
            command.name,
            errno::request_text(kind)
        )));
    }
    if !style.quiet {
        say!(
            "{}",
            report::lines("wrote", style, offset, len, len, 1, time)
        );
    }
    Ok(())
}

fn write_zeroes(
    opened: &mut Opened,
    offset: u64,
    len: u64,
    may_unmap: bool,
    fua: bool,
) -> Result<(), ErrorKind> {
    let op = RequestOp::WriteZeroes {
        offset,
        len,
        may_unmap,
    };
    opened.perform(op).0?;
    if fua {
        opened.perform(RequestOp::Flush).0?;
    }
    Ok(())
}

fn write_compressed(opened: &Opened, data: &[u8], offset: u64) -> Result<(), ErrorKind> {
    let cluster = opened.disk.info().cluster_size.unwrap_or(u64::MAX) as usize;
    let mut at = offset;
    for piece in data.chunks(cluster) {
        let result = opened.disk.write_compressed(piece, at);
        result.map_err(|error| error.kind())?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Bytes from a file, again and again until there are enough.
fn from_file(path: &str, len: u64) -> Result<AlignedBuf, Said> {
    let content = std::fs::read(path)
        .map_err(|error| Said::Complaint(format!("{path}: {}", errno::io_text(&error))))?;
    if content.is_empty() {
        return Err(Said::Complaint(format!("{path}: file is empty")));
    }
    let mut buf = AlignedBuf::zeroed(len as usize);
    for piece in buf.chunks_mut(content.len()) {
        piece.copy_from_slice(&content[..piece.len()]);
    }
    Ok(buf)
}

/// `discard`.
pub(super) fn discard(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    let (offset, len) = range(command, args)?;
    let started = Instant::now();
    let result = match len {
        0 => Ok(()),
        len => opened.perform(RequestOp::Discard { offset, len }).0,
    };
    let time = started.elapsed();
    if let Err(kind) = result {
        let text = errno::request_text(kind);
        return Err(Said::Text(format!("discard failed: {text}")));
    }
    let style = style(args);
    if !style.quiet {
        say!(
            "{}",
            report::lines("discard", style, offset, len, len, 1, time)
        );
    }
    Ok(())
}

/// `aio_discard`.
pub(super) fn aio_discard(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    let (offset, len) = range(command, args)?;
    let pending = Pending {
        name: "aio_discard",
        verb: "discarded ",
        style: Style {
            dump: false,
            ..style(args)
        },
        offset,
        len,
        pattern: None,
        started: Instant::now(),
    };
    opened.start(RequestOp::Discard { offset, len }, pending);
    Ok(())
}

/// `aio_read`.
pub(super) fn aio_read(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    refuse_invalid(args)?;
    let expected = pattern(args)?;
    let (offset, len) = vector(command, args)?;
    let mut buf = AlignedBuf::zeroed(len as usize);
    buf.fill(UNREAD);
    let pending = Pending {
        name: "readv",
        verb: "read",
        style: style(args),
        offset,
        len,
        pattern: expected,
        started: Instant::now(),
    };
    let buffers = Buffers::owned(buf);
    opened.start(RequestOp::Read { offset, buffers }, pending);
    Ok(())
}

/// `aio_write`.
pub(super) fn aio_write(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    refuse_invalid(args)?;
    let fill = pattern(args)?;
    let (offset, len) = vector(command, args)?;
    let zero = args.has('z');
    let refuse = |text: &str| Err(Said::Text(text.to_owned()));
    if zero && args.operands.len() != 2 {
        return refuse("-z supports only a single length parameter");
    }
    if args.has('u') && !zero {
        return refuse("-u requires -z to be specified");
    }
    if zero && fill.is_some() {
        return refuse("-z and -P cannot be specified at the same time");
    }
    let pending = Pending {
        name: if zero { "aio_write" } else { "writev" },
        verb: "wrote",
        style: Style {
            dump: false,
            ..style(args)
        },
        offset,
        len,
        pattern: None,
        started: Instant::now(),
    };
    let op = if zero {
        RequestOp::WriteZeroes {
            offset,
            len,
            may_unmap: args.has('u'),
        }
    } else {
        let mut buf = AlignedBuf::zeroed(len as usize);
        buf.fill(fill.unwrap_or(DEFAULT_PATTERN));
        RequestOp::Write {
            offset,
            buffers: Buffers::owned(buf),
            fua: args.has('f'),
        }
    };
    opened.start(op, pending);
    Ok(())
}

/// `-i` exists to be counted by a device's statistics, which there are none of here.
fn refuse_invalid(args: &Parsed) -> Result<(), Said> {
    if args.has('i') {
        return Err(Said::Text(
            "-i is not supported: there are no device statistics".into(),
        ));
    }
    Ok(())
}
