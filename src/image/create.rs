//! Making images: options, backing files, and taking a target away again when it fails.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use block::{Error, Format, Result};
use rustix::fs::{FallocateFlags, IFlags, fallocate, ioctl_getflags, ioctl_setflags};

use crate::{
    image::{
        chain, encryption,
        maintenance::{self, Preallocation, Qcow2Create},
        open::{self, OpenHow},
        qcow2_options::not_a_size,
        spec::ImageSpec,
    },
    util::{
        failure::{Failure, Outcome},
        keyval::{KeyVals, parse_switch},
        persona::Persona,
        size,
    },
};

/// An image to be made, as the command line says it.
#[derive(Clone, Debug)]
pub(crate) struct CreateRequest {
    /// Its file.
    pub(crate) path: PathBuf,
    /// The name as it was given, for messages.
    pub(crate) name: String,
    /// Its format.
    pub(crate) format: Format,
    /// The values of `-o`.
    pub(crate) options: KeyVals,
    /// The size, unless it is in the options or the backing file's.
    pub(crate) size: Option<u64>,
    /// Do not look at the backing file.
    pub(crate) unchecked_backing: bool,
}

/// Everything decided, nothing done yet.
pub(crate) struct Plan {
    path: PathBuf,
    format: Format,
    qcow2: Qcow2Create,
    compat: Option<String>,
    compression: String,
    preallocation: Option<String>,
    encryption: encryption::Wanted,
    /// Nothing of an image that could not be made stays, not even a file that was there before.
    keeps_nothing: bool,
    /// The file is not to be copied on write by its file system.
    nocow: bool,
    /// The first block of a raw image has its place.
    first_block: bool,
}

const QCOW2_KEYS: &[&str] = &[
    "size",
    "backing_file",
    "backing_fmt",
    "cluster_size",
    "compat",
    "compression_type",
    "data_file",
    "data_file_raw",
    "extended_l2",
    "extent_size_hint",
    "lazy_refcounts",
    "nocow",
    "preallocation",
    "refcount_bits",
];
const OTHER_KEYS: &[&str] = &["size", "preallocation", "nocow", "extent_size_hint"];

/// The options that images of a format can be created with, and what they mean.
pub(crate) fn describe_options(format: Format) -> &'static str {
    match format {
        Format::Qcow2 => {
            "\
Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  encrypt.cipher-alg=<str> - Name of encryption cipher algorithm
  encrypt.cipher-mode=<str> - Name of encryption cipher mode
  encrypt.format=<str>   - Encrypt the image, format choices: 'aes', 'luks'
  encrypt.hash-alg=<str> - Name of encryption hash algorithm
  encrypt.iter-time=<num> - Time to spend in PBKDF in milliseconds
  encrypt.ivgen-alg=<str> - Name of IV generator algorithm
  encrypt.ivgen-hash-alg=<str> - Name of IV generator hash algorithm
  encrypt.key-secret=<str> - ID of secret providing qcow AES key or LUKS passphrase
  encryption=<bool (on/off)> - Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)
  extended_l2=<bool (on/off)> - Extended L2 tables
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  nocow=<bool (on/off)>  - Turn off copy-on-write of the file (only works on btrfs)
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size"
        }
        Format::Luks => {
            "\
Supported luks options:
  cipher-alg=<str>       - Name of encryption cipher algorithm
  cipher-mode=<str>      - Name of encryption cipher mode
  hash-alg=<str>         - Name of encryption hash algorithm
  iter-time=<num>        - Time to spend in PBKDF in milliseconds
  ivgen-alg=<str>        - Name of IV generator algorithm
  ivgen-hash-alg=<str>   - Name of IV generator hash algorithm
  key-secret=<str>       - ID of the secret that provides the keyslot passphrase
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size"
        }
        _ => {
            "\
Supported raw options:
  nocow=<bool (on/off)>  - Turn off copy-on-write of the file (only works on btrfs)
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size"
        }
    }
}

/// Decides what to make. Errors carry no name yet.
pub(crate) fn plan(mut request: CreateRequest, persona: Persona) -> Outcome<Plan> {
    let options = &mut request.options;
    let qcow2 = request.format == Format::Qcow2;
    if !qcow2 && (options.get("backing_file").is_some() || options.get("backing_fmt").is_some()) {
        let format = request.format;
        let what = if options.get("backing_file").is_some() {
            "file"
        } else {
            "format"
        };
        return Err(Failure::new(format!(
            "Backing {what} not supported for file format '{format}'"
        )));
    }
    let keys = if qcow2 { QCOW2_KEYS } else { OTHER_KEYS };
    let mut wanted = Qcow2Create {
        backing_file: options.take("backing_file").filter(|name| !name.is_empty()),
        backing_format: options.take("backing_fmt"),
        ..Qcow2Create::default()
    };
    let encryption = encryption::Wanted::take(options, request.format);
    let listed_size = options.take("size");
    let cluster_size = sized(options, "cluster_size")?;
    let refcount_bits = sized(options, "refcount_bits")?;
    let lazy = switch(options, "lazy_refcounts")?;
    let nocow = switch(options, "nocow")?;
    if sized(options, "extent_size_hint")?.is_some_and(|hint| hint != 0) {
        return Err(Failure::new(
            "extent_size_hint: only 0, no hint to the file system, is supported",
        ));
    }
    let extended = switch(options, "extended_l2")?;
    wanted.data_file = options.take("data_file");
    wanted.data_file_raw = switch(options, "data_file_raw")?.unwrap_or(false);
    let compat = options.take("compat");
    let compression = options.take("compression_type");
    let preallocation = options.take("preallocation");
    if let Some(key) = options.first_key() {
        return Err(Failure::new(if keys.contains(&key) {
            format!("Parameter '{key}' is given twice")
        } else {
            format!("Invalid parameter '{key}'")
        }));
    }
    let size = match (request.size, listed_size) {
        (Some(_), Some(_)) => {
            return Err(Failure::new("The image size must be specified only once"));
        }
        (Some(size), None) => Some(size),
        (None, Some(text)) => Some(listed(&text)?),
        (None, None) => None,
    };
    let size = match &wanted.backing_file {
        Some(name) => {
            let below = backing_size(&request, name, wanted.backing_format.as_deref(), persona)?;
            size.or(below)
        }
        None => size,
    };
    wanted.size = size.ok_or_else(|| Failure::new("Image creation needs a size parameter"))?;
    wanted.cluster_size = cluster_size.unwrap_or(65536);
    wanted.refcount_bits = u32::try_from(refcount_bits.unwrap_or(16)).unwrap_or(u32::MAX);
    wanted.lazy_refcounts = lazy.unwrap_or(false);
    wanted.extended_l2 = extended.unwrap_or(false);
    Ok(Plan {
        path: request.path,
        format: request.format,
        qcow2: wanted,
        compat,
        compression: compression.unwrap_or_else(|| "zlib".into()),
        preallocation,
        encryption,
        keeps_nothing: persona.is_qemu() && request.format == Format::Luks,
        nocow: nocow.unwrap_or(false),
        first_block: persona.is_qemu(),
    })
}

/// The size among the options.
fn listed(text: &str) -> Outcome<u64> {
    let negative = text
        .strip_prefix('-')
        .is_some_and(|rest| rest.parse::<u64>().is_ok());
    if negative {
        return Err(Failure::new(format!(
            "Value '{text}' is out of range for parameter 'size'"
        )));
    }
    size::parse(text).map_err(|_| Failure::new(not_a_size("size")))
}

fn sized(options: &mut KeyVals, key: &str) -> Outcome<Option<u64>> {
    let value = options.take(key);
    let read = |text: String| size::parse(&text).map_err(|_| Failure::new(not_a_size(key)));
    value.map(read).transpose()
}

fn switch(options: &mut KeyVals, key: &str) -> Outcome<Option<bool>> {
    let value = options.take(key);
    let read = |text: String| {
        parse_switch(&text)
            .ok_or_else(|| Failure::new(format!("Parameter '{key}' expects 'on' or 'off'")))
    };
    value.map(read).transpose()
}

/// Looks at the backing file: that it is there, what it is, how large.
fn backing_size(
    request: &CreateRequest,
    name: &str,
    format: Option<&str>,
    persona: Persona,
) -> Outcome<Option<u64>> {
    let path = chain::resolve(&request.path, name);
    if path == request.path || name == request.name {
        return Err(Failure::new(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    if request.unchecked_backing {
        return Ok(None);
    }
    let below = |text: String| Failure::new(format!("{text}\nCould not open backing image."));
    let named = match format {
        Some(name) => {
            Some(Format::from_name(name).ok_or_else(|| below(format!("Unknown driver '{name}'")))?)
        }
        None => None,
    };
    let spec = ImageSpec::plain(path, named);
    let how = OpenHow {
        locked: true,
        ..OpenHow::reading()
    };
    let disk = open::open_quietly(&spec, &how, persona).map_err(|text| {
        below(if persona.is_qemu() {
            text
        } else {
            format!("{}: {text}", spec.display())
        })
    })?;
    if named.is_none() {
        return Err(Failure::new(format!(
            "Backing file specified without backing format\nDetected format of {}.",
            disk.format()
        )));
    }
    Ok(Some(disk.size()))
}

impl Plan {
    /// The line that `create` prints.
    pub(crate) fn announcement(&self, name: &str) -> String {
        let mut line = format!("Formatting '{name}', fmt={}", self.format);
        let qcow2 = &self.qcow2;
        let is_qcow2 = self.format == Format::Qcow2;
        if is_qcow2 {
            line += &self.encryption.announcement();
            let extended = if qcow2.extended_l2 { "on" } else { "off" };
            line += &format!(
                " cluster_size={} extended_l2={extended}",
                qcow2.cluster_size
            );
        }
        if let Some(mode) = self.preallocation.as_ref().filter(|_| is_qcow2) {
            line += &format!(" preallocation={mode}");
        }
        if is_qcow2 {
            line += &format!(" compression_type={}", self.compression);
        }
        line += &format!(" size={}", qcow2.size);
        if let Some(compat) = &self.compat {
            line += &format!(" compat={compat}");
        }
        if let Some(backing) = &qcow2.backing_file {
            line += &format!(" backing_file={backing}");
        }
        if let Some(name) = &qcow2.data_file {
            line += &format!(" data_file={name}");
        }
        if qcow2.data_file_raw {
            line += " data_file_raw=on";
        }
        if let Some(format) = &qcow2.backing_format {
            line += &format!(" backing_fmt={format}");
        }
        if is_qcow2 {
            let lazy = if qcow2.lazy_refcounts { "on" } else { "off" };
            line += &format!(
                " lazy_refcounts={lazy} refcount_bits={}",
                qcow2.refcount_bits
            );
        } else {
            line += &self.encryption.announcement();
        }
        if let Some(mode) = self.preallocation.as_ref().filter(|_| !is_qcow2) {
            line += &format!(" preallocation={mode}");
        }
        line
    }

    /// Makes the image. A file that was not there before is taken away again on failure.
    pub(crate) fn execute(mut self) -> Outcome<()> {
        let existed = self.path.symlink_metadata().is_ok();
        let result = self.check().and_then(|()| {
            if self.nocow {
                turn_off_copies(&self.path).map_err(|error| Failure::new(self.reason(&error)))?;
            }
            let made = match self.format {
                Format::Qcow2 => maintenance::create_qcow2(&self.path, &self.qcow2),
                Format::Luks => maintenance::create_luks(&self.path, &self.qcow2),
                _ => self.create_raw(),
            };
            made.map_err(|error| Failure::new(self.reason(&error)))
        });
        if result.is_err() && (!existed || (self.keeps_nothing && self.path.is_file())) {
            // The failure is what matters, not that its remains could not be removed.
            let _ = std::fs::remove_file(&self.path);
        }
        result
    }

    /// What is to be made, once all of it is known to be possible. Nothing is made.
    pub(crate) fn into_checked(mut self) -> Outcome<Qcow2Create> {
        self.check()?;
        if self.format == Format::Qcow2 {
            maintenance::check_wanted(&self.qcow2)
                .map_err(|error| Failure::new(error.message()))?;
        }
        Ok(self.qcow2)
    }

    fn reason(&self, error: &Error) -> String {
        use block::ErrorKind::{Io, NoSpace, NotFound, ReadOnly};
        match error.kind() {
            NotFound | Io(_) | NoSpace | ReadOnly => {
                let text = crate::util::errno::text(error.kind().errno());
                format!("Could not create '{}': {text}", self.path.display())
            }
            _ => error.message(),
        }
    }

    fn create_raw(&self) -> Result<()> {
        let at = |error: std::io::Error| Error::from(error).path(&self.path).operation("create");
        let size = self.qcow2.size;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&self.path)
            .map_err(at)?;
        let kind = file.metadata().map_err(at)?.file_type();
        if !kind.is_file() {
            // A device has its size; nothing to make.
            return Ok(());
        }
        let fill = || -> std::io::Result<()> {
            file.set_len(size)?;
            match self.qcow2.preallocation {
                _ if size == 0 => Ok(()),
                Preallocation::Off | Preallocation::Metadata if self.first_block => {
                    // So that programs which probe a file for its alignment find data to read.
                    let block = if size < 4096 { 512 } else { 4096 };
                    (&file).write_all(&vec![0; size.min(block) as usize])
                }
                Preallocation::Off | Preallocation::Metadata => Ok(()),
                Preallocation::Falloc => Ok(fallocate(&file, FallocateFlags::empty(), 0, size)?),
                Preallocation::Full => write_all_zero(&file, size),
            }
        };
        fill().map_err(at)
    }

    fn check(&mut self) -> Outcome<()> {
        let refuse = |text: &str| Err(Failure::new(text));
        let qcow2 = &mut self.qcow2;
        qcow2.preallocation = match self.preallocation.as_deref() {
            None | Some("off") => Preallocation::Off,
            Some("metadata") if self.format == Format::Qcow2 => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            Some(mode) => {
                return refuse(&format!(
                    "Parameter 'preallocation' does not accept value '{mode}'"
                ));
            }
        };
        qcow2.encrypt = self.encryption.resolve().map_err(Failure::new)?;
        if self.format != Format::Qcow2 {
            return Ok(());
        }
        if !qcow2.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&qcow2.cluster_size) {
            return refuse("Cluster size must be a power of two between 512 and 2048k");
        }
        qcow2.version3 = match self.compat.as_deref() {
            None | Some("1.1" | "v3") => true,
            Some("0.10" | "v2") => false,
            Some(compat) => {
                return refuse(&format!(
                    "Parameter 'version' does not accept value '{compat}'"
                ));
            }
        };
        if !qcow2.refcount_bits.is_power_of_two() || qcow2.refcount_bits > 64 {
            return refuse("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if !qcow2.version3 && qcow2.refcount_bits != 16 {
            return refuse(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if !qcow2.version3 && qcow2.lazy_refcounts {
            return refuse(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 version=v3 or greater)",
            );
        }
        qcow2.zstd = match self.compression.as_str() {
            "zlib" => false,
            "zstd" => true,
            other => {
                return refuse(&format!(
                    "Parameter 'compression-type' does not accept value '{other}'"
                ));
            }
        };
        if qcow2.zstd && !qcow2.version3 {
            return refuse(
                "Non-zlib compression type is only supported with compatibility level 1.1 and \
                 above (use version=v3 or greater)",
            );
        }
        if qcow2.backing_format.is_some() && qcow2.backing_file.is_none() {
            return refuse("Backing format cannot be used without backing file");
        }
        Ok(())
    }
}

/// Asks the file system not to copy the file on write, which it only hears while the file is empty. Where
/// it does not copy at all there is nothing to ask.
fn turn_off_copies(path: &Path) -> Result<()> {
    let at = |error: std::io::Error| Error::from(error).path(path).operation("create");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(at)?;
    if let Ok(flags) = ioctl_getflags(&file) {
        let _ = ioctl_setflags(&file, flags | IFlags::NOCOW);
    }
    Ok(())
}

fn write_all_zero(mut file: &File, size: u64) -> std::io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        let now = left.min(zeroes.len() as u64);
        file.write_all(&zeroes[..now as usize])?;
        left -= now;
    }
    file.sync_all()
}
