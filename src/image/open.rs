//! Opening the images that the command line names.

use std::{path::Path, sync::Arc, time::Duration};

use block::{
    AsyncDiskFile, CacheMode, DetectZeroes, DiscardPolicy, Disk, DiskFile, Error, ErrorKind,
    FileGate, Format, Locking, OpenOptions, OverlapChecks, PassDiscards, extras::SnapshotInfo,
    io::EngineKind,
};
use clap::Args;

use crate::{
    grumble,
    image::{
        faults,
        qcow2_options::{self, CacheOptions},
        secrets,
        spec::{ImageSpec, could_not_open, named_format},
    },
    util::{
        errno,
        failure::{Failure, Outcome},
        keyval::{KeyVals, parse_switch},
        persona::Persona,
    },
};

/// How long a restarted server waits for the lock of a killed predecessor, which the kernel takes back
/// only when the last of its memory and descriptors is gone.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(30);

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenHow {
    /// For reading only.
    pub(crate) read_only: bool,
    /// The cache mode.
    pub(crate) cache: CacheMode,
    /// Bypass the page cache whatever the cache mode says.
    pub(crate) direct: bool,
    /// The engine; the library's default otherwise.
    pub(crate) engine: Option<EngineKind>,
    /// Although another process may be writing to it.
    pub(crate) force_share: bool,
    /// What happens to discards; QEMU ignores them unless asked.
    pub(crate) discard: Option<DiscardPolicy>,
    /// Look for zeroes in what is written.
    pub(crate) detect_zeroes: DetectZeroes,
    /// Open nothing but the image.
    pub(crate) no_backing: bool,
    /// Use this backing file, whatever the header names.
    pub(crate) backing: Option<ImageSpec>,
    /// Use this data file, whatever the header names.
    pub(crate) data_file: Option<String>,
    /// Discarded clusters stay with their guest clusters.
    pub(crate) discard_no_unref: bool,
    /// Write reference counts late, or not, whatever the image says.
    pub(crate) lazy_refcounts: Option<bool>,
    /// Which freed clusters give their space back at once.
    pub(crate) pass_discards: PassDiscards,
    /// What is guarded against being overwritten.
    pub(crate) overlap_checks: OverlapChecks,
    /// The format of the backing file that the header names.
    pub(crate) backing_format: Option<Format>,
    /// Show this internal snapshot.
    pub(crate) snapshot: Option<SnapshotChoice>,
    /// Complete a change only when killing the process cannot lose it.
    pub(crate) restartable: bool,
    /// Open the image so many levels below for writing, too; 0 for none.
    pub(crate) writable_backing: usize,
    /// An encrypted image without its key: only its header is looked at.
    pub(crate) locked: bool,
    /// Open files that the image names only if its own format was named.
    pub(crate) named_files_need_format: bool,
}

/// Which internal snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SnapshotChoice {
    /// By id or else by name.
    Either(String),
    /// By id, by name, or both: all that is given must match.
    Exactly {
        id: Option<String>,
        name: Option<String>,
    },
}

impl SnapshotChoice {
    /// Reads `snapshot.id=ID,snapshot.name=NAME`, one of them, or a bare id or name.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::Either(text.to_owned()));
        }
        let mut pairs = KeyVals::parse(text, None);
        let (id, name) = (pairs.take("snapshot.id"), pairs.take("snapshot.name"));
        match pairs.first_key() {
            None => Ok(Self::Exactly { id, name }),
            Some(key) => Err(format!(
                "Invalid parameter '{key}'\nFailed in parsing snapshot param '{text}'"
            )),
        }
    }

    /// [`parse`](Self::parse), for the command line.
    pub(crate) fn read(text: &str, persona: Persona) -> Outcome<Self> {
        Self::parse(text).map_err(|message| {
            let (first, last) = message.split_once('\n').unwrap_or(("", &message));
            if !first.is_empty() {
                persona.complain(first);
            }
            Failure::new(last)
        })
    }

    /// Whether it is this one.
    pub(crate) fn is(&self, snapshot: &SnapshotInfo) -> bool {
        match self {
            Self::Either(text) => snapshot.id == *text || snapshot.name == *text,
            Self::Exactly { id, name } => {
                id.as_ref().is_none_or(|id| snapshot.id == *id)
                    && name.as_ref().is_none_or(|name| snapshot.name == *name)
            }
        }
    }
}

impl OpenHow {
    /// For reading.
    pub(crate) fn reading() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }
}

/// Options that commands which read images share.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ShareArgs {
    /// The image names are lists of options (driver=qcow2,file.filename=PATH,...)
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// Open although another process may be writing: take no lock
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

/// Reads the value of a `-t`/`-T`/`--cache` option.
pub(crate) fn cache_mode(name: &str) -> Outcome<CacheMode> {
    CacheMode::from_name(name).ok_or_else(|| Failure::new(format!("Invalid cache option: {name}")))
}

/// Opens an image as it was at one of its snapshots.
pub(crate) fn open_snapshot(
    spec: &ImageSpec,
    how: &OpenHow,
    chosen: &SnapshotChoice,
    persona: Persona,
) -> Outcome<Box<dyn AsyncDiskFile>> {
    let how = OpenHow {
        snapshot: Some(chosen.clone()),
        ..how.clone()
    };
    // A name that is not there is told apart from a file that is not.
    let current = OpenHow {
        snapshot: None,
        no_backing: true,
        ..how.clone()
    };
    let snapshots = open(spec, &current, persona)?.info().snapshots;
    if !snapshots.iter().any(|one| chosen.is(one)) {
        return Err(Failure::new("Failed to load snapshot: Can't find snapshot"));
    }
    open(spec, &how, persona)
}

/// Opens an image.
pub(crate) fn open(
    spec: &ImageSpec,
    how: &OpenHow,
    persona: Persona,
) -> Outcome<Box<dyn AsyncDiskFile>> {
    Ok(Box::new(open_disk(spec, how, persona)?))
}

/// Opens an image, as the concrete type.
pub(crate) fn open_disk(spec: &ImageSpec, how: &OpenHow, persona: Persona) -> Outcome<Disk> {
    open_disk_quietly(spec, how, persona)
        .map_err(|message| could_not_open(&spec.display(), &message, persona))
        .map_err(|failure| match persona {
            Persona::QemuIo if !spec.by_options => Failure::new(failure.to_string().replacen(
                "can't open: ",
                &format!("can't open device {}: ", spec.display()),
                1,
            )),
            _ => failure,
        })
}

/// Opens an image; the error is the text after the image's name.
pub(crate) fn open_quietly(
    spec: &ImageSpec,
    how: &OpenHow,
    persona: Persona,
) -> Result<Box<dyn AsyncDiskFile>, String> {
    Ok(Box::new(open_disk_quietly(spec, how, persona)?))
}

/// [`open_quietly`], as the concrete type.
pub(crate) fn open_disk_quietly(
    spec: &ImageSpec,
    how: &OpenHow,
    persona: Persona,
) -> Result<Disk, String> {
    let mut how = how.clone();
    let mut options = spec.options.clone();
    if spec.faults.is_some() {
        faults::take_limits(&mut options)?;
    }
    let caches = CacheOptions::take(&mut options)?;
    let mut locking = Locking::Auto;
    apply(&mut options, &mut how, &mut locking)?;
    let keys = secrets::take_keys(&mut options, how.locked)?;
    no_more(&options, spec)?;
    let mut open = OpenOptions::new()
        .read_only(how.read_only)
        .cache_mode(how.cache)
        .direct(how.direct)
        .force_share(how.force_share)
        .locking(locking)
        .detect_zeroes(how.detect_zeroes)
        .no_backing(how.no_backing)
        .restartable(how.restartable)
        .discard_no_unref(how.discard_no_unref)
        .pass_discards(how.pass_discards)
        .overlap_checks(how.overlap_checks)
        .writable_backing(how.writable_backing)
        .lock_wait(if how.restartable {
            PREDECESSOR_WAIT
        } else {
            Duration::ZERO
        })
        .discard(how.discard.unwrap_or(DiscardPolicy::Unmap));
    if persona.is_qemu() {
        open = open.gate(FileGate::Everything).allow_probed_backing(true);
    }
    if let Some(format) = spec.format {
        open = open.format(format);
    } else if how.named_files_need_format {
        open = open.gate(FileGate::Nothing);
    }
    if let Some(engine) = how.engine {
        open = open.engine(engine);
    }
    if let Some(bytes) = caches.bytes {
        open = open.metadata_cache_size(bytes);
    }
    for (depth, secret) in keys {
        open = open.backing_key(depth, secret);
    }
    open = open.locked(how.locked);
    open = match &how.snapshot {
        None => open,
        Some(SnapshotChoice::Either(text)) => open.snapshot(text),
        Some(SnapshotChoice::Exactly { id, name }) => {
            open.snapshot_by(id.as_deref(), name.as_deref())
        }
    };
    if let Some(lazy) = how.lazy_refcounts {
        open = open.lazy_refcounts(lazy);
    }
    if let Some(faults) = &spec.faults {
        open = open.faults(Arc::clone(faults));
    }
    if let Some(faults) = &spec.data_file_faults {
        open = open.data_file_faults(Arc::clone(faults));
    }
    if let Some(faults) = &spec.request_faults {
        open = open.request_faults(Arc::clone(faults));
    }
    if let Some(path) = &how.data_file {
        open = open.data_file(Path::new(path));
    }
    if let Some(format) = how.backing_format {
        open = open.backing_format(format);
    }
    if let Some(backing) = &how.backing {
        open = open.backing(&backing.path, backing.format);
    }
    let disk = open
        .open_disk(&spec.path)
        .map_err(|error| explain(&error, &spec.path, persona))?;
    if spec.format.is_none() && disk.format() == Format::Raw && !how.read_only {
        warn_of_guess(&spec.path);
    }
    caches.check(disk.info().cluster_size.unwrap_or(u64::MAX), disk.size())?;
    Ok(disk)
}

/// Checks the options of an image without opening it. `disk` is the same image as it is open now, if it is.
pub(crate) fn check_options(spec: &ImageSpec, disk: Option<&dyn DiskFile>) -> Result<(), String> {
    let mut options = spec.options.clone();
    let caches = CacheOptions::take(&mut options)?;
    apply(&mut options, &mut OpenHow::default(), &mut Locking::Auto)?;
    secrets::take_keys(&mut options, true)?;
    if let Some(disk) = disk {
        caches.check(disk.info().cluster_size.unwrap_or(u64::MAX), disk.size())?;
    }
    no_more(&options, spec)
}

/// Checks the options of an image that is worked on as a whole, in its file: what has its effect only on an open
/// disk must be right, and there are no faults on purpose.
pub(crate) fn check_offline(spec: &ImageSpec) -> Result<(), String> {
    let faults = [&spec.faults, &spec.data_file_faults, &spec.request_faults];
    if faults.iter().any(|rules| rules.is_some()) {
        return Err("the filter 'blkdebug' has no effect on what is done to a whole image".into());
    }
    check_options(spec, None)
}

/// Refuses options that nothing has taken.
fn no_more(options: &KeyVals, spec: &ImageSpec) -> Result<(), String> {
    let Some(key) = options.first_key() else {
        return Ok(());
    };
    let format = spec.format.map_or("image", Format::name);
    Err(format!(
        "Block format '{format}' does not support the option '{key}'"
    ))
}

/// Takes the options that any image has out of the list.
fn apply(options: &mut KeyVals, how: &mut OpenHow, locking: &mut Locking) -> Result<(), String> {
    let mut switch = |key: &str| -> Result<Option<bool>, String> {
        let value = options.take(key);
        let read = |value: String| {
            parse_switch(&value).ok_or_else(|| format!("Parameter '{key}' expects 'on' or 'off'"))
        };
        value.map(read).transpose()
    };
    if let Some(read_only) = switch("read-only")? {
        how.read_only = read_only;
    }
    // A file that is not written to makes the disk one that is not.
    if switch("file.read-only")? == Some(true) {
        how.read_only = true;
    }
    if let Some(force_share) = switch("force-share")? {
        how.force_share = force_share;
    }
    if let Some(direct) = switch("cache.direct")?.or(switch("file.cache.direct")?) {
        how.direct = direct;
    }
    if let Some(lazy) = switch("lazy-refcounts")? {
        how.lazy_refcounts = Some(lazy);
    }
    if let Some(keep) = switch("discard-no-unref")? {
        how.discard_no_unref = keep;
    }
    if switch("cache.no-flush")? == Some(true) {
        how.cache = CacheMode::Unsafe;
    }
    how.pass_discards = qcow2_options::take_pass_discards(options)?;
    how.overlap_checks = qcow2_options::take_overlap_checks(options)?;
    qcow2_options::take_clean_interval(options)?;
    if let Some(mode) = options.take("file.locking") {
        *locking = match mode.as_str() {
            "auto" => Locking::Auto,
            "on" => Locking::On,
            "off" => Locking::Off,
            mode => {
                return Err(format!(
                    "Parameter 'locking' does not accept value '{mode}'"
                ));
            }
        };
    }
    if let Some(aio) = options.take("file.aio") {
        how.engine = engine_of_aio(&aio)
            .ok_or_else(|| format!("Parameter 'aio' does not accept value '{aio}'"))?;
    }
    if let Some(policy) = options.take("discard") {
        how.discard = Some(discard_policy(&policy).ok_or("Invalid discard option")?);
    }
    if let Some(mode) = options.take("detect-zeroes") {
        how.detect_zeroes = match mode.as_str() {
            "off" => DetectZeroes::Off,
            "on" => DetectZeroes::On,
            "unmap" => DetectZeroes::Unmap,
            mode => {
                return Err(format!(
                    "Parameter 'detect-zeroes' does not accept value '{mode}'"
                ));
            }
        };
    }
    let raw_data_file = options.get("data-file.driver") == Some("raw");
    if let Some(driver) = options.take("data-file.driver")
        && !matches!(driver.as_str(), "raw" | "file" | "host_device")
    {
        return Err(format!("Unknown driver '{driver}'"));
    }
    let data_file = options.take("data-file.filename");
    let nested = if raw_data_file {
        options.take("data-file.file.driver");
        options.take("data-file.file.filename")
    } else {
        None
    };
    if let Some(path) = data_file.or(nested) {
        how.data_file = Some(path);
    }
    let backing = (
        options.take("backing.driver"),
        options.take("backing.file.filename"),
    );
    options.take("backing.file.driver");
    if let (driver, Some(path)) = backing.clone() {
        let format = driver.map(|driver| named_format(&driver)).transpose()?;
        how.backing = Some(ImageSpec::plain(path, format));
    } else if let (Some(driver), None) = backing {
        how.backing_format = Some(named_format(&driver)?);
    } else if options.take("backing").is_some_and(|name| name.is_empty()) {
        how.no_backing = true;
    }
    Ok(())
}

/// The engine that QEMU's name for an AIO mode asks for: `Some(None)` is the library's default.
pub(crate) fn engine_of_aio(name: &str) -> Option<Option<EngineKind>> {
    match name {
        "threads" => Some(None),
        "native" => Some(Some(EngineKind::LinuxAio)),
        "io_uring" => Some(Some(EngineKind::IoUring)),
        _ => None,
    }
}

/// The policy of that name.
pub(crate) fn discard_policy(name: &str) -> Option<DiscardPolicy> {
    match name {
        "unmap" | "on" => Some(DiscardPolicy::Unmap),
        "ignore" | "off" => Some(DiscardPolicy::Ignore),
        _ => None,
    }
}

fn warn_of_guess(path: &Path) {
    grumble!(
        "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.",
        path.display()
    );
}

/// Why an image could not be opened, without the image's own name in front.
pub(crate) fn explain(error: &Error, path: &Path, persona: Persona) -> String {
    let file = error.file().unwrap_or(path);
    let of_host = match error.kind() {
        ErrorKind::NotFound => Some(errno::text(libc::ENOENT)),
        ErrorKind::Io(number) => Some(errno::text(number)),
        ErrorKind::ReadOnly => Some(errno::text(libc::EROFS)),
        _ => None,
    };
    if persona.is_qemu()
        && let Some(below) = error.message().strip_prefix("backing file: ")
    {
        return match of_host {
            Some(text) => {
                let name = below.split_once(": ").map_or(below, |(name, _)| name);
                format!("Could not open backing file: Could not open '{name}': {text}")
            }
            None => format!("Could not open backing file: {below}"),
        };
    }
    if persona.is_qemu()
        && let Some(below) = error.message().strip_prefix("data file: ")
    {
        let name = below.split_once(": ").map_or(below, |(name, _)| name);
        return match of_host {
            Some(text) => format!("Could not open '{name}': {text}"),
            None => below.to_owned(),
        };
    }
    if persona.is_qemu()
        && let Some(named) = error.message().strip_prefix("backing file format: \"")
    {
        let driver = named.split('"').next().unwrap_or_default();
        return format!("Could not open backing file: Unknown driver '{driver}'");
    }
    let text = match of_host {
        Some(text) if persona.is_qemu() => format!("Could not open '{}': {text}", file.display()),
        _ if error.kind() == ErrorKind::Locked && persona.is_qemu() => {
            let text = error.message();
            let end = text.find(" (is another").unwrap_or(text.len());
            format!(
                "{}\nIs another process using the image [{}]?",
                &text[..end],
                file.display()
            )
        }
        _ if persona.is_qemu() => {
            // The library adds which field has which value.
            let text = error.message();
            let end = text.find(" (field ").unwrap_or(text.len());
            text[..end].to_owned()
        }
        _ if error.file().is_some_and(|file| file != path) => error.to_string(),
        _ => error.message(),
    };
    if persona.is_qemu() && file != path {
        let host = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Io(_));
        return if host {
            format!("Could not open backing file: {text}")
        } else {
            format!(
                "Could not open backing file: Could not open '{}': {text}",
                file.display()
            )
        };
    }
    text
}
