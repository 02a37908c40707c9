//! Commands of the io language that look at the image or change its state as a whole.

use std::{process::abort, thread::sleep, time::Duration};

use block::{DiskFile, Format, image::ImageInfo, io::RequestOp};

use crate::{
    image::{
        open::{self, OpenHow},
        qcow2_options::CacheOptions,
        spec::ImageSpec,
    },
    io::{
        Said, Session,
        lang::{self, COMMANDS, Command, Parsed},
        queue::Opened,
    },
    say,
    util::{errno, keyval::KeyVals, size},
};

/// `length`.
pub(super) fn length(opened: &Opened) {
    say!("{}", size::io_human(opened.disk.size() as f64));
}

/// `flush`.
pub(super) fn flush(opened: &mut Opened) -> Result<(), Said> {
    let (result, _) = opened.perform(RequestOp::Flush);
    result.map_err(|kind| Said::Complaint(format!("flush failed: {}", errno::request_text(kind))))
}

/// `truncate`.
pub(super) fn truncate(
    opened: &mut Opened,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    if let Some(mode) = args.value('m').filter(|mode| *mode != "off") {
        return Err(Said::OfProgram(format!(
            "Unsupported preallocation mode '{mode}'"
        )));
    }
    let [size] = args.operands.as_slice() else {
        return Err(Said::Usage(command));
    };
    let size = lang::number(size).map_err(Said::Text)?;
    opened.drain();
    let result = opened.disk.resize(size);
    result.map_err(|error| Said::OfProgram(error.message()))
}

/// A run of the image and whether this image, not one below it, holds it.
fn allocated(disk: &dyn DiskFile, offset: u64, len: u64) -> Result<(u64, bool), Said> {
    let status = disk.block_status(offset, len).map_err(|error| {
        Said::Text(format!(
            "is_allocated failed: {}",
            errno::request_text(error.kind())
        ))
    })?;
    Ok((
        status.len.clamp(1, len),
        status.present && status.depth == 0,
    ))
}

/// `alloc`.
pub(super) fn alloc(opened: &mut Opened, args: &Parsed) -> Result<(), Said> {
    let start = lang::number(&args.operands[0]).map_err(Said::Text)?;
    let wanted = match args.operands.get(1) {
        Some(text) => lang::number(text).map_err(Said::Text)?,
        None => 512,
    };
    opened.drain();
    let end = start.saturating_add(wanted).min(opened.disk.size());
    let wanted = end.saturating_sub(start);
    let (mut at, mut sum) = (start, 0);
    while at < end {
        let (len, here) = allocated(&*opened.disk, at, end - at)?;
        sum += if here { len } else { 0 };
        at += len;
    }
    say!(
        "{sum}/{wanted} bytes allocated at offset {}",
        size::io_human(start as f64)
    );
    Ok(())
}

/// `map`.
pub(super) fn map(opened: &mut Opened) -> Result<(), Said> {
    opened.drain();
    let size = opened.disk.size();
    let mut at = 0;
    while at < size {
        let (mut len, here) = allocated(&*opened.disk, at, size - at)?;
        while at + len < size {
            let (more, same) = allocated(&*opened.disk, at + len, size - at - len)?;
            if same != here {
                break;
            }
            len += more;
        }
        say!(
            "{} ({len:#x}) bytes {} allocated at offset {} ({at:#x})",
            size::io_human(len as f64),
            if here { "   " } else { "not" },
            size::io_human(at as f64)
        );
        at += len;
    }
    Ok(())
}

/// `info`.
pub(super) fn info(opened: &Opened) {
    say!("format name: {}", opened.disk.format());
    let info = opened.disk.info();
    if let Some(cluster) = info.cluster_size {
        say!("cluster size: {}", size::io_human(cluster as f64));
    }
    if let Some(offset) = vm_state_offset(&*opened.disk, &info) {
        say!("vm state offset: {}", size::io_human(offset as f64));
    }
    crate::info::print_specific(&info, 0);
}

/// Where VM state starts behind the disk: as far on as a whole L2 table maps.
fn vm_state_offset(disk: &dyn DiskFile, info: &ImageInfo) -> Option<u64> {
    let cluster = info
        .cluster_size
        .filter(|_| disk.format() == Format::Qcow2)?;
    let extended = info.format_specific.get("extended-l2") == Some(&true.into());
    let mapped = cluster.checked_mul(cluster / if extended { 16 } else { 8 })?;
    disk.size().checked_next_multiple_of(mapped)
}

/// `sleep`.
pub(super) fn pause(args: &Parsed) -> Result<(), Said> {
    let text = &args.operands[0];
    let milliseconds = text
        .parse()
        .map_err(|_| Said::Text(format!("{text} is not a valid number")))?;
    sleep(Duration::from_millis(milliseconds));
    Ok(())
}

/// `sigraise` and `abort`: ends the program without cleaning up, which tests of crashes need.
pub(super) fn raise(args: &Parsed) -> Result<(), Said> {
    let text = &args.operands[0];
    let number: i32 = text
        .parse()
        .map_err(|_| Said::Text(format!("{text} is not a valid signal")))?;
    let Some(signal) = rustix::process::Signal::from_named_raw(number) else {
        return Err(Said::Text(format!("{text} is not a valid signal")));
    };
    let result = rustix::process::kill_process(rustix::process::getpid(), signal);
    result.map_err(|error| Said::Text(error.to_string()))
}

/// `abort`.
pub(super) fn crash() -> ! {
    abort()
}

/// `help`.
pub(super) fn help(args: &Parsed) -> Result<(), Said> {
    let Some(name) = args.operands.first() else {
        for command in COMMANDS {
            say!("{}", command.usage());
        }
        say!("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    let Some(command) = lang::find(name) else {
        return Err(Said::Text(format!("command {name} not found")));
    };
    say!("{}", command.usage());
    let letters = command.options.chars().filter(|c| *c != ':');
    let lines: Vec<_> = letters
        .filter_map(|letter| explained(command, letter))
        .collect();
    if !lines.is_empty() {
        say!("\n{}", lines.join("\n"));
    }
    Ok(())
}

fn explained(command: &Command, letter: char) -> Option<String> {
    let opens = matches!(command.verb, lang::Verb::Open | lang::Verb::Reopen);
    let text = match letter {
        _ if opens => match letter {
            'r' => "read-only",
            'w' => "read-write",
            's' => "write to a temporary overlay, not to the file",
            'n' => "bypass the host's page cache (-t none)",
            'k' => "Linux AIO (-i native)",
            'i' => "AIO mode: threads, native or io_uring",
            't' | 'c' => "cache mode: none, writeback, writethrough, directsync or unsafe",
            'd' => "what happens to discards: unmap or ignore",
            'o' => "options: key=value,...",
            'U' => "take no lock",
            _ => return None,
        },
        'C' => "report in one line, for programs: bytes,ops,time,bytes/sec,ops/sec",
        'q' => "report nothing",
        'v' => "print the data, too",
        'P' => "the byte to write, or to expect",
        'b' => "the VM state instead of the disk",
        'c' => "write compressed clusters",
        'f' => "force unit access: done when durable",
        'l' => "with -P: how many bytes to compare",
        'n' => "with -z: fail rather than write zeroes slowly",
        'p' | 'r' | 'a' => "accepted, without effect",
        's' if command.name == "write" => "a file with the bytes to write",
        's' => "with -P: where to start comparing",
        'u' => "with -z: host space may be given back",
        'z' => "write zeroes without a buffer",
        'm' => "preallocation mode: off",
        _ => return None,
    };
    Some(format!(" -{letter}  {text}"))
}

/// `open`.
pub(super) fn open_image(
    session: &mut Session,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    if session.opened.is_some() {
        return Err(Said::OfProgram(
            "file open already, try 'help close'".into(),
        ));
    }
    let mut how = session.how.clone();
    how.read_only |= args.has('r');
    how.force_share |= args.has('U');
    let fail = |failure: crate::util::failure::Failure| Said::OfProgram(failure.to_string());
    if args.has('n') {
        how.cache = block::CacheMode::None;
    }
    if let Some(mode) = args.value('t') {
        how.cache = open::cache_mode(mode).map_err(fail)?;
    }
    let aio = args.value('i').or(args.has('k').then_some("native"));
    if let Some(name) = aio {
        how.engine = open::engine_of_aio(name)
            .ok_or_else(|| Said::OfProgram(format!("Invalid aio option: {name}")))?;
    }
    if let Some(name) = args.value('d') {
        let policy = open::discard_policy(name);
        let policy =
            policy.ok_or_else(|| Said::OfProgram(format!("Invalid discard option: {name}")))?;
        how.discard = Some(policy);
    }
    if args.has('C') {
        return Err(Said::OfProgram("copy-on-read is not supported".into()));
    }
    let mut options = KeyVals::default();
    args.values('o')
        .for_each(|list| options.extend(KeyVals::parse(list, None)));
    let spec = match args.operands.as_slice() {
        [name] => {
            let (opts, format) = (session.image_opts, session.format.as_deref());
            ImageSpec::parse(name, opts, format, session.persona)
                .and_then(|spec| spec.with_options(options))
        }
        [] if !options.is_empty() => ImageSpec::of_options(options, session.persona),
        _ => return Err(Said::Usage(command)),
    };
    let spec = spec.map_err(fail)?;
    session.open(spec, how, args.has('s')).map_err(fail)
}

/// `reopen`.
pub(super) fn reopen(
    session: &mut Session,
    command: &'static Command,
    args: &Parsed,
) -> Result<(), Said> {
    if args.has('r') && args.has('w') {
        return Err(Said::OfProgram("Only one -r/-w option may be given".into()));
    }
    if !args.operands.is_empty() {
        return Err(Said::Usage(command));
    }
    let Some(opened) = &session.opened else {
        return Ok(());
    };
    let (spec, how) = reopened(opened, args)?;
    let Some(mut opened) = session.opened.take() else {
        return Ok(());
    };
    opened.drain();
    let before = (opened.spec.clone(), opened.how.clone());
    session.close(opened);
    let result = match open::open_quietly(&spec, &how, session.persona) {
        Ok(disk) => Opened::new(disk, spec, how).map_err(|failure| failure.to_string()),
        Err(message) => Err(message),
    };
    match result {
        Ok(opened) => {
            session.opened = Some(opened);
            Ok(())
        }
        Err(message) => {
            // As it was, so that the session goes on.
            let _ = session.open(before.0, before.1, false);
            Err(Said::OfProgram(message))
        }
    }
}

/// How an image is to be opened anew. Nothing is done to it before all of that is known to be possible.
fn reopened(opened: &Opened, args: &Parsed) -> Result<(ImageSpec, OpenHow), Said> {
    let refuse = |text: String| Said::OfProgram(text);
    let mut how = opened.how.clone();
    let mut spec = opened.spec.clone();
    let mut new = KeyVals::default();
    args.values('o')
        .for_each(|list| new.extend(KeyVals::parse(list, None)));
    if (args.has('r') || args.has('w')) && new.get("read-only").is_some() {
        return Err(refuse("Cannot set both -r/-w and 'read-only'".into()));
    }
    let caches = ["cache.direct", "cache.no-flush"];
    if args.has('c') && caches.iter().any(|key| new.get(key).is_some()) {
        return Err(refuse("Cannot set both -c and the cache options".into()));
    }
    how.read_only = (how.read_only || args.has('r')) && !args.has('w');
    if let Some(mode) = args.value('c') {
        how.cache = open::cache_mode(mode).map_err(|failure| refuse(failure.to_string()))?;
    }
    if new
        .take("driver")
        .is_some_and(|driver| driver != opened.disk.format().name())
    {
        return Err(refuse("Cannot change the option 'driver'".into()));
    }
    CacheOptions::join(&mut spec.options, &new);
    open::check_options(&spec, Some(&*opened.disk)).map_err(refuse)?;
    Ok((spec, how))
}
