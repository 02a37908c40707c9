//! `platter completions` and `platter man`: documentation made from the command line itself.

use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::{
    say,
    util::failure::{Failure, Outcome},
};

/// Write manual pages into a folder: platter man ~/.local/share/man/man1
#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// The folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Prints completions.
pub(crate) fn completions(shell: Shell, command: &mut Command) {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "platter", &mut script);
    crate::util::out::print(format_args!("{}", String::from_utf8_lossy(&script)));
}

/// Writes manual pages.
pub(crate) fn man(args: &ManArgs, mut command: Command) -> Outcome {
    command.build();
    let failed =
        |path: &Path, error: &std::io::Error| Failure::new(format!("{}: {error}", path.display()));
    std::fs::create_dir_all(&args.folder).map_err(|error| failed(&args.folder, &error))?;
    let mut pages = 0;
    let mut open = vec![("platter".to_owned(), command)];
    while let Some((name, command)) = open.pop() {
        let path = args.folder.join(format!("{name}.1"));
        render(&name, &command)
            .and_then(|page| std::fs::write(&path, page))
            .map_err(|error| failed(&path, &error))?;
        pages += 1;
        for sub in command
            .get_subcommands()
            .filter(|sub| sub.get_name() != "help")
        {
            open.push((format!("{name}-{}", sub.get_name()), sub.clone()));
        }
    }
    say!("{pages} manual pages written to {}", args.folder.display());
    Ok(0)
}

fn render(name: &str, command: &Command) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command.clone().name(name.to_owned())).render(&mut page)?;
    Ok(page)
}
