//! The command line as a whole: which command, and how mistakes in its arguments are told.

use std::{ffi::OsString, io::IsTerminal};

use clap::{
    Command, CommandFactory, FromArgMatches, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};
use clap_complete::Shell;

use crate::{
    amend::AmendArgs,
    bench::BenchArgs,
    bitmap::BitmapArgs,
    check::CheckArgs,
    commit::CommitArgs,
    compare::CompareArgs,
    convert::ConvertArgs,
    create::CreateArgs,
    ctl::CtlArgs,
    dd::DdArgs,
    docs::ManArgs,
    grumble,
    image::secrets,
    info::InfoArgs,
    io::IoArgs,
    map::MapArgs,
    measure::MeasureArgs,
    rebase::RebaseArgs,
    resize::ResizeArgs,
    serve::ServeArgs,
    snapshot::SnapshotArgs,
    util::{failure::Outcome, persona::Persona, tell},
};

/// Inspect, convert, check, benchmark and serve disk images.
#[derive(Parser, Debug)]
#[command(
    name = "platter",
    version,
    max_term_width = 100,
    args_override_self = true
)]
#[command(after_long_help = "\
EXAMPLES
  platter create -f qcow2 disk.qcow2 40G      make an image
  platter info disk.qcow2                     look at it
  platter serve vhost-user-blk --socket /run/disk.sock disk.qcow2
                                              give it to a virtual machine
  platter check disk.qcow2                    is it sound?
  platter bench                               how fast is this machine?

Called by the name qemu-img or qemu-io (a symbolic link), the program speaks like those.
Each command tells more with --help; 'platter completions' makes your shell complete them, and
'platter man DIR' writes manual pages.")]
struct PlatterCli {
    /// Tell more about what happens, on standard error; again for even more (or set RUST_LOG)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 900)]
    verbose: u8,
    /// Define a secret: secret,id=ID,data=TEXT or secret,id=ID,file=PATH, with format=base64 or raw
    #[arg(long, global = true, value_name = "OBJECT", display_order = 890)]
    object: Vec<String>,
    #[command(subcommand)]
    command: PlatterCommand,
}

#[derive(Subcommand, Debug)]
enum PlatterCommand {
    #[command(flatten)]
    Image(ImageCommand),
    Io(Box<IoArgs>),
    Bench(Box<BenchArgs>),
    Serve(ServeArgs),
    Ctl(CtlArgs),
    /// Print completions for a shell: platter completions bash > /etc/bash_completion.d/platter
    Completions {
        /// The shell
        shell: Shell,
    },
    Man(ManArgs),
}

#[derive(Subcommand, Debug)]
enum ImageCommand {
    Bitmap(BitmapArgs),
    Amend(AmendArgs),
    Check(CheckArgs),
    Commit(CommitArgs),
    Compare(CompareArgs),
    Convert(Box<ConvertArgs>),
    Create(CreateArgs),
    Dd(DdArgs),
    Info(InfoArgs),
    Map(MapArgs),
    Measure(MeasureArgs),
    Rebase(RebaseArgs),
    Resize(ResizeArgs),
    Snapshot(SnapshotArgs),
}

/// Disk image utility, as QEMU's.
#[derive(Parser, Debug)]
#[command(name = "qemu-img", max_term_width = 100, args_override_self = true)]
struct QemuImgCli {
    /// Define a secret: secret,id=ID,data=TEXT or secret,id=ID,file=PATH, with format=base64 or raw
    #[arg(long, global = true, value_name = "OBJECT", display_order = 890)]
    object: Vec<String>,
    #[command(subcommand)]
    command: ImageCommand,
}

/// Disk exerciser, as QEMU's.
#[derive(Parser, Debug)]
#[command(name = "qemu-io", max_term_width = 100, args_override_self = true)]
struct QemuIoCli {
    /// Define a secret: secret,id=ID,data=TEXT or secret,id=ID,file=PATH, with format=base64 or raw
    #[arg(long, global = true, value_name = "OBJECT", display_order = 890)]
    object: Vec<String>,
    #[command(flatten)]
    args: IoArgs,
}

/// The command line of Platter itself, for documentation.
pub(crate) fn platter_command() -> Command {
    PlatterCli::command()
}

/// Runs the program; returns the exit status.
pub(crate) fn run(args: Vec<OsString>) -> u8 {
    let persona = Persona::from_argv0(args.first().map(OsString::as_os_str));
    let outcome = match persona {
        Persona::Platter => parse::<PlatterCli>(args, persona).map(|cli| {
            start_tracing(cli.verbose, persona);
            secrets::define(&cli.object)?;
            run_platter(cli.command, persona)
        }),
        Persona::QemuImg => parse::<QemuImgCli>(args, persona).map(|cli| {
            start_tracing(0, persona);
            secrets::define(&cli.object)?;
            run_image(cli.command, persona)
        }),
        Persona::QemuIo => parse::<QemuIoCli>(args, persona).map(|cli| {
            start_tracing(0, persona);
            secrets::define(&cli.object)?;
            crate::io::run(&cli.args, persona)
        }),
    };
    match outcome {
        Ok(Ok(status)) | Err(status) => status,
        Ok(Err(failure)) => persona.report(&failure),
    }
}

fn run_platter(command: PlatterCommand, persona: Persona) -> Outcome {
    match command {
        PlatterCommand::Image(command) => run_image(command, persona),
        PlatterCommand::Io(args) => crate::io::run(&args, persona),
        PlatterCommand::Bench(args) => crate::bench::run(&args, persona),
        PlatterCommand::Serve(args) => crate::serve::run(&args, persona),
        PlatterCommand::Ctl(args) => crate::ctl::run(&args),
        PlatterCommand::Completions { shell } => {
            crate::docs::completions(shell, &mut platter_command());
            Ok(0)
        }
        PlatterCommand::Man(args) => crate::docs::man(&args, platter_command()),
    }
}

fn run_image(command: ImageCommand, persona: Persona) -> Outcome {
    match command {
        ImageCommand::Bitmap(args) => crate::bitmap::run(&args, persona),
        ImageCommand::Amend(args) => crate::amend::run(&args, persona),
        ImageCommand::Commit(args) => crate::commit::run(&args, persona),
        ImageCommand::Rebase(args) => crate::rebase::run(&args, persona),
        ImageCommand::Check(args) => crate::check::run(&args, persona),
        ImageCommand::Compare(args) => crate::compare::run(&args, persona),
        ImageCommand::Convert(args) => crate::convert::run(&args, persona),
        ImageCommand::Create(args) => crate::create::run(&args, persona),
        ImageCommand::Dd(args) => crate::dd::run(&args, persona),
        ImageCommand::Info(args) => crate::info::run(&args, persona),
        ImageCommand::Map(args) => crate::map::run(&args, persona),
        ImageCommand::Measure(args) => crate::measure::run(&args, persona),
        ImageCommand::Resize(args) => crate::resize::run(&args, persona),
        ImageCommand::Snapshot(args) => crate::snapshot::run(&args, persona),
    }
}

/// Parses the arguments; on failure everything is told and the exit status returned.
fn parse<T: CommandFactory + FromArgMatches>(
    args: Vec<OsString>,
    persona: Persona,
) -> Result<T, u8> {
    let mut command = T::command().mut_subcommands(|sub| sub.args_override_self(true));
    if persona.is_qemu() {
        command = command.version(persona.version());
    }
    let parsed = command
        .try_get_matches_from_mut(args)
        .and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        if !error.use_stderr() {
            crate::util::out::print(format_args!("{}", error.render()));
            return 0;
        }
        if persona.is_qemu() {
            tell_as_qemu(&error, persona);
            return 1;
        }
        grumble!("{}", error.render().ansi().to_string().trim_end());
        2
    })
}

fn context(error: &clap::Error, kind: ContextKind) -> String {
    match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(list)) => list.join(" "),
        _ => String::new(),
    }
}

fn tell_as_qemu(error: &clap::Error, persona: Persona) {
    let name = persona.name();
    let arg = context(error, ContextKind::InvalidArg);
    match error.kind() {
        ErrorKind::UnknownArgument => match arg.strip_prefix("--") {
            Some(long) => grumble!("{name}: unrecognized option '--{long}'"),
            None => grumble!(
                "{name}: invalid option -- '{}'",
                arg.trim_start_matches('-')
            ),
        },
        ErrorKind::InvalidSubcommand => {
            let command = context(error, ContextKind::InvalidSubcommand);
            grumble!("{name}: Command not found: {command}");
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            grumble!("{name}: Not enough arguments");
        }
        ErrorKind::InvalidValue if arg.starts_with("--output") => {
            let value = context(error, ContextKind::InvalidValue);
            grumble!("{name}: --output expects 'human' or 'json' not '{value}'");
        }
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            grumble!("{name}: {}", line.trim_start_matches("error: "));
        }
    }
    grumble!("Try '{name} --help' for more info");
}

/// Sends what the libraries report to standard error.
fn start_tracing(verbose: u8, persona: Persona) {
    use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    if persona.is_qemu() && std::env::var_os("RUST_LOG").is_none() {
        // Nobody else sets a subscriber in this program; a second one would only be refused.
        let _ = tracing_subscriber::registry()
            .with(tell::Corruption)
            .try_init();
        return;
    }
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if verbose == 0 && !text.is_empty() => EnvFilter::new(text),
        _ => EnvFilter::new(level),
    };
    // Nobody else sets a subscriber in this program; a second one would only be refused.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .try_init();
}
