//! The header area is more than one sector, and a power cut may leave any of its sectors old: names and
//! extensions are then the old ones or the new ones, whole.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{path::Path, sync::Arc};

use block::{
    FileId, Result,
    formats::qcow2::{
        create::{CreateOptions, create},
        header::{Extension, ExtensionType, Header},
    },
    io::{
        Host, Io,
        sim::{SimConfig, SimFault, SimHost, SimOp},
    },
    offline::{OfflineOptions, with_file_on},
};

const IMAGE: &str = "a.qcow2";
/// An extension that nobody knows.
const UNKNOWN: ExtensionType = ExtensionType(0x1234_5678);

fn on<T>(host: &SimHost, work: impl AsyncFnOnce(&Io, FileId) -> Result<T>) -> Result<T> {
    let mut options = OfflineOptions::write();
    options.file.create = true;
    let host: Arc<dyn Host> = Arc::new(host.clone());
    with_file_on(host, Path::new(IMAGE), options, work)
}

fn read(host: &SimHost) -> Result<Header> {
    on(host, async |io, file| Header::read(io, file).await)
}

/// What must not be torn.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parts {
    version: u32,
    backing: Option<String>,
    format: Option<String>,
    /// Without the feature names, which are for other programs, and what a cut may leave in front.
    extensions: Vec<(ExtensionType, Vec<u8>)>,
}

fn parts(header: &Header) -> Parts {
    let passing = [ExtensionType::FEATURE_NAMES, ExtensionType::MOVED];
    let kept = |one: &&Extension| !passing.contains(&one.kind);
    let mut extensions: Vec<_> = header
        .extensions
        .iter()
        .filter(kept)
        .map(|one| (one.kind, one.data.clone()))
        .collect();
    extensions.sort_by_key(|(kind, _)| kind.0);
    Parts {
        version: header.version,
        backing: header.backing_file_name(),
        format: header.backing_format(),
        extensions,
    }
}

/// An image with that backing file name and an unknown extension of that many bytes.
fn make(host: &SimHost, version: u32, cluster_size: u64, name: &str, unknown: usize) {
    let options = CreateOptions {
        size: 1 << 20,
        version,
        cluster_size,
        backing_file: Some(name.into()),
        backing_format: Some("raw".into()),
        ..CreateOptions::default()
    };
    on(host, async |io, file| {
        create(io, file, &options).await?;
        let mut header = Header::read(io, file).await?;
        header.set_extension(UNKNOWN, Some(vec![0xee; unknown]));
        header.write(io, file).await
    })
    .unwrap();
}

type Change = fn(&mut Header);

const LONG: &str = "a/much/longer/name/of/a/backing/file/in/a/folder/that/somebody/has/named/at/length/\
                    so/that/it/is/moved/across/a/sector.qcow2";

const CHANGES: [(&str, Change); 6] = [
    ("a first bitmap", |header| {
        header.set_extension(ExtensionType::BITMAPS, Some(vec![0x42; 24]));
    }),
    ("another name", |header| {
        header
            .set_backing(Some(LONG.as_bytes()), Some("qcow2"))
            .unwrap();
    }),
    ("no backing file", |header| {
        header.set_backing(None, None).unwrap();
    }),
    ("a longer extension", |header| {
        header.set_extension(UNKNOWN, Some(vec![0xdd; 300]));
    }),
    ("an extension less", |header| {
        header.set_extension(UNKNOWN, None);
    }),
    ("version 3", |header| {
        if header.version == 2 {
            header.upgrade();
        }
    }),
];

#[test]
fn a_cut_leaves_the_old_header_or_the_new_one() {
    let mut cuts = 0;
    let names = ["base", LONG];
    let cases = [
        (3, 65536, 8),
        (3, 65536, 360),
        (2, 65536, 400),
        (3, 4096, 100),
    ];
    for (version, cluster_size, unknown) in cases.into_iter().chain([(3, 1024, 8), (2, 1024, 8)]) {
        for (name, (change_name, change)) in names
            .iter()
            .flat_map(|name| CHANGES.map(|change| (*name, change)))
        {
            for seed in 0..6 {
                for (op, skip) in
                    (0..9).flat_map(|skip| [(SimOp::Write, skip), (SimOp::Sync, skip)])
                {
                    let what = format!(
                        "v{version} {cluster_size}, extension of {unknown}, {change_name} over \
                         {name:.8}: cut at {op:?} {skip}, seed {seed}"
                    );
                    let mut config = SimConfig::seeded(seed * 131 + skip);
                    config.sector = 512;
                    let host = SimHost::new(config);
                    make(&host, version, cluster_size, name, unknown);
                    let old = read(&host).unwrap();
                    let mut new = old.clone();
                    change(&mut new);
                    let larger = change_name == "a longer extension" && cluster_size == 1024;
                    if larger || new.to_bytes().is_err() {
                        // No room in that cluster, or none for anything beside it.
                        continue;
                    }
                    host.inject(SimFault {
                        path: None,
                        op,
                        skip,
                        count: u64::MAX,
                        errno: libc::EIO,
                    });
                    let written = on(&host, async |io, file| new.write(io, file).await);
                    let after = host.power_cut();
                    let found = read(&after).unwrap_or_else(|error| panic!("{what}: {error}"));
                    let found = parts(&found);
                    assert!(
                        found == parts(&new) || (written.is_err() && found == parts(&old)),
                        "{what}: {found:#?}"
                    );
                    cuts += 1;
                    // What was left half-way is put right by the next change.
                    on(&after, async |io, file| {
                        let mut header = Header::read(io, file).await?;
                        header.set_extension(UNKNOWN, Some(vec![0xcc; 16]));
                        header.write(io, file).await?;
                        let again = Header::read(io, file).await?;
                        assert_eq!(parts(&again), parts(&header), "{what}");
                        Ok(())
                    })
                    .unwrap();
                    if written.is_ok() {
                        break;
                    }
                }
            }
        }
    }
    assert!(cuts > 500, "{cuts}");
}
