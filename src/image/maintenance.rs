//! What is done to qcow2 images as a whole: making, checking, snapshots. The file is opened alone, locked,
//! and no file it names is.

use std::{
    fs::File,
    io::Read,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use block::{
    Error, Format, Locking, Result,
    formats::luks::create as luks,
    formats::qcow2::{
        amend::{self, AmendOptions},
        check::{self, CheckReport, Repair},
        create::{self, CreateOptions, Encrypt},
        header::{CompressionType, FEATURES_OFFSET, Header, MAGIC},
        snapshot::ops::{self, NewSnapshot},
    },
    io::AlignedBuf,
    offline::{OfflineOptions, open_beside, with_file},
};

use crate::image::chain;

/// Whether space is claimed in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Tables.
    Metadata,
    /// Tables and space.
    Falloc,
    /// Tables and space, written.
    Full,
}

/// A qcow2 image to be made.
#[derive(Clone, Debug)]
pub(crate) struct Qcow2Create {
    pub(crate) size: u64,
    pub(crate) cluster_size: u64,
    pub(crate) refcount_bits: u32,
    /// Version 3 of the format (`compat=1.1`), not 2.
    pub(crate) version3: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) zstd: bool,
    pub(crate) extended_l2: bool,
    /// The name of the data file.
    pub(crate) data_file: Option<String>,
    pub(crate) data_file_raw: bool,
    pub(crate) preallocation: Preallocation,
    pub(crate) backing_file: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) encrypt: Option<Encrypt>,
}

impl Default for Qcow2Create {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_size: 65536,
            refcount_bits: 16,
            version3: true,
            lazy_refcounts: false,
            zstd: false,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
            encrypt: None,
        }
    }
}

/// What the library is asked for.
fn create_options(wanted: &Qcow2Create) -> CreateOptions {
    CreateOptions {
        size: wanted.size,
        version: if wanted.version3 { 3 } else { 2 },
        cluster_size: wanted.cluster_size,
        refcount_bits: wanted.refcount_bits,
        lazy_refcounts: wanted.lazy_refcounts,
        compression_type: if wanted.zstd {
            CompressionType::Zstd
        } else {
            CompressionType::Zlib
        },
        preallocation: match wanted.preallocation {
            Preallocation::Off => create::Preallocation::Off,
            Preallocation::Metadata => create::Preallocation::Metadata,
            Preallocation::Falloc => create::Preallocation::Falloc,
            Preallocation::Full => create::Preallocation::Full,
        },
        backing_file: wanted.backing_file.clone().map(String::into_bytes),
        backing_format: wanted.backing_format.clone(),
        encrypt: wanted.encrypt.clone(),
        extended_l2: wanted.extended_l2,
        data_file: wanted.data_file.clone(),
        data_file_raw: wanted.data_file_raw,
    }
}

/// Checks that there can be such an image.
pub(crate) fn check_wanted(wanted: &Qcow2Create) -> Result<()> {
    create_options(wanted).check()
}

/// Makes a qcow2 image.
pub(crate) fn create_qcow2(path: &Path, wanted: &Qcow2Create) -> Result<()> {
    let options = create_options(wanted);
    // Before the file is cut.
    options.check()?;
    with_file(path, OfflineOptions::create(), async |io, file| {
        let Some(name) = &options.data_file else {
            return create::create(io, file, &options).await;
        };
        let beside = chain::resolve(path, name);
        let data = open_beside(io, &beside, OfflineOptions::create())?;
        create::create_with_data_file(io, file, data, &options).await
    })
}

/// Makes a LUKS volume.
pub(crate) fn create_luks(path: &Path, wanted: &Qcow2Create) -> Result<()> {
    let Some(Encrypt::Luks { options, secret }) = &wanted.encrypt else {
        return Err(Error::invalid_argument(
            "Parameter 'key-secret' is required for cipher",
        ));
    };
    let options = luks::CreateOptions {
        size: wanted.size,
        luks: *options,
        secret: secret.clone(),
        preallocation: match wanted.preallocation {
            Preallocation::Off | Preallocation::Metadata => luks::Preallocation::Off,
            Preallocation::Falloc => luks::Preallocation::Falloc,
            Preallocation::Full => luks::Preallocation::Full,
        },
    };
    with_file(path, OfflineOptions::create(), async |io, file| {
        luks::create(io, file, &options).await
    })
}

/// Changes what a qcow2 image is; `step` is told of work done and all the work.
pub(crate) fn amend(
    path: &Path,
    options: &AmendOptions,
    step: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    with_file(path, OfflineOptions::write(), async |io, file| {
        amend::amend(io, file, options, step).await
    })
}

/// Makes a qcow2 image a version 2 one.
pub(crate) fn downgrade(path: &Path, step: &mut dyn FnMut(u64, u64)) -> Result<()> {
    with_file(path, OfflineOptions::write(), async |io, file| {
        amend::downgrade(io, file, step).await
    })
}

/// The format of the file at `path`, as far as checking needs to know.
pub(crate) fn format_of(path: &Path) -> Result<Format> {
    let mut magic = [0; 4];
    let mut file = File::open(path).map_err(|error| Error::from(error).path(path))?;
    Ok(match file.read_exact(&mut magic) {
        Ok(()) if u32::from_be_bytes(magic) == MAGIC => Format::Qcow2,
        _ => Format::Raw,
    })
}

/// An image that cannot be opened at all is no finding of a check.
pub(crate) enum Checked {
    /// The header cannot be used.
    Unusable(Error),
    /// The check, or how it failed.
    Report(Result<CheckReport>),
}

/// Checks a qcow2 image; `say` gets each line that `qemu-img` would print.
pub(crate) fn check_qcow2(
    path: &Path,
    repair: Repair,
    force_share: bool,
    say: &mut dyn FnMut(&str),
) -> Checked {
    let mut options = if repair == Repair::None {
        OfflineOptions::read()
    } else {
        OfflineOptions::write()
    };
    if force_share {
        options.locking = Locking::Off;
    }
    let result = with_file(path, options, async |io, file| {
        let mut header = match Header::read_for_check(io, file).await {
            Ok(header) => header,
            Err(error) => return Ok(Checked::Unusable(error)),
        };
        let report = check::check(io, file, &mut header, repair, say).await;
        // As any other writer does, before anything that it cannot keep up to date goes stale.
        if repair != Repair::None && report.is_ok() && header.clear_for_writing() {
            let bytes = AlignedBuf::from_slice(&header.feature_bytes());
            io.write(file, FEATURES_OFFSET, bytes).await?;
            io.sync(file).await?;
        }
        Ok(Checked::Report(report))
    });
    result.unwrap_or_else(Checked::Unusable)
}

/// What to do with an internal snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SnapshotAction {
    /// Make it.
    Create,
    /// Go back to it.
    Apply,
    /// Forget it.
    Delete,
}

/// Does something with an internal snapshot of a qcow2 image.
pub(crate) fn snapshot(path: &Path, action: SnapshotAction, name: &str) -> Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    with_file(
        path,
        OfflineOptions::write(),
        async |io, file| match action {
            SnapshotAction::Create => {
                let new = NewSnapshot {
                    name: name.to_owned(),
                    date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                    date_nsec: now.subsec_nanos(),
                    icount: Some(0),
                    ..NewSnapshot::default()
                };
                ops::create_offline(io, file, &new).await.map(drop)
            }
            SnapshotAction::Apply => ops::apply_offline(io, file, name).await,
            SnapshotAction::Delete => ops::delete_offline(io, file, name).await,
        },
    )
}
