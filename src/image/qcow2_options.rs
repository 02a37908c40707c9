//! Runtime options of qcow2 images (`-o`, `--image-opts`) that size its caches.

use crate::util::{keyval::KeyVals, size};

/// What the options ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheOptions {
    /// Bytes for cached tables, if given.
    pub(crate) bytes: Option<u64>,
    /// The size of one cached piece of a table; checked, and without effect.
    pub(crate) entry: Option<u64>,
}

impl CacheOptions {
    /// Takes the options out of a list.
    pub(crate) fn take(options: &mut KeyVals) -> Result<Self, String> {
        let mut sized = |key: &str| -> Result<Option<u64>, String> {
            let Some(text) = options.take(key) else {
                return Ok(None);
            };
            match size::parse(&text) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(_) => Err(not_a_size(key)),
            }
        };
        let all = sized("cache-size")?;
        let l2 = sized("l2-cache-size")?;
        let refcount = sized("refcount-cache-size")?;
        let entry = sized("l2-cache-entry-size")?;
        if all.is_some() && l2.is_some() && refcount.is_some() {
            return Err(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
                    .into(),
            );
        }
        if let Some(all) = all {
            if l2.is_some_and(|l2| l2 > all) {
                return Err("l2-cache-size may not exceed cache-size".into());
            }
            if refcount.is_some_and(|refcount| refcount > all) {
                return Err("refcount-cache-size may not exceed cache-size".into());
            }
        }
        let bytes = match (all, l2, refcount) {
            (Some(all), _, _) => Some(all),
            (None, None, None) => None,
            (None, l2, refcount) => Some(
                l2.unwrap_or(1 << 20)
                    .saturating_add(refcount.unwrap_or(1 << 18)),
            ),
        };
        Ok(Self { bytes, entry })
    }

    /// Checks what depends on the image.
    pub(crate) fn check(&self, cluster_size: u64) -> Result<(), String> {
        match self.entry {
            Some(entry) if !entry.is_power_of_two() || entry < 512 || entry > cluster_size => {
                Err(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// QEMU's words for an option that is not a size.
pub(crate) fn not_a_size(key: &str) -> String {
    format!(
        "Parameter '{key}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<CacheOptions, String> {
        CacheOptions::take(&mut KeyVals::parse(text, None))
    }

    #[test]
    fn sizes_that_contradict_each_other_are_refused() {
        assert!(take("cache-size=1M,l2-cache-size=1M,refcount-cache-size=0").is_err());
        assert!(take("cache-size=1M,l2-cache-size=2M").is_err());
        assert!(take("cache-size=1M,refcount-cache-size=2M").is_err());
        assert!(take("cache-size=x").is_err());
        assert_eq!(take("cache-size=2M").map(|o| o.bytes), Ok(Some(2 << 20)));
        assert_eq!(take("").map(|o| o.bytes), Ok(None));
    }

    #[test]
    fn a_piece_is_a_power_of_two_within_a_cluster() {
        for (entry, good) in [
            ("512", true),
            ("64k", true),
            ("256", false),
            ("4242", false),
            ("128k", false),
        ] {
            let options = take(&format!("l2-cache-entry-size={entry}")).expect("a size");
            assert_eq!(options.check(65536).is_ok(), good, "{entry}");
        }
    }
}
