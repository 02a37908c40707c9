//! How often a short cut is tried: less and less while it does not pay.

/// The most times that it is left out after it did not pay.
const MAX_SKIP: u32 = 63;

/// Whether to try.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Times to leave out, and how many they were the last time.
    skip: u32,
    skipped: u32,
}

impl Pace {
    /// Whether this time is one to try.
    pub(super) fn allows(&mut self) -> bool {
        let skip = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        !skip
    }

    /// It was tried: whether it paid.
    pub(super) fn went(&mut self, well: bool) {
        if well {
            self.skipped = 0;
            return;
        }
        self.skipped = (2 * self.skipped + 1).min(MAX_SKIP);
        self.skip = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_pay_is_tried_less() {
        let mut pace = Pace::default();
        let failed = |pace: &mut Pace| {
            pace.went(false);
            (0..1000).take_while(|_| !pace.allows()).count()
        };
        let skipped: Vec<usize> = (0..8).map(|_| failed(&mut pace)).collect();
        assert_eq!(skipped, [1, 3, 7, 15, 31, 63, 63, 63]);
        pace.went(true);
        assert!(pace.allows());
        assert_eq!(failed(&mut pace), 1);
    }
}
