//! The run without arguments: every format, front end, engine and pattern, on temporary images.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use block::{Format, io::EngineKind};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    bench::{
        BenchArgs, Case, FrontEnd, Load, Mix,
        fill::Model,
        measure,
        report::{self, Row},
    },
    grumble,
    image::{
        create::{self, CreateRequest},
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    say,
    util::{
        failure::{Failure, Outcome},
        keyval::KeyVals,
        persona::Persona,
        size,
    },
};

/// Bytes of a temporary image, unless told.
const SIZE: u64 = 128 << 20;
/// Seconds for each row, unless told.
const SECONDS: f64 = 0.8;
/// Queues, and requests in flight in each.
const JOBS: usize = 2;
const DEPTH: usize = 32;

/// The patterns: name, random, percentage of reads, bytes of a request.
const PATTERNS: [(&str, bool, u8, u64); 4] = [
    ("randread", true, 100, 4 << 10),
    ("randwrite", true, 0, 4 << 10),
    ("read", false, 100, 128 << 10),
    ("write", false, 0, 128 << 10),
];

/// Runs everything.
pub(super) fn run(args: &BenchArgs, persona: Persona) -> Outcome {
    let size = args.region()?.unwrap_or(SIZE);
    let unit = JOBS as u64 * (1 << 20);
    let size = size / unit * unit;
    if size / JOBS as u64 / (128 << 10) < DEPTH as u64 {
        return Err(Failure::new("--size: expected at least 8M"));
    }
    let runtime = args.seconds(SECONDS)?;
    let front_ends = args
        .chosen_front_ends()?
        .unwrap_or_else(|| vec![FrontEnd::AsyncIo, FrontEnd::VirtioBlk]);
    let formats = match &args.format {
        None => vec![Format::Raw, Format::Qcow2],
        Some(name) => vec![
            Format::from_name(name)
                .ok_or_else(|| Failure::new(format!("Unknown file format '{name}'")))?,
        ],
    };
    let folder = temporary_folder(args)?;
    let direct = supports_direct(folder.path());
    let mut engines = match args.engine {
        Some(engine) => vec![engine],
        None => EngineKind::ALL.to_vec(),
    };
    if !direct {
        grumble!(
            "note: {} does not take direct I/O: measuring through the page cache, without linux-aio",
            folder.path().display()
        );
        engines.retain(|engine| *engine != EngineKind::LinuxAio);
    }
    let total = formats.len() * front_ends.len() * engines.len() * PATTERNS.len();
    let bar = progress(total as u64);
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for format in formats {
        bar.set_message(format!("writing a {format} image of {}", size::human(size)));
        let path = make(folder.path(), format, size, persona)?;
        let spec = ImageSpec::plain(&path, Some(format));
        let how = OpenHow {
            direct,
            ..OpenHow::default()
        };
        let disk = open::open(&spec, &how, persona)?;
        let mut model = Model::fill(&*disk, size)?;
        disk.close().map_err(failed)?;
        drop(disk);
        for &engine in &engines {
            let how = OpenHow {
                direct,
                engine: Some(engine),
                ..OpenHow::default()
            };
            let disk = open::open(&spec, &how, persona)?;
            let mut usable = true;
            for &front_end in &front_ends {
                for pattern in PATTERNS {
                    let case = case(format, front_end, engine, pattern, size, runtime);
                    bar.set_message(format!("{format} {front_end} {engine} {}", pattern.0));
                    if usable {
                        match one(&*disk, &case, &mut model) {
                            Ok(row) => rows.push(row),
                            // An engine that this host does not have is no failure.
                            Err(failure)
                                if rows.iter().all(|row: &Row| !row.is_of(engine))
                                    && failure.status == 1
                                    && !failure.to_string().starts_with("VERIFICATION") =>
                            {
                                notes.push(format!("{engine}: {failure}"));
                                usable = false;
                            }
                            Err(failure) => return Err(failure),
                        }
                    }
                    bar.inc(1);
                }
            }
            disk.close().map_err(failed)?;
        }
    }
    bar.finish_and_clear();
    report::print(&rows, args.json(), args.histogram);
    notes
        .iter()
        .for_each(|note| grumble!("not measured: {note}"));
    if !args.json() {
        say!(
            "\nEvery read was checked, and after each row every byte of the disk ({}, {}, in {}).",
            size::human(size),
            if direct { "direct I/O" } else { "page cache" },
            folder.path().parent().unwrap_or(folder.path()).display()
        );
    }
    if rows.is_empty() {
        return Err(Failure::new("nothing could be measured"));
    }
    Ok(0)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn failed(error: block::Error) -> Failure {
    Failure::new(error.to_string())
}

fn case(
    format: Format,
    front_end: FrontEnd,
    engine: EngineKind,
    (name, random, read_percent, bs): (&'static str, bool, u8, u64),
    size: u64,
    runtime: Duration,
) -> Case {
    Case {
        format,
        front_end,
        engine,
        load: Load {
            mix: Mix {
                name,
                random,
                read_percent,
            },
            bs,
            depth: DEPTH,
            jobs: JOBS,
            size,
            runtime,
            flush_every: 0,
        },
    }
}

fn one(disk: &dyn block::AsyncDiskFile, case: &Case, model: &mut Model) -> Outcome<Row> {
    let row = measure(disk, case, Some(&mut *model))?;
    if case.load.mix.writes() {
        model.check(disk)?;
    }
    Ok(row)
}

fn progress(rows: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    let bar = ProgressBar::new(rows).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// A folder on a disk, if there is one; it is removed when it is dropped.
fn temporary_folder(args: &BenchArgs) -> Outcome<tempfile::TempDir> {
    let candidates: Vec<PathBuf> = match &args.directory {
        Some(folder) => vec![folder.clone()],
        None => std::env::var_os("TMPDIR")
            .map(PathBuf::from)
            .into_iter()
            .chain(["/var/tmp".into(), ".".into(), std::env::temp_dir()])
            .collect(),
    };
    let on_disk = candidates.iter().find(|folder| is_on_disk(folder));
    let folder = on_disk
        .or(candidates.first())
        .map_or(Path::new("."), PathBuf::as_path);
    tempfile::Builder::new()
        .prefix("platter-bench-")
        .tempdir_in(folder)
        .map_err(|error| Failure::new(format!("{}: {error}", folder.display())))
}

fn is_on_disk(folder: &Path) -> bool {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    match rustix::fs::statfs(folder) {
        Ok(stat) => !matches!(stat.f_type as u32, TMPFS | RAMFS),
        Err(_) => false,
    }
}

fn supports_direct(folder: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join("direct");
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    // The folder goes away anyway.
    let _ = std::fs::remove_file(&path);
    opened.is_ok()
}

fn make(folder: &Path, format: Format, size: u64, persona: Persona) -> Outcome<PathBuf> {
    let path = folder.join(format!("bench.{format}"));
    let request = CreateRequest {
        name: path.display().to_string(),
        path: path.clone(),
        format,
        options: KeyVals::default(),
        size: Some(size),
        unchecked_backing: false,
    };
    create::plan(request, persona)
        .and_then(create::Plan::execute)
        .map_err(|failure| failure.context(path.display()))?;
    Ok(path)
}
