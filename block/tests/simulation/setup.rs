//! What a simulated run is about: an image, how it is opened, and what goes wrong. All of it follows
//! from the seed.

use std::{path::Path, sync::Arc, time::Duration};

use block::{
    CacheMode, DetectZeroes, DiscardPolicy, Disk, DiskFile, Format, OpenOptions, Result,
    formats::qcow2::{
        check::{CheckReport, Repair, check},
        create::{CreateOptions, create, create_with_data_file},
        header::{CompressionType, ExtensionType, Header, Incompatible},
    },
    io::{
        Host, IoAlignment,
        sim::{SimConfig, SimHost},
    },
    offline::{OfflineOptions, open_beside, with_file_on},
};

use crate::model::{self, Id, ZERO};

/// The write that the backing file holds, and the one that the image holds at first.
pub(crate) const BASE: Id = 1;

pub(crate) const IMAGE: &str = "disk.img";
pub(crate) const BACKING: &str = "base.img";
pub(crate) const DATA: &str = "data.img";

/// Random numbers (SplitMix64).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// What a run may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// No errors, no two changes of the same bytes in flight: every read is checked exactly.
    Exact,
    /// Requests in flight overlap.
    Overlap,
    /// Host operations fail.
    Faults,
}

/// What is below the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    Raw { len: u64 },
    Qcow2 { len: u64, cluster_size: u64 },
}

impl Below {
    #[allow(clippy::len_without_is_empty)]
    fn len(self) -> u64 {
        match self {
            Below::Nothing => 0,
            Below::Raw { len } | Below::Qcow2 { len, .. } => len,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) mode: Mode,
    pub(crate) format: Format,
    pub(crate) cluster_size: u64,
    pub(crate) version: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) compression: CompressionType,
    /// Subclusters.
    pub(crate) extended: bool,
    /// Reference counts are written when the image is closed.
    pub(crate) lazy: bool,
    /// Guest data is in a file of its own, and that is a raw disk.
    pub(crate) data_file: Option<bool>,
    pub(crate) below: Below,
    pub(crate) size: u64,
    pub(crate) max_size: u64,
    pub(crate) sector: u32,
    pub(crate) alignment: Option<IoAlignment>,
    pub(crate) tiny_cache: bool,
    pub(crate) cache_mode: CacheMode,
    pub(crate) restartable: bool,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) discard: DiscardPolicy,
    pub(crate) queues: u64,
    pub(crate) depth: u32,
    pub(crate) steps: u64,
    pub(crate) lives: u64,
}

impl Setup {
    pub(crate) fn random(seed: u64, mode: Mode) -> Self {
        let rng = &mut Rng::new(seed);
        let version = if rng.one_in(4) { 2 } else { 3 };
        let extended = version == 3 && rng.one_in(5);
        let cluster_size = if extended {
            16384 << rng.below(2)
        } else {
            512 << rng.pick(&[0, 0, 0, 1, 2, 3, 4, 5, 7])
        };
        let lazy = version == 3 && rng.one_in(5);
        // A few tables' worth, so that small clusters have many L2 tables and refcount blocks.
        let clusters = 20 + rng.below(180);
        let unit = cluster_size.min(4096);
        let size = (cluster_size * clusters + rng.below(cluster_size / 512) * 512).min(1 << 20);
        let max_size = size.next_multiple_of(4096) + rng.below(40) * unit;
        let below_len = |rng: &mut Rng| match rng.below(3) {
            0 => size,
            1 => rng.below(size / 512).max(1) * 512,
            _ => size + rng.below(64) * 512,
        };
        let below = match rng.below(4) {
            0 => Below::Raw {
                // A raw backing file may end anywhere.
                len: below_len(rng) - rng.pick(&[0, 0, 1, 300]),
            },
            1 => Below::Qcow2 {
                len: below_len(rng),
                cluster_size: 512 << rng.below(6),
            },
            _ => Below::Nothing,
        };
        let format = if rng.one_in(8) {
            Format::Raw
        } else {
            Format::Qcow2
        };
        let data_file =
            (version == 3 && format == Format::Qcow2 && rng.one_in(6)).then(|| rng.one_in(2));
        let alignment = match rng.below(4) {
            0 => Some(4096),
            1 => Some(512),
            _ => None,
        };
        Self {
            seed,
            mode,
            format,
            cluster_size,
            version,
            refcount_bits: if version == 2 { 16 } else { 1 << rng.below(7) },
            compression: if version == 3 && rng.one_in(2) {
                CompressionType::Zstd
            } else {
                CompressionType::Zlib
            },
            extended,
            lazy,
            data_file,
            below: if format == Format::Raw || data_file == Some(true) {
                Below::Nothing
            } else {
                below
            },
            size: match (format, alignment) {
                // The last sector is not all there.
                (Format::Raw, None) if rng.one_in(2) => size - 200,
                // Direct I/O makes a file longer for a moment that ends inside a host block: a cut
                // may leave it so.
                (Format::Raw, Some(unit)) => size.next_multiple_of(u64::from(unit)),
                _ => size,
            },
            max_size,
            sector: if alignment == Some(4096) || rng.one_in(4) {
                4096
            } else {
                512
            },
            alignment: alignment.map(|offset| IoAlignment {
                memory: offset,
                offset,
            }),
            tiny_cache: rng.one_in(2),
            cache_mode: if rng.one_in(10) {
                CacheMode::WriteThrough
            } else {
                CacheMode::WriteBack
            },
            restartable: rng.one_in(8),
            detect_zeroes: rng.pick(&[
                DetectZeroes::Off,
                DetectZeroes::Off,
                DetectZeroes::Off,
                DetectZeroes::On,
                DetectZeroes::Unmap,
            ]),
            discard: if rng.one_in(10) {
                DiscardPolicy::Ignore
            } else {
                DiscardPolicy::Unmap
            },
            queues: 1 + rng.below(3),
            depth: 1 + rng.below(12) as u32,
            steps: 40 + rng.below(120),
            lives: 1 + rng.below(3),
        }
    }

    /// What sizes are multiples of.
    pub(crate) fn size_unit(&self) -> u64 {
        match (self.format, self.alignment) {
            (Format::Raw, Some(alignment)) => u64::from(alignment.offset),
            _ => 512,
        }
    }

    /// What the guest sees of the size.
    pub(crate) fn guest_size(&self) -> u64 {
        self.size.next_multiple_of(512)
    }

    pub(crate) fn host(&self) -> SimHost {
        let mut config = SimConfig::seeded(self.seed);
        config.sector = self.sector;
        if let Some(alignment) = self.alignment {
            config.alignment = alignment;
        }
        config.max_delay = Duration::from_micros(if self.seed.is_multiple_of(2) {
            200
        } else {
            2000
        });
        SimHost::new(config)
    }

    /// What goes wrong from now on.
    pub(crate) fn start_trouble(&self, host: &SimHost, rng: &mut Rng) {
        host.configure(|config| {
            config.p_short = rng.pick(&[0.0, 0.1, 0.5]);
            config.p_eintr = rng.pick(&[0.0, 0.05]);
            config.p_inline = rng.pick(&[0.0, 0.0, 0.3]);
            if self.mode == Mode::Faults {
                config.p_error = rng.pick(&[0.0, 0.002, 0.02]);
                config.p_enospc = rng.pick(&[0.0, 0.02, 0.2]);
            }
        });
    }

    pub(crate) fn end_trouble(&self, host: &SimHost) {
        host.configure(|config| {
            config.p_short = 0.0;
            config.p_eintr = 0.0;
            config.p_error = 0.0;
            config.p_enospc = 0.0;
        });
    }

    pub(crate) fn options(&self) -> OpenOptions {
        let options = OpenOptions::new()
            .format(self.format)
            .direct(self.alignment.is_some())
            .cache_mode(self.cache_mode)
            .restartable(self.restartable)
            .detect_zeroes(self.detect_zeroes)
            .discard(self.discard);
        if self.tiny_cache {
            options.metadata_cache_size(0)
        } else {
            options
        }
    }

    pub(crate) fn options_are_write_through(&self) -> bool {
        self.cache_mode == CacheMode::WriteThrough
    }

    pub(crate) fn open(&self, host: &SimHost) -> Result<Disk> {
        self.options().open_on(IMAGE, Arc::new(host.clone()))
    }

    /// What the new image holds at a place.
    pub(crate) fn held(&self, at: u64) -> Id {
        if at < self.below.len() { BASE } else { ZERO }
    }

    /// Makes the files.
    pub(crate) fn make(&self, host: &SimHost) {
        match self.below {
            Below::Nothing => {}
            Below::Raw { len } => {
                host.create(BACKING, &model::bytes(BASE, 0, len));
            }
            Below::Qcow2 { len, cluster_size } => self.make_base(host, len, cluster_size),
        }
        match self.format {
            Format::Qcow2 => self.make_qcow2(
                host,
                IMAGE,
                self.size,
                self.cluster_size,
                match self.below {
                    Below::Nothing => None,
                    Below::Raw { .. } => Some("raw"),
                    Below::Qcow2 { .. } => Some("qcow2"),
                },
            ),
            _ => {
                host.create(IMAGE, &vec![0; self.size as usize]);
            }
        }
    }

    fn make_qcow2(
        &self,
        host: &SimHost,
        path: &str,
        size: u64,
        cluster_size: u64,
        over: Option<&str>,
    ) {
        let top = path == IMAGE;
        let data_file = self.data_file.filter(|_| top);
        let options = CreateOptions {
            extended_l2: self.extended && top,
            lazy_refcounts: self.lazy && top,
            data_file: data_file.map(|_| DATA.into()),
            data_file_raw: data_file == Some(true),
            size,
            version: self.version,
            cluster_size,
            refcount_bits: self.refcount_bits,
            compression_type: self.compression,
            backing_file: over.map(|_| BACKING.into()),
            backing_format: over.map(Into::into),
            ..CreateOptions::default()
        };
        let host: Arc<dyn Host> = Arc::new(host.clone());
        with_file_on(
            host,
            Path::new(path),
            OfflineOptions::create(),
            async |io, file| {
                if options.data_file.is_none() {
                    return create(io, file, &options).await;
                }
                let data = open_beside(io, Path::new(DATA), OfflineOptions::create())?;
                create_with_data_file(io, file, data, &options).await
            },
        )
        .unwrap();
    }

    /// A backing image, partly compressed.
    fn make_base(&self, host: &SimHost, len: u64, cluster_size: u64) {
        self.make_qcow2(host, BACKING, len, cluster_size, None);
        let disk = OpenOptions::new()
            .open_on(BACKING, Arc::new(host.clone()))
            .unwrap();
        let mut at = 0;
        while at < len {
            let part = (len - at).min(cluster_size);
            let bytes = model::bytes(BASE, at, part);
            if (at / cluster_size).is_multiple_of(3) {
                disk.write_compressed(&bytes, at).unwrap();
            } else {
                disk.write_at(&bytes, at).unwrap();
            }
            at += part;
        }
        disk.close().unwrap();
    }

    /// Checks the metadata of the image.
    pub(crate) fn check(&self, host: &SimHost) -> (CheckReport, Vec<String>) {
        let mut lines = Vec::new();
        if self.format != Format::Qcow2 {
            return (CheckReport::default(), lines);
        }
        let host: Arc<dyn Host> = Arc::new(host.clone());
        let report = with_file_on(
            host,
            Path::new(IMAGE),
            OfflineOptions::read(),
            async |io, file| {
                let mut header = Header::read_for_check(io, file).await?;
                if is_marked(&header) {
                    // Not before the repair by the next open for writing.
                    return Ok(CheckReport::default());
                }
                check(io, file, &mut header, Repair::None, &mut |line| {
                    lines.push(line.to_owned());
                })
                .await
            },
        )
        .unwrap();
        (report, lines)
    }

    /// The part of a range that a discard makes zero for certain.
    pub(crate) fn discarded(&self, start: u64, end: u64, size: u64) -> (u64, u64) {
        if self.discard == DiscardPolicy::Ignore {
            return (start, start);
        }
        match self.format {
            Format::Raw => (start, end),
            _ if self.version == 2 && self.below != Below::Nothing => (start, start),
            _ => {
                let unit = if self.extended {
                    self.cluster_size / 32
                } else {
                    self.cluster_size
                };
                let first = start.next_multiple_of(unit);
                let last = if end == size { end } else { end / unit * unit };
                if first < last {
                    (first, last)
                } else {
                    (start, start)
                }
            }
        }
    }
}

/// Whether the image says that its counts are wrong, and is repaired by the next open for writing.
pub(crate) fn is_marked(header: &Header) -> bool {
    header.has(Incompatible::DIRTY) || header.extension(ExtensionType::UNFINISHED).is_some()
}
