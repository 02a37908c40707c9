//! Checking an image for consistency, and repairing it.
//!
//! The check walks everything that takes host clusters (header, L1 and L2 tables of the disk and of
//! all snapshots, snapshot table, reference count table and blocks, bitmaps, encryption header),
//! counts the references to each cluster and compares with the reference counts on the disk. Each
//! table is read once, in the order of the file, however many others share it. It says what
//! `qemu-img check` says, in its words.
//!
//! A repair changes reference counts and COPIED flags to what the tables say, never the other way
//! round, and rebuilds the reference counts from nothing where they are unusable.

mod counts;
mod extras;
mod mapping;
mod refcounts;
mod repair;
mod scan;

use serde::Serialize;

use super::header::{ExtensionType, Header, Incompatible};
use crate::{FileId, Result, io::Io};
use counts::Counts;

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Clusters counted too high.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// What a check found. The JSON form has the fields of `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// The end of the last cluster in use, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    /// Compressed clusters of the disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// Clusters of the disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Errors that may mean lost data, and remain.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Errors that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Things that could not be checked or repaired.
    pub check_errors: u64,
    /// Clusters counted too high that remain.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Clusters counted too high that were given back.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Allocated clusters of the disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// The image file.
    pub filename: String,
    /// The format: `qcow2`.
    pub format: String,
    /// Allocated clusters of the disk that do not follow their predecessor.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// The check could not go on to its end: the other fields are not complete.
    #[serde(skip)]
    pub stopped: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl CheckReport {
    /// Whether nothing wrong remains.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.check_errors == 0 && self.corruptions == 0 && self.leaks == 0
    }
}

/// Most host clusters that are checked, as in QEMU.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// Checks an image and repairs what `repair` allows; `say` gets each line that qemu-img would
/// print. Nobody else uses the image meanwhile. The header comes from
/// [`Header::read_for_check`]; it is changed along with the image.
///
/// # Errors
/// The host's. What is wrong with the image is in the report.
pub async fn check(
    io: &Io,
    file: FileId,
    header: &mut Header,
    repair: Repair,
    say: &mut dyn FnMut(&str),
) -> Result<CheckReport> {
    let file_len = io.file_len(file)?;
    let clusters = file_len.div_ceil(header.cluster_size());
    let mut checker = Checker {
        io,
        file,
        repair,
        say,
        file_len,
        report: CheckReport {
            filename: io.file_path(file).to_string_lossy().into_owned(),
            format: "qcow2".into(),
            total_clusters: header.size.div_ceil(header.cluster_size()),
            ..CheckReport::default()
        },
        counted: Counts::default(),
        disk: Counts::default(),
        damage: Damage::default(),
        rebuild: false,
        needs_copied_pass: false,
        snapshots_need_rewrite: false,
        forget_blocks: false,
        header,
    };
    if clusters > MAX_CLUSTERS {
        checker.error(&format!(
            "ERROR: image file too large to check ({clusters} clusters, expected at most \
             {MAX_CLUSTERS})"
        ));
        checker.report.stopped = true;
        return Ok(checker.report);
    }
    checker.counted = Counts::new(clusters);
    checker.disk = Counts::new(clusters);
    let stopped = checker.run().await?.is_none();
    let mut report = checker.report;
    report.stopped = stopped;
    Ok(report)
}

/// Corruptions by where they are: what a repair changes decides which of them it repairs.
#[derive(Debug, Default)]
struct Damage {
    /// In the mapping, the snapshot table and the bitmaps.
    mapping: u64,
    /// In the snapshot table, where a repair writes it anew.
    snapshots: u64,
    /// In the structure of the reference counts.
    structure: u64,
    /// Reference counts that are too low.
    low: u64,
    /// Wrong COPIED flags.
    copied: u64,
}

struct Checker<'a> {
    io: &'a Io,
    file: FileId,
    header: &'a mut Header,
    repair: Repair,
    say: &'a mut dyn FnMut(&str),
    file_len: u64,
    report: CheckReport,
    /// References found.
    counted: Counts,
    /// Reference counts on the disk.
    disk: Counts,
    damage: Damage,
    /// The reference counts cannot be repaired where they are.
    rebuild: bool,
    /// COPIED flags were found wrong, or reference counts changed.
    needs_copied_pass: bool,
    snapshots_need_rewrite: bool,
    /// Entries of the reference count table name blocks outside the file, and are to be cleared.
    forget_blocks: bool,
}

/// What a mapping walk is about: kept small for the loops over entries.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    cluster_bits: u32,
    cluster_size: u64,
    version: u32,
    extended_l2: bool,
    data_file: bool,
}

impl Checker<'_> {
    /// `None` when the check could not go on.
    async fn run(&mut self) -> Result<Option<()>> {
        let Some(snapshots) = self.read_snapshots().await? else {
            return Ok(None);
        };
        let mut blocks = self.load_refcounts().await?;
        self.reference(0, self.header.cluster_size(), 1);
        let mapping = self.walk_mapping(&snapshots).await?;
        let rewrites = self.snapshots_need_rewrite && self.repair == Repair::All;
        let table_len = if rewrites {
            snapshots.byte_len()
        } else {
            snapshots.len
        };
        self.reference(self.header.snapshots_offset, table_len, 1);
        if let Some(crypto) = self.header.crypto_header() {
            self.reference(crypto.offset, crypto.length, 1);
        }
        if self.walk_bitmaps().await?.is_none() {
            self.sum_up();
            return Ok(None);
        }
        self.reference_refcounts(&mut blocks);
        if rewrites {
            self.rewrite_snapshots(&snapshots).await?;
        }
        if self.repair == Repair::All {
            self.fix_misaligned_zeroes(&mapping).await?;
        }
        self.compare();

        if self.rebuild && self.repair == Repair::All {
            self.rebuild_refcounts(&blocks).await?;
        } else if self.repair != Repair::None {
            if self.rebuild {
                self.error("ERROR need to rebuild refcount structures");
                self.sum_up();
                return Ok(None);
            }
            if self.forget_blocks {
                self.forget_outside(&mut blocks).await?;
            }
            if self.damage.low > 0 || self.report.leaks > 0 {
                self.fix_refcounts(&blocks).await?;
            }
        }
        if self.needs_copied_pass {
            self.check_copied(&mapping).await?;
        }
        self.sum_up();
        if self.repair != Repair::None {
            self.mark_consistent().await?;
        }
        Ok(Some(()))
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.header.cluster_bits,
            cluster_size: self.header.cluster_size(),
            version: self.header.version,
            extended_l2: self.header.has(Incompatible::EXTENDED_L2),
            data_file: self.header.has(Incompatible::DATA_FILE),
        }
    }

    fn sum_up(&mut self) {
        let damage = &self.damage;
        self.report.corruptions =
            damage.mapping + damage.snapshots + damage.structure + damage.low + damage.copied;
    }

    /// Something could not be checked or repaired.
    fn error(&mut self, line: &str) {
        (self.say)(line);
        self.report.check_errors += 1;
    }

    /// Something in the mapping is wrong.
    fn corruption(&mut self, line: &str) {
        (self.say)(line);
        self.damage.mapping += 1;
    }

    /// Counts `times` references to each cluster of a range; a range that is not in the file is a
    /// corruption. Returns whether it was counted.
    fn reference(&mut self, offset: u64, len: u64, times: u64) -> bool {
        if len == 0 {
            return true;
        }
        let cluster_size = self.header.cluster_size();
        // The last cluster of the file may be cut short.
        let end = offset.saturating_add(len);
        if end.saturating_sub(self.file_len) >= cluster_size {
            self.corruption(&format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster \
                 or more: offset {offset:#x} size {len:#x}"
            ));
            return false;
        }
        let last = (end - 1) >> self.header.cluster_bits;
        if last >= self.counted.len() {
            self.counted.grow(last + 1);
            self.disk.grow(last + 1);
        }
        for cluster in offset >> self.header.cluster_bits..=last {
            self.count(cluster, times);
        }
        true
    }

    /// Counts `times` references to a cluster inside the file.
    #[inline]
    fn count(&mut self, cluster: u64, times: u64) {
        self.counted.add(cluster, times);
        if self.header.refcount_order < 5 {
            let max = self.header.refcount_max();
            if u64::from(self.counted.get(cluster)) > max {
                self.overflow(cluster);
            }
        }
    }

    #[cold]
    fn overflow(&mut self, cluster: u64) {
        let offset = cluster << self.header.cluster_bits;
        self.corruption(&format!("ERROR: overflow cluster offset={offset:#x}"));
        (self.say)(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a \
             clean copy if the image cannot be opened for writing",
        );
    }

    /// The references to a cluster as a reference count can say them.
    fn wanted(&self, counted: u32) -> u32 {
        u64::from(counted).min(self.header.refcount_max()) as u32
    }

    /// Compares references with reference counts.
    fn compare(&mut self) {
        let max = self.header.refcount_max();
        let (mut low, mut leaks, mut rebuild) = (0, 0, false);
        let say = &mut self.say;
        self.disk
            .for_each_difference(&self.counted, 0, u64::MAX, |cluster, disk, counted| {
                let counted = u64::from(counted).min(max) as u32;
                if disk == counted {
                    return;
                }
                rebuild |= disk == 0;
                let kind = if disk < counted {
                    low += 1;
                    "ERROR"
                } else {
                    leaks += 1;
                    "Leaked"
                };
                say(&format!(
                    "{kind} cluster {cluster} refcount={disk} reference={counted}"
                ));
            });
        self.damage.low = low;
        self.report.leaks = leaks;
        self.rebuild |= rebuild;
        self.set_image_end();
    }

    fn set_image_end(&mut self) {
        let highest = self.counted.highest().max(self.disk.highest()).unwrap_or(0);
        self.report.image_end_offset = (highest + 1) << self.header.cluster_bits;
    }

    /// After a repair that left nothing wrong: the image is neither dirty nor corrupt.
    async fn mark_consistent(&mut self) -> Result<()> {
        if self.report.check_errors > 0 || self.report.corruptions > 0 {
            return Ok(());
        }
        let dirty = self.header.has(Incompatible::DIRTY) || self.header.has(Incompatible::CORRUPT);
        if dirty {
            self.io.sync(self.file).await?;
            self.header
                .incompatible_features
                .remove(Incompatible::DIRTY);
            self.header
                .incompatible_features
                .remove(Incompatible::CORRUPT);
            self.header.write_features(self.io, self.file).await?;
        }
        if self.header.extension(ExtensionType::UNFINISHED).is_some() {
            self.io.sync(self.file).await?;
            self.header.set_extension(ExtensionType::UNFINISHED, None);
            self.header.write(self.io, self.file).await?;
        }
        Ok(())
    }
}
