//! Finding out what an image is from its bytes, and keeping a guessed raw disk from becoming
//! something else.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Format, GuestRange, crypto::luks::MAGIC, sync::Notify};

/// Bytes from the start that detection looks at.
pub(crate) const HEAD_LEN: u64 = 512;
/// Bytes from the end that detection looks at.
pub(crate) const TAIL_LEN: u64 = 512;

/// What detection recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recognised {
    /// A format that opens.
    Known(Format),
    /// A format that is known by its magic and does not open.
    Foreign(&'static str),
}

impl std::fmt::Display for Recognised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Recognised::Known(format) => write!(f, "{format}"),
            Recognised::Foreign(name) => f.write_str(name),
        }
    }
}

/// The ranges of a disk of `size` bytes that detection reads.
pub(crate) fn probed_ranges(size: u64) -> impl Iterator<Item = GuestRange> {
    let head = GuestRange::new(0, size.min(HEAD_LEN));
    let tail_len = size.min(TAIL_LEN);
    let tail = GuestRange::new(size - tail_len, tail_len);
    [head, tail].into_iter().filter(|range| range.len > 0)
}

/// The bytes that detection looks at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Probe {
    head: Vec<u8>,
    tail: Vec<u8>,
}

/// Magics at a fixed offset from the start.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc (VHD)"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
];

impl Probe {
    /// Adds the bytes of one of [`probed_ranges`].
    pub(crate) fn add(&mut self, range: GuestRange, bytes: &[u8]) {
        if range.start.0 == 0 && self.head.is_empty() {
            self.head = bytes.to_vec();
        }
        // A disk of one probe length has one range that is both.
        self.tail = bytes.to_vec();
    }

    /// The format that the bytes say; `None` is raw.
    pub(crate) fn recognise(&self) -> Option<Recognised> {
        if let Some(magic) = self.head.get(..8)
            && magic.starts_with(b"QFI\xfb")
        {
            return Some(match magic[4..8] {
                [0, 0, 0, 1] => Recognised::Foreign("qcow"),
                _ => Recognised::Known(Format::Qcow2),
            });
        }
        // Version 1; another version is known and does not open.
        if let Some(rest) = self.head.strip_prefix(MAGIC) {
            return Some(if rest.starts_with(&[0, 1]) {
                Recognised::Known(Format::Luks)
            } else {
                Recognised::Foreign("LUKS2")
            });
        }
        for (at, magic, name) in MAGICS {
            if self
                .head
                .get(*at..)
                .is_some_and(|rest| rest.starts_with(magic))
            {
                return Some(Recognised::Foreign(name));
            }
        }
        // Footers: the last sector; a VHD footer may be one byte shorter.
        if self.tail.starts_with(b"conectix") || self.tail.get(1..9) == Some(b"conectix") {
            return Some(Recognised::Foreign("vpc (VHD)"));
        }
        if self.tail.starts_with(b"koly") {
            return Some(Recognised::Foreign("dmg"));
        }
        None
    }
}

/// Watches the bytes that detection reads, on a disk whose raw format was guessed.
#[derive(Debug, Default)]
pub(crate) struct RawGuard {
    busy: AtomicBool,
    changed: Notify,
}

/// One checked write at a time: two could together write what neither may.
pub(crate) struct GuardLease<'a>(&'a RawGuard);

impl RawGuard {
    /// Whether a write to the range must be checked.
    pub(crate) fn concerns(&self, range: GuestRange, size: u64) -> bool {
        range.len > 0 && (range.start.0 < HEAD_LEN || range.end() > size.saturating_sub(TAIL_LEN))
    }

    /// Waits for the turn to check and write.
    pub(crate) async fn enter(&self) -> GuardLease<'_> {
        self.changed
            .until(|| (!self.busy.swap(true, Ordering::AcqRel)).then_some(()))
            .await;
        GuardLease(self)
    }
}

impl Drop for GuardLease<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognise(head: &[u8], tail: &[u8]) -> Option<Recognised> {
        Probe {
            head: head.to_vec(),
            tail: tail.to_vec(),
        }
        .recognise()
    }

    #[test]
    fn recognises_magics_and_footers() {
        assert_eq!(
            recognise(b"QFI\xfb\0\0\0\x03", b""),
            Some(Recognised::Known(Format::Qcow2))
        );
        assert_eq!(
            recognise(b"QFI\xfb\0\0\0\x01", b""),
            Some(Recognised::Foreign("qcow"))
        );
        assert_eq!(
            recognise(b"vhdxfile", b""),
            Some(Recognised::Foreign("vhdx"))
        );
        assert_eq!(
            recognise(&[0; 512], b"conectix"),
            Some(Recognised::Foreign("vpc (VHD)"))
        );
        assert_eq!(
            recognise(b"LUKS\xba\xbe\0\x01", b""),
            Some(Recognised::Known(Format::Luks))
        );
        assert_eq!(
            recognise(b"LUKS\xba\xbe\0\x02", b""),
            Some(Recognised::Foreign("LUKS2"))
        );
        assert_eq!(recognise(b"QFI", b""), None);
        assert_eq!(recognise(b"", b""), None);
    }

    #[test]
    fn the_guard_concerns_both_ends() {
        let guard = RawGuard::default();
        let size = 1 << 20;
        assert!(guard.concerns(GuestRange::new(511, 1), size));
        assert!(!guard.concerns(GuestRange::new(512, 512), size));
        assert!(guard.concerns(GuestRange::new(size - 1024, 513), size));
        assert!(!guard.concerns(GuestRange::new(size - 1024, 512), size));
    }
}
