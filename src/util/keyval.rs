//! Lists of `key=value,key=value`, as options of images are written.

/// Key and value pairs in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyVals(Vec<(String, String)>);

impl KeyVals {
    /// Reads `key=value,…`. A doubled comma stands for one comma in a value; a key alone means
    /// `on`, and `nokey` alone `off`; the first item without `=` is the value of `implied`.
    pub(crate) fn parse(text: &str, implied: Option<&str>) -> Self {
        let mut list = Self::default();
        for (at, item) in split(text).into_iter().enumerate() {
            match item.split_once('=') {
                Some((key, value)) => list.push(key, value),
                None if item.is_empty() => {}
                None => match implied.filter(|_| at == 0) {
                    Some(key) => list.push(key, &item),
                    None => match item.strip_prefix("no") {
                        Some(key) if !key.is_empty() => list.push(key, "off"),
                        _ => list.push(&item, "on"),
                    },
                },
            }
        }
        list
    }

    /// Reads the values of an option that may be given several times. The error is the list that is none.
    pub(crate) fn of_lists(lists: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        for list in lists {
            let single_at_end = list.len() - list.trim_end_matches(',').len();
            if list.is_empty() || list.starts_with(',') || !single_at_end.is_multiple_of(2) {
                return Err(format!("Invalid option list: {list}"));
            }
            options.extend(Self::parse(list, None));
        }
        Ok(options)
    }

    /// Appends a pair; a key given twice keeps both, and the last one counts.
    pub(crate) fn push(&mut self, key: &str, value: &str) {
        self.0.push((key.to_owned(), value.to_owned()));
    }

    /// Appends the pairs of another list.
    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Removes every pair with that key and returns the last value.
    pub(crate) fn take(&mut self, key: &str) -> Option<String> {
        let mut found = None;
        self.0.retain_mut(|(k, v)| {
            if k == key {
                found = Some(std::mem::take(v));
            }
            k != key
        });
        found
    }

    /// Removes every pair whose key starts with `prefix` and returns them without it.
    pub(crate) fn take_below(&mut self, prefix: &str) -> Self {
        let mut found = Self::default();
        self.0.retain(|(key, value)| {
            let below = key.strip_prefix(prefix);
            if let Some(key) = below {
                found.push(key, value);
            }
            below.is_none()
        });
        found
    }

    /// The same pairs, each key with `prefix` in front.
    pub(crate) fn prefixed(mut self, prefix: &str) -> Self {
        for (key, _) in &mut self.0 {
            key.insert_str(0, prefix);
        }
        self
    }

    /// The last value of that key.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().rev().find(|(k, _)| k == key);
        found.map(|(_, v)| v.as_str())
    }

    /// The key of the first pair left.
    pub(crate) fn first_key(&self) -> Option<&str> {
        self.0.first().map(|(key, _)| key.as_str())
    }

    /// The pairs in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// How often `prefix` stands, one after the other, before the key in which it does so most often.
    pub(crate) fn depth_of(&self, prefix: &str) -> usize {
        let depth = |key: &str| {
            let mut rest = key;
            let mut depth = 0;
            while let Some(after) = rest.strip_prefix(prefix) {
                (rest, depth) = (after, depth + 1);
            }
            depth
        };
        self.0.iter().map(|(key, _)| depth(key)).max().unwrap_or(0)
    }

    /// Whether there are no pairs.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let doubled = c == ',' && chars.next_if_eq(&',').is_some();
        if c == ',' && !doubled {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

/// Reads a switch: `on`/`off` and their like.
pub(crate) fn parse_switch(value: &str) -> Option<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_can_be_escaped() {
        let mut list = KeyVals::parse("backing_file=a,,b,cluster_size=4k,lazy", None);
        assert_eq!(list.take("backing_file").as_deref(), Some("a,b"));
        assert_eq!(list.get("cluster_size"), Some("4k"));
        assert_eq!(list.get("lazy"), Some("on"));
        assert_eq!(list.take("nothing"), None);
    }

    #[test]
    fn lists_with_a_comma_too_many_are_refused() {
        let read = |text: &str| KeyVals::of_lists(&["a=1".into(), text.into()]);
        let list = read("b=2,,").expect("a list");
        assert_eq!((list.get("a"), list.get("b")), (Some("1"), Some("2,")));
        for text in ["", ",", "b=2,", ",b=2"] {
            assert_eq!(read(text), Err(format!("Invalid option list: {text}")));
        }
    }

    #[test]
    fn the_last_value_counts_and_the_first_key_may_be_implied() {
        let list = KeyVals::parse("a=1,a=2", None);
        assert_eq!(list.get("a"), Some("2"));
        let list = KeyVals::parse("qcow2,x=1", Some("driver"));
        assert_eq!(list.get("driver"), Some("qcow2"));
    }
}
