//! `platter bitmap`: persistent dirty bitmaps.

use block::{AsyncDiskFile, BitmapChange, DirtyBits, Error, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;

use crate::{
    create::parse_size,
    image::{
        bitmaps,
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    say,
    util::{
        errno,
        failure::{Failure, Outcome},
        json,
        persona::Persona,
        size,
    },
};

/// Change or show persistent dirty bitmaps of a qcow2 image
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  Record from now on what is written:
    platter bitmap --add disk.qcow2 monday

  What was written since? Where, for a program that copies it?
    platter bitmap --ranges disk.qcow2 monday
    platter bitmap --ranges --output json disk.qcow2 monday

  Start again; stop recording; forget it:
    platter bitmap --clear disk.qcow2 monday
    platter bitmap --disable disk.qcow2 monday
    platter bitmap --remove disk.qcow2 monday

  What was written on either day, from a bitmap of another image:
    platter bitmap --add --disable --merge monday -b other.qcow2 disk.qcow2 both

Actions are done in the order in which they are given. Of the images only the ones named are opened,
not what backs them.")]
pub(crate) struct BitmapArgs {
    #[command(flatten)]
    actions: Actions,
    /// The format of the image; detected otherwise
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// With --merge: the image that has the other bitmap
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,
    /// The format of that image
    #[arg(short = 'F', long, value_name = "FMT")]
    source_format: Option<String>,
    /// With --add: how many bytes a bit stands for, from 512 to 2G
    #[arg(short, long, value_name = "SIZE")]
    granularity: Option<String>,
    /// The image name is a list of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    image_opts: bool,
    /// With --ranges: print for people or for programs
    #[arg(long, value_name = "human|json", default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// The image and the name of the bitmap
    #[arg(value_name = "FILE BITMAP")]
    names: Vec<String>,
}

/// What to do with the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
    Ranges,
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
            Self::Ranges => "ranges",
        }
    }
}

/// The actions in the order of the command line.
#[derive(Debug)]
struct Actions(Vec<Action>);

/// The actions without a value, by their option, with their help.
const FLAGS: [(&str, Action, &str); 6] = [
    (
        "add",
        Action::Add,
        "Make the bitmap; it records writes from now on",
    ),
    ("remove", Action::Remove, "Remove it"),
    ("clear", Action::Clear, "Forget what it recorded"),
    ("enable", Action::Enable, "Record writes from now on"),
    ("disable", Action::Disable, "Record no more writes"),
    (
        "ranges",
        Action::Ranges,
        "Print what is dirty (not in qemu-img)",
    ),
];

const MERGE: &str = "merge";

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let flags = FLAGS.iter().map(|(name, _, help)| {
            Arg::new(*name)
                .long(*name)
                .help(*help)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("")
        });
        let merge = Arg::new(MERGE)
            .long(MERGE)
            .help("Mark what this other bitmap has marked, too")
            .value_name("BITMAP")
            .action(ArgAction::Append);
        command.args(flags).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found: Vec<(usize, Action)> = Vec::new();
        for (name, action, _) in FLAGS {
            let places = matches.indices_of(name).into_iter().flatten();
            found.extend(places.map(|at| (at, action.clone())));
        }
        let places = matches.indices_of(MERGE).into_iter().flatten();
        let values = matches.get_many::<String>(MERGE).into_iter().flatten();
        found.extend(
            places
                .zip(values)
                .map(|(at, name)| (at, Action::Merge(name.clone()))),
        );
        found.sort_by_key(|(at, _)| *at);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Runs the command.
pub(crate) fn run(args: &BitmapArgs, persona: Persona) -> Outcome {
    let actions = &args.actions.0;
    let [file, name] = args.names.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let merges = actions
        .iter()
        .any(|action| matches!(action, Action::Merge(_)));
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let granularity = match &args.granularity {
        None => None,
        Some(text) => {
            let size = parse_size(text)
                .map_err(|_| Failure::new(format!("Invalid granularity specified: '{text}'.")))?;
            Some(size).filter(|size| *size > 0)
        }
    };
    if granularity.is_some() && !actions.contains(&Action::Add) {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if args.source_file.is_some() && !merges {
        return Err(Failure::new(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    let format = args.format.as_deref();
    let spec = ImageSpec::parse(file, args.image_opts, format, persona)?;
    let how = OpenHow {
        no_backing: true,
        read_only: actions.iter().all(|action| *action == Action::Ranges),
        ..OpenHow::default()
    };
    let disk = open::open(&spec, &how, persona)?;
    let source = open_source(args, persona)?;
    for action in actions {
        let from = source.as_deref().unwrap_or(&*disk);
        act(args, &*disk, from, (action, name, granularity)).map_err(|error| {
            let operation = action.name();
            let why = why(&error, action, disk.path(), persona);
            Failure::new(format!(
                "Operation {operation} on bitmap {name} failed: {why}"
            ))
        })?;
    }
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    Ok(0)
}

fn open_source(args: &BitmapArgs, persona: Persona) -> Outcome<Option<Box<dyn AsyncDiskFile>>> {
    let Some(name) = &args.source_file else {
        return Ok(None);
    };
    let spec = ImageSpec::parse(name, false, args.source_format.as_deref(), persona)?;
    let how = OpenHow {
        no_backing: true,
        ..OpenHow::reading()
    };
    open::open(&spec, &how, persona).map(Some)
}

fn act(
    args: &BitmapArgs,
    disk: &dyn AsyncDiskFile,
    from: &dyn AsyncDiskFile,
    (action, name, granularity): (&Action, &str, Option<u64>),
) -> block::Result<()> {
    let bits;
    let change = match action {
        Action::Add => BitmapChange::Add {
            granularity,
            enabled: true,
        },
        Action::Remove => BitmapChange::Remove,
        Action::Clear => BitmapChange::Clear,
        Action::Enable => BitmapChange::Enable,
        Action::Disable => BitmapChange::Disable,
        Action::Merge(other) => {
            bits = from.extras().bitmap_bits(other)?;
            BitmapChange::Merge(&bits)
        }
        Action::Ranges => {
            show(&disk.extras().bitmap_bits(name)?, args.output == "json");
            return Ok(());
        }
    };
    disk.extras().change_bitmap(name, change)
}

/// Why an action failed.
fn why(error: &Error, action: &Action, path: &std::path::Path, persona: Persona) -> String {
    if error.kind() == ErrorKind::Unsupported && *action == Action::Add && persona.is_qemu() {
        let text = errno::text(libc::ENOTSUP);
        return format!(
            "Can't store persistent bitmaps to {}: {text}",
            path.display()
        );
    }
    bitmaps::explain(error, persona)
}

/// Prints the dirty ranges.
fn show(bits: &DirtyBits, as_json: bool) {
    if as_json {
        let list: Vec<_> = bits
            .ranges()
            .map(|range| json!({"start": range.start.0, "length": range.len}))
            .collect();
        json::print(&json!({
            "virtual-size": bits.size(),
            "granularity": bits.granularity(),
            "dirty": list,
        }));
        return;
    }
    say!("{:<16}{}", "Offset", "Length");
    for range in bits.ranges() {
        say!("{:<#16x}{:#x}", range.start.0, range.len);
    }
    say!("{} dirty", size::human(bits.dirty_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_keep_their_order() {
        let command = Actions::augment_args(Command::new("bitmap"));
        let args = [
            "bitmap",
            "--merge",
            "a",
            "--add",
            "--clear",
            "--merge=b",
            "--add",
        ];
        let matches = command.try_get_matches_from(args).expect("parses");
        let actions = Actions::from_arg_matches(&matches).expect("actions").0;
        let merge = |name: &str| Action::Merge(name.into());
        let expected = [
            merge("a"),
            Action::Add,
            Action::Clear,
            merge("b"),
            Action::Add,
        ];
        assert_eq!(actions, expected);
    }
}
