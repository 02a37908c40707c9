//! Runtime options of qcow2 images (`-o`, `--image-opts`): caches, checks, discards.

use block::{OverlapChecks, PassDiscards};

use crate::util::{
    keyval::{KeyVals, parse_switch},
    size,
};

/// What the options ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheOptions {
    /// Bytes for cached tables, if given.
    pub(crate) bytes: Option<u64>,
    l2: Option<u64>,
    refcount: Option<u64>,
    /// The size of one cached piece of a table; checked, and without effect.
    pub(crate) entry: Option<u64>,
}

/// The most pieces of a cache.
const MAX_PIECES: u64 = i32::MAX as u64;

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
        Ok(Self {
            bytes,
            l2,
            refcount,
            entry,
        })
    }

    /// Checks what depends on the image: its cluster size and its disk size.
    pub(crate) fn check(&self, cluster_size: u64, disk_size: u64) -> Result<(), String> {
        if let Some(entry) = self.entry
            && (!entry.is_power_of_two() || entry < 512 || entry > cluster_size)
        {
            return Err(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
            ));
        }
        // No more than all tables together, with entries of eight bytes.
        let tables = disk_size.div_ceil(cluster_size).saturating_mul(8);
        let entry = self.entry.unwrap_or(cluster_size);
        if self
            .l2
            .is_some_and(|l2| l2.min(tables) / entry > MAX_PIECES)
        {
            return Err("L2 cache size too big".into());
        }
        if self
            .refcount
            .is_some_and(|bytes| bytes / cluster_size > MAX_PIECES)
        {
            return Err("Refcount cache size too big".into());
        }
        Ok(())
    }

    /// Options for the open image that `new` ones join: what contradicts them goes, as in QEMU.
    pub(crate) fn join(old: &mut KeyVals, new: &KeyVals) {
        if new.get("overlap-check").is_some() || new.get("overlap-check.template").is_some() {
            old.take("overlap-check");
            old.take_below("overlap-check.");
        }
        let sizes = ["cache-size", "l2-cache-size", "refcount-cache-size"];
        if new.get(sizes[0]).is_some() {
            old.take(sizes[1]);
            old.take(sizes[2]);
        } else if sizes[1..]
            .iter()
            .all(|key| old.get(key).or(new.get(key)).is_some())
        {
            old.take(sizes[0]);
        }
        old.extend(new.clone());
    }
}

/// Takes the options for the overlap check out of a list.
pub(crate) fn take_overlap_checks(options: &mut KeyVals) -> Result<OverlapChecks, String> {
    let short = options.take("overlap-check");
    let long = options.take("overlap-check.template");
    if let (Some(short), Some(long)) = (&short, &long)
        && short != long
    {
        return Err(format!(
            "Conflicting values for qcow2 options 'overlap-check' ('{short}') and 'overlap-check.template' ('{long}')"
        ));
    }
    let mut checks = match short.or(long) {
        None => OverlapChecks::default(),
        Some(name) => OverlapChecks::from_template(&name).ok_or_else(|| {
            format!(
                "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
            )
        })?,
    };
    for (name, value) in options.take_below("overlap-check.").iter() {
        let key = format!("overlap-check.{name}");
        let check = checks
            .by_name(name)
            .ok_or_else(|| format!("Block format 'qcow2' does not support the option '{key}'"))?;
        *check = switch(&key, value)?;
    }
    Ok(checks)
}

/// Takes the options for discards out of a list.
pub(crate) fn take_pass_discards(options: &mut KeyVals) -> Result<PassDiscards, String> {
    let mut pass = PassDiscards::default();
    for (key, place) in [
        ("pass-discard-request", &mut pass.request),
        ("pass-discard-other", &mut pass.other),
        ("pass-discard-snapshot", &mut pass.snapshot),
    ] {
        if let Some(value) = options.take(key) {
            *place = switch(key, &value)?;
        }
    }
    Ok(pass)
}

/// Takes the time after which unused tables leave the cache out of a list: it is checked and forgotten, as the
/// cache is bounded.
pub(crate) fn take_clean_interval(options: &mut KeyVals) -> Result<(), String> {
    const KEY: &str = "cache-clean-interval";
    let Some(text) = options.take(KEY) else {
        return Ok(());
    };
    let seconds = text.strip_prefix('-').unwrap_or(&text).parse::<u64>();
    match seconds {
        Err(_) => Err(format!("Parameter '{KEY}' expects a number")),
        Ok(seconds) if text.starts_with('-') || seconds > u64::from(u32::MAX) => {
            Err("Cache clean interval too big".into())
        }
        Ok(_) => Ok(()),
    }
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    parse_switch(value).ok_or_else(|| format!("Parameter '{key}' expects 'on' or 'off'"))
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
            assert_eq!(options.check(65536, 1 << 30).is_ok(), good, "{entry}");
        }
    }

    #[test]
    fn caches_have_no_more_pieces_than_can_be_counted() {
        let refcount = take("refcount-cache-size=256T").expect("a size");
        assert!(refcount.check(65536, 1 << 30).is_err());
        let l2 = take("l2-cache-entry-size=512,l2-cache-size=1T").expect("a size");
        assert!(l2.check(1 << 18, 1 << 55).is_err());
        assert!(l2.check(1 << 18, 1 << 40).is_ok(), "more than all tables");
    }

    #[test]
    fn overlap_checks_are_named_one_by_one_or_by_a_template() {
        let take = |text: &str| take_overlap_checks(&mut KeyVals::parse(text, None));
        assert_eq!(take(""), Ok(OverlapChecks::default()));
        let checks = take("overlap-check=none,overlap-check.active-l2=on").expect("parses");
        assert!(checks.active_l2 && !checks.active_l1);
        let checks = take("overlap-check.template=all,overlap-check.main-header=off");
        let checks = checks.expect("parses");
        assert!(checks.inactive_l2 && !checks.main_header);
        for text in [
            "overlap-check=constant,overlap-check.template=all",
            "overlap-check=blubb",
            "overlap-check.zork=on",
            "overlap-check.active-l1=maybe",
        ] {
            assert!(take(text).is_err(), "{text}");
        }
    }

    #[test]
    fn new_options_replace_what_contradicts_them() {
        let joined = |old: &str, new: &str| {
            let mut old = KeyVals::parse(old, None);
            CacheOptions::join(&mut old, &KeyVals::parse(new, None));
            old
        };
        let list = joined("overlap-check=all", "overlap-check.template=none");
        assert_eq!(list, KeyVals::parse("overlap-check.template=none", None));
        let list = joined("cache-size=1M,l2-cache-size=1k", "refcount-cache-size=1k");
        assert_eq!(list.get("cache-size"), None);
        let list = joined("l2-cache-size=1k,refcount-cache-size=1k", "cache-size=1M");
        assert_eq!(list, KeyVals::parse("cache-size=1M", None));
    }

    #[test]
    fn intervals_are_numbers_of_seconds() {
        let take = |text: &str| take_clean_interval(&mut KeyVals::parse(text, None));
        assert_eq!(take("cache-clean-interval=600"), Ok(()));
        assert!(take("cache-clean-interval=-1").is_err());
        assert!(take("cache-clean-interval=x").is_err());
    }
}
