//! `platter io`: the command language of qemu-io.

mod control;
mod faults;
mod lang;
mod queue;
mod report;
mod transfer;

use std::io::{BufRead, IsTerminal, Write};

use block::{CacheMode, io::EngineKind};
use clap::Args;

use crate::{
    grumble,
    image::{
        open::{self, OpenHow},
        overlay,
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        persona::Persona,
    },
};
use lang::{Command, Verb};
use queue::Opened;

/// Read and write an image with the command language of qemu-io
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Write a pattern, look at it, and check it asynchronously:
    platter io -c 'write -P 0x5a 0 64k' -c 'read -v 0 32' -c 'aio_read -P 0x5a 0 64k' disk.qcow2

  What does a discard give back?
    platter io -c 'discard 1M 1M' -c map disk.qcow2

  Try something without changing the file (it goes to a temporary overlay):
    platter io --snapshot -c 'write -z 0 1M' disk.qcow2

  A session; commands come from standard input:
    platter io --engine sync --direct disk.raw

  'platter io -c help' lists the commands. The exit status is 1 if a command failed.

OPTIONS WITHOUT EFFECT
  --aio threads means the default engine. Command options -p, -r and -a are accepted for
  compatibility and change nothing.")]
pub(crate) struct IoArgs {
    /// A command; may be given several times. Without it commands come from standard input
    #[arg(
        short,
        long = "cmd",
        value_name = "COMMAND",
        allow_hyphen_values = true
    )]
    command: Vec<String>,
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Open for reading only
    #[arg(short, long)]
    read_only: bool,
    /// Write to a temporary overlay; the file stays as it is
    #[arg(short, long)]
    snapshot: bool,
    /// Bypass the host's page cache, short for -t none
    #[arg(short, long)]
    nocache: bool,
    /// Bypass the host's page cache, whatever the cache mode
    #[arg(long)]
    direct: bool,
    /// Cache mode: none, writeback (the default), writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<String>,
    /// AIO mode: threads (the default engine), native or io_uring
    #[arg(short = 'i', long, value_name = "MODE")]
    aio: Option<String>,
    /// Linux AIO, short for --aio native
    #[arg(short = 'k', long)]
    native_aio: bool,
    /// The engine: sync, io_uring or linux-aio
    #[arg(long, value_name = "ENGINE", value_parser = crate::util::persona::engine)]
    engine: Option<EngineKind>,
    /// What happens to discards: unmap (the default) or ignore
    #[arg(short, long, value_name = "MODE")]
    discard: Option<String>,
    #[command(flatten)]
    share: open::ShareArgs,
    /// The image; it can also be opened with the command 'open'
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// What a command that failed says, and where.
#[derive(Debug)]
pub(crate) enum Said {
    /// To standard output.
    Text(String),
    /// To standard error.
    Complaint(String),
    /// To standard error, after the program's name.
    OfProgram(String),
    /// The line of the help.
    Usage(&'static Command),
    /// It said it already.
    Already,
}

/// A session: the image that is open, if any, and how to open the next.
pub(crate) struct Session {
    persona: Persona,
    format: Option<String>,
    /// Names of images are lists of options.
    image_opts: bool,
    how: OpenHow,
    opened: Option<Opened>,
    done: bool,
}

/// Runs the command.
pub(crate) fn run(args: &IoArgs, persona: Persona) -> Outcome {
    let mut session = Session {
        persona,
        format: args.format.clone().filter(|_| !args.share.image_opts),
        image_opts: args.share.image_opts,
        how: how(args)?,
        opened: None,
        done: false,
    };
    match args.files.as_slice() {
        [] => {}
        [name] => {
            let opts = args.share.image_opts;
            let format = session.format.as_deref();
            let spec = ImageSpec::parse(name, opts, format, persona)?;
            session.open(spec, session.how.clone(), args.snapshot)?;
        }
        _ => return Err(Failure::new("only one image can be opened")),
    }
    let mut failed = false;
    if args.command.is_empty() {
        failed |= session.interact();
    } else {
        for line in &args.command {
            if session.done {
                break;
            }
            failed |= !session.execute(line);
        }
    }
    if let Some(mut opened) = session.opened.take() {
        opened.drain();
        failed |= !session.close(opened);
    }
    Ok(u8::from(failed))
}

fn how(args: &IoArgs) -> Outcome<OpenHow> {
    let mut how = OpenHow {
        read_only: args.read_only,
        direct: args.direct,
        force_share: args.share.force_share,
        ..OpenHow::default()
    };
    if let Some(mode) = &args.cache {
        how.cache = open::cache_mode(mode)?;
    }
    if args.nocache {
        how.cache = CacheMode::None;
    }
    let aio = args.aio.as_deref().or(args.native_aio.then_some("native"));
    if let Some(name) = aio {
        how.engine = open::engine_of_aio(name)
            .ok_or_else(|| Failure::new(format!("Invalid aio option: {name}")))?;
    }
    if let Some(engine) = args.engine {
        how.engine = Some(engine);
    }
    if let Some(name) = &args.discard {
        let policy = open::discard_policy(name);
        how.discard =
            Some(policy.ok_or_else(|| Failure::new(format!("Invalid discard option: {name}")))?);
    }
    Ok(how)
}

impl Session {
    /// Opens an image, or a temporary overlay of it.
    fn open(&mut self, spec: ImageSpec, how: OpenHow, snapshot: bool) -> Outcome<()> {
        let disk = if snapshot {
            overlay::open(&spec, &how, self.persona)?
        } else {
            open::open(&spec, &how, self.persona)?
        };
        self.opened = Some(Opened::new(disk, spec, how)?);
        Ok(())
    }

    /// Closes the image; whether that went well.
    fn close(&self, opened: Opened) -> bool {
        let result = opened.close();
        if let Err(error) = &result {
            self.persona.complain(&error.to_string());
        }
        result.is_ok()
    }

    /// Takes commands from standard input; whether one failed.
    fn interact(&mut self) -> bool {
        let stdin = std::io::stdin();
        let prompting = self.persona.is_qemu() || stdin.is_terminal();
        let prompt = format!(
            "{}> ",
            if self.persona.is_qemu() {
                "qemu-io"
            } else {
                "platter"
            }
        );
        let mut failed = false;
        let mut line = String::new();
        while !self.done {
            if prompting {
                crate::util::out::print(format_args!("{prompt}"));
                let _ = std::io::stdout().flush();
            }
            line.clear();
            match stdin.lock().read_line(&mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => failed |= !self.execute(line.trim_end_matches('\n')),
            }
        }
        failed
    }

    /// Runs a command; whether it went well.
    fn execute(&mut self, line: &str) -> bool {
        let words: Vec<_> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let Some((name, args)) = words.split_first() else {
            return true;
        };
        let Some(command) = lang::find(name) else {
            grumble!("command \"{name}\" not found");
            return false;
        };
        let result = self.dispatch(command, args);
        if let Some(opened) = &mut self.opened {
            opened.poll();
        }
        match result {
            Ok(()) => return true,
            Err(Said::Text(text)) => say!("{text}"),
            Err(Said::Complaint(text)) => grumble!("{text}"),
            Err(Said::OfProgram(text)) => self.persona.complain(&text),
            Err(Said::Usage(command)) => say!("{}", command.usage()),
            Err(Said::Already) => {}
        }
        false
    }

    fn dispatch(&mut self, command: &'static Command, args: &[&str]) -> Result<(), Said> {
        if command.needs_image && self.opened.is_none() {
            return Err(Said::Complaint("no file open, try 'help open'".into()));
        }
        self.count(command, args.len())?;
        if command.writes
            && let Some(opened) = &self.opened
            && !opened.disk.capabilities().writable
        {
            return Err(Said::OfProgram("Block node is read-only".into()));
        }
        let parsed = lang::parse_args(command, args).map_err(|message| {
            grumble!("{message}");
            Said::Usage(command)
        })?;
        match command.verb {
            Verb::Abort => control::crash(),
            Verb::Sigraise => return control::raise(&parsed),
            Verb::Help => return control::help(&parsed),
            Verb::Open => return control::open_image(self, command, &parsed),
            Verb::Reopen => return control::reopen(self, command, &parsed),
            Verb::Quit => {
                self.done = true;
                return Ok(());
            }
            Verb::Sleep => {
                if let Some(opened) = &mut self.opened {
                    opened.poll();
                }
                return control::pause(&parsed);
            }
            Verb::Close => {
                if let Some(mut opened) = self.opened.take() {
                    opened.drain();
                    self.close(opened);
                }
                return Ok(());
            }
            _ => {}
        }
        let Some(opened) = &mut self.opened else {
            return Ok(());
        };
        match command.verb {
            Verb::Read => transfer::read(opened, command, &parsed, false),
            Verb::Readv => transfer::read(opened, command, &parsed, true),
            Verb::Write => transfer::write(opened, command, &parsed, false),
            Verb::Writev => transfer::write(opened, command, &parsed, true),
            Verb::AioRead => transfer::aio_read(opened, command, &parsed),
            Verb::AioDiscard => transfer::aio_discard(opened, command, &parsed),
            Verb::AioWrite => transfer::aio_write(opened, command, &parsed),
            Verb::Discard => transfer::discard(opened, command, &parsed),
            Verb::Flush => control::flush(opened),
            Verb::Truncate => control::truncate(opened, command, &parsed),
            Verb::Alloc => control::alloc(opened, &parsed),
            Verb::Map => control::map(opened),
            Verb::AioFlush => {
                opened.drain();
                Ok(())
            }
            Verb::Break => faults::set(opened, &parsed),
            Verb::RemoveBreak => faults::remove(opened, &parsed),
            Verb::Resume => faults::resume(opened, &parsed),
            Verb::WaitBreak => faults::wait(opened, &parsed),
            Verb::Info => {
                control::info(opened);
                Ok(())
            }
            Verb::Length => {
                control::length(opened);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn count(&self, command: &Command, given: usize) -> Result<(), Said> {
        let expected = match (command.min, command.max) {
            (min, None) if given < min => format!("at least {min}"),
            (min, Some(max)) if !(min..=max).contains(&given) => {
                if min == max {
                    max.to_string()
                } else {
                    format!("between {min} and {max}")
                }
            }
            _ => return Ok(()),
        };
        Err(Said::Complaint(format!(
            "bad argument count {given} to {}, expected {expected} arguments",
            command.name
        )))
    }
}
