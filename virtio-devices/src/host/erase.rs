//! Erasing a whole disk: sanitize operations, secure erase.

use block::AsyncDiskFile;
use serde::{Deserialize, Serialize};

/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// How a disk is erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Action {
    /// Everything is overwritten once with zeroes, and its space given back.
    BlockErase,
    /// Everything is overwritten with a pattern, so many times (0 is 16).
    Overwrite {
        pattern: u32,
        passes: u8,
        /// Every pass writes the complement of the pass after it; the last one writes the pattern.
        invert: bool,
    },
    /// No disk offers it; a sidecar may name it.
    CryptoErase,
}

impl Action {
    fn passes(self) -> u64 {
        match self {
            Action::Overwrite { passes: 0, .. } => 16,
            Action::Overwrite { passes, .. } => u64::from(passes),
            Action::BlockErase | Action::CryptoErase => 1,
        }
    }

    /// What is written with `left` passes to come.
    fn word(self, left: u64) -> u32 {
        match self {
            Action::Overwrite {
                pattern, invert, ..
            } if invert && !left.is_multiple_of(2) => !pattern,
            Action::Overwrite { pattern, .. } => pattern,
            Action::BlockErase | Action::CryptoErase => 0,
        }
    }
}

/// Overwrites or erases a whole disk, durably; false if `stopped` said so before the end. `progress` is
/// told parts of 65536.
///
/// # Errors
/// The disk's.
pub(crate) fn erase(
    disk: &dyn AsyncDiskFile,
    action: Action,
    stopped: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u32),
) -> block::Result<bool> {
    let passes = action.passes();
    let gives_back = !matches!(action, Action::Overwrite { .. });
    // Giving the space back is a pass of its own: the zeroes have reached the disk by then.
    let all = passes + u64::from(gives_back);
    let mut buffer = vec![0; CHUNK];
    for pass in 0..passes {
        let word = action.word(passes - 1 - pass).to_le_bytes();
        for place in buffer.chunks_exact_mut(4) {
            place.copy_from_slice(&word);
        }
        let step = |at, len: u64| disk.write_at(&buffer[..len as usize], at);
        if !sweep(disk, (pass, all), stopped, progress, step)? {
            return Ok(false);
        }
    }
    if gives_back {
        let step = |at, len| disk.write_zeroes(at, len, true);
        return sweep(disk, (passes, all), stopped, progress, step);
    }
    Ok(true)
}

/// One pass, of so many, over a whole disk, durably; false if it was stopped.
fn sweep(
    disk: &dyn AsyncDiskFile,
    (pass, passes): (u64, u64),
    stopped: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(u32),
    step: impl Fn(u64, u64) -> block::Result<()>,
) -> block::Result<bool> {
    let size = disk.size();
    let mut at = 0;
    while at < size {
        if stopped() {
            return Ok(false);
        }
        let len = (size - at).min(CHUNK as u64);
        step(at, len)?;
        at += len;
        let done = u128::from(size) * u128::from(pass) + u128::from(at);
        progress((done * 0x1_0000 / (u128::from(size) * u128::from(passes))) as u32);
    }
    disk.flush()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MockDisk, MockDiskConfig};

    fn disk() -> MockDisk {
        let disk = MockDisk::new(MockDiskConfig {
            size: 3 * CHUNK as u64 + 512,
            ..MockDiskConfig::default()
        });
        disk.write(0, &[7; 3 * CHUNK + 512]);
        disk
    }

    fn all(disk: &MockDisk, action: Action) -> Vec<u32> {
        let mut seen = Vec::new();
        assert!(erase(disk, action, &|| false, &mut |it| seen.push(it)).unwrap());
        seen
    }

    #[test]
    fn every_byte_is_overwritten_and_the_last_pass_writes_the_pattern() {
        let disk = disk();
        let seen = all(&disk, Action::BlockErase);
        assert_eq!(seen.len(), 8, "zeroes, then the space");
        assert!(disk.contents().iter().all(|byte| *byte == 0));
        assert_eq!(seen.last(), Some(&0x1_0000));
        for (passes, expected) in [(1, 4), (2, 8), (0, 64)] {
            let action = Action::Overwrite {
                pattern: 0x0102_0304,
                passes,
                invert: true,
            };
            let seen = all(&disk, action);
            assert_eq!(seen.len(), expected, "four pieces a pass");
            assert!(seen.is_sorted() && seen.last() == Some(&0x1_0000));
            let contents = disk.contents();
            assert!(contents.chunks(4).all(|word| word == [4, 3, 2, 1]));
        }
    }

    #[test]
    fn passes_alternate_up_to_the_pattern() {
        let action = Action::Overwrite {
            pattern: 0xff,
            passes: 3,
            invert: true,
        };
        assert_eq!([2, 1, 0].map(|left| action.word(left)), [0xff, !0xff, 0xff]);
    }

    #[test]
    fn one_that_is_stopped_says_so() {
        let disk = disk();
        let stop = std::cell::Cell::new(false);
        let done = erase(&disk, Action::BlockErase, &|| stop.get(), &mut |_| {
            stop.set(true);
        });
        assert!(!done.unwrap());
        assert_eq!(disk.contents()[CHUNK], 7);
    }
}
