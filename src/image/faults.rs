//! QEMU's filter `blkdebug`, as images are named with it: `blkdebug:CONFIG:FILE` and
//! `driver=blkdebug,…`.

use std::sync::Arc;

use block::faults::{Event, Faults, InjectError, Operation, SetState};

use crate::util::{
    errno,
    keyval::{KeyVals, parse_switch},
    size,
};

/// Limits that a filter can put on requests. Nothing here depends on them.
const LIMITS: &[&str] = &[
    "align",
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
];

/// The rules in a configuration file; no name stands for no rules.
pub(crate) fn from_file(path: &str) -> Result<Arc<Faults>, String> {
    let text = if path.is_empty() {
        String::new()
    } else {
        std::fs::read_to_string(path).map_err(|error| {
            format!(
                "Could not read blkdebug config file: {}",
                errno::io_text(&error)
            )
        })?
    };
    let mut sections: Vec<(String, KeyVals)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            sections.push((name.to_owned(), KeyVals::default()));
            continue;
        }
        let parsed = line.split_once('=').zip(sections.last_mut());
        let Some(((key, value), (_, section))) = parsed else {
            return Err(format!(
                "blkdebug config file: cannot read the line '{line}'"
            ));
        };
        section.push(key.trim(), value.trim().trim_matches('"'));
    }
    let mut rules = Rules::default();
    for (name, section) in sections {
        rules.add(&name, section)?;
    }
    Ok(rules.finish())
}

/// The filters of an image, by their place.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    pub(crate) file: Option<Arc<Faults>>,
    pub(crate) data_file: Option<Arc<Faults>>,
    pub(crate) requests: Option<Arc<Faults>>,
}

/// Takes the filters out of the options of an image; what they filter takes their places.
pub(crate) fn take_filters(options: &mut KeyVals) -> Result<Filters, String> {
    let mut filters = Filters::default();
    if options.get("driver") == Some("blkdebug") {
        // Above a format, or above the file itself, which is no different from below a raw image.
        let above = options.get("image.file.filename").is_some()
            || options.get("image.file.driver").is_some();
        let rules = Some(take_filter(options, "")?);
        if above {
            filters.requests = rules;
        } else {
            filters.file = rules;
        }
    }
    if options.get("file.driver") == Some("blkdebug") {
        filters.file = Some(take_filter(options, "file.")?);
    }
    let data_file = if options.get("data-file.driver") == Some("raw") {
        "data-file.file."
    } else {
        "data-file."
    };
    if options.get(&format!("{data_file}driver")) == Some("blkdebug") {
        filters.data_file = Some(take_filter(options, data_file)?);
    }
    Ok(filters)
}

/// Takes one filter out of the options.
fn take_filter(options: &mut KeyVals, prefix: &str) -> Result<Arc<Faults>, String> {
    let key = |name: &str| format!("{prefix}{name}");
    options.take(&key("driver"));
    for limit in LIMITS {
        options.take(&key(limit));
    }
    let mut rules = match options.take(&key("config")) {
        Some(path) => {
            let faults = from_file(&path)?;
            move_image(options, prefix);
            return Ok(faults);
        }
        None => Rules::default(),
    };
    for name in ["inject-error", "set-state"] {
        for number in 0.. {
            let below = format!("{}.{number}.", key(name));
            let section = options.take_below(&below);
            if section.is_empty() {
                break;
            }
            rules.add(name, section)?;
        }
    }
    move_image(options, prefix);
    Ok(rules.finish())
}

/// What the filter is above of takes its place.
fn move_image(options: &mut KeyVals, prefix: &str) {
    let image = options.take_below(&format!("{prefix}image."));
    options.extend(image.prefixed(prefix));
}

/// Takes the limits of a filter that was named as `blkdebug::FILE` with options beside.
pub(crate) fn take_limits(options: &mut KeyVals) -> Result<(), String> {
    for prefix in ["", "file."] {
        for limit in LIMITS {
            let Some(text) = options.take(&format!("{prefix}{limit}")) else {
                continue;
            };
            if size::parse(&text).is_err() {
                return Err(format!("Parameter '{limit}' expects a size"));
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Rules {
    errors: Vec<InjectError>,
    changes: Vec<SetState>,
}

impl Rules {
    fn add(&mut self, kind: &str, mut section: KeyVals) -> Result<(), String> {
        let name = section.take("event").ok_or("Missing event name for rule")?;
        let event = Event::from_name(&name).map_err(|error| error.message())?;
        let number = |section: &mut KeyVals, key: &str, default: u64| -> Result<u64, String> {
            let Some(text) = section.take(key) else {
                return Ok(default);
            };
            text.parse()
                .map_err(|_| format!("Parameter '{key}' expects a number"))
        };
        let switch = |section: &mut KeyVals, key: &str| -> Result<bool, String> {
            let Some(text) = section.take(key) else {
                return Ok(false);
            };
            parse_switch(&text).ok_or_else(|| format!("Parameter '{key}' expects 'on' or 'off'"))
        };
        let state = number(&mut section, "state", 0)?;
        match kind {
            "inject-error" => {
                let errno = number(&mut section, "errno", libc::EIO as u64)?;
                let offset = match section.take("sector") {
                    None => None,
                    Some(text) if text == "-1" => None,
                    Some(text) => Some(
                        text.parse::<u64>()
                            .ok()
                            .and_then(|sector| sector.checked_mul(512))
                            .ok_or("Parameter 'sector' expects a number")?,
                    ),
                };
                let operation = match section.take("iotype") {
                    None => None,
                    Some(text) => Some(Operation::from_name(&text).ok_or_else(|| {
                        format!("Parameter 'iotype' does not accept value '{text}'")
                    })?),
                };
                let once = switch(&mut section, "once")?;
                switch(&mut section, "immediately")?;
                // An event that nothing announces never comes.
                self.errors.extend(event.map(|event| InjectError {
                    event,
                    state,
                    operation,
                    offset,
                    errno: i32::try_from(errno).unwrap_or(libc::EIO),
                    once,
                }));
            }
            "set-state" => {
                let new_state = number(&mut section, "new_state", 0)?;
                self.changes.extend(event.map(|event| SetState {
                    event,
                    state,
                    new_state,
                }));
            }
            other => return Err(format!("There is no option group '{other}'")),
        }
        match section.first_key() {
            Some(key) => Err(format!("Invalid parameter '{key}'")),
            None => Ok(()),
        }
    }

    fn finish(self) -> Arc<Faults> {
        Arc::new(Faults::new(self.errors, self.changes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_gives_its_place_to_what_it_filters() {
        let text = "driver=qcow2,file.driver=blkdebug,file.image.filename=a,\
                    file.inject-error.0.event=write_aio,file.set-state.0.event=read_aio,\
                    file.set-state.0.new_state=2,file.align=4k";
        let mut options = KeyVals::parse(text, None);
        let filters = take_filters(&mut options).expect("parses");
        assert!(filters.file.is_some() && filters.requests.is_none());
        assert_eq!(options.take("file.filename").as_deref(), Some("a"));
        assert_eq!(options.take("driver").as_deref(), Some("qcow2"));
        assert!(options.is_empty(), "{options:?}");
        let mut options = KeyVals::parse("driver=blkdebug,inject-error.0.event=zork", None);
        assert!(take_filters(&mut options).is_err());
        let above = "driver=blkdebug,image.driver=qcow2,image.file.filename=a";
        let mut options = KeyVals::parse(above, None);
        let filters = take_filters(&mut options).expect("parses");
        assert!(filters.requests.is_some() && filters.file.is_none());
        assert_eq!(options.get("driver"), Some("qcow2"));
        let data = "driver=qcow2,file.filename=a,data-file.driver=raw,\
                    data-file.file.driver=blkdebug,data-file.file.image.filename=b";
        let mut options = KeyVals::parse(data, None);
        let filters = take_filters(&mut options).expect("parses");
        assert!(filters.data_file.is_some());
        assert_eq!(options.get("data-file.file.filename"), Some("b"));
    }
}
