//! How an image is named: a path, `driver=…,file.filename=…` or, under QEMU's names, `json:{…}` and
//! `file:path`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use block::{Format, faults::Faults};
use serde_json::Value;

use crate::{
    image::{
        faults::{self, Filters},
        secrets,
    },
    util::{
        failure::{Failure, Outcome},
        keyval::KeyVals,
        persona::Persona,
    },
};

/// An image as it was named on the command line.
#[derive(Clone, Debug)]
pub(crate) struct ImageSpec {
    /// The host file.
    pub(crate) path: PathBuf,
    /// The format that was named; detected otherwise.
    pub(crate) format: Option<Format>,
    /// The remaining options of the driver.
    pub(crate) options: KeyVals,
    /// The name was a list of options.
    pub(crate) by_options: bool,
    /// The name as it was given, where that is not the path.
    given: Option<String>,
    /// Faults on purpose, between the image and its file.
    pub(crate) faults: Option<Arc<Faults>>,
    /// The same, between the image and its data file.
    pub(crate) data_file_faults: Option<Arc<Faults>>,
    /// The same, above the image.
    pub(crate) request_faults: Option<Arc<Faults>>,
}

impl ImageSpec {
    /// The image that `text` names. `image_opts` says that it is a list of options; `format` is
    /// the value of `-f`.
    pub(crate) fn parse(
        text: &str,
        image_opts: bool,
        format: Option<&str>,
        persona: Persona,
    ) -> Outcome<Self> {
        if image_opts {
            if format.is_some() {
                return Err(Failure::new(
                    "--image-opts and --format are mutually exclusive",
                ));
            }
            return Self::from_options(KeyVals::parse(text, Some("driver")), persona)
                .map(|spec| Self {
                    by_options: true,
                    given: Some(text.to_owned()),
                    ..spec
                })
                .map_err(|message| could_not_open(text, &message, persona));
        }
        let fail = |message: &str| could_not_open(text, message, persona);
        let named = format.map(named_format).transpose();
        let format = named.map_err(|message| fail(&message))?;
        if persona.is_qemu() {
            if let Some(json) = text.strip_prefix("json:") {
                let mut options = flatten_json(json).map_err(|message| fail(&message))?;
                if let Some(format) = format.filter(|_| options.get("driver").is_none()) {
                    options.push("driver", format.name());
                }
                return Self::from_options(options, persona)
                    .map(|spec| Self {
                        given: Some(text.to_owned()),
                        ..spec
                    })
                    .map_err(|message| fail(&message));
            }
            if let Some((protocol, rest)) = protocol_of(text) {
                if protocol == "blkdebug" {
                    let (config, file) = rest
                        .split_once(':')
                        .ok_or_else(|| fail("blkdebug requires raw copy-on-write filename"))?;
                    let faults = faults::from_file(config).map_err(|message| fail(&message))?;
                    let mut spec = Self::plain(file, format);
                    spec.faults = Some(faults);
                    return Ok(spec);
                }
                if protocol != "file" {
                    return Err(fail(&format!("Unknown protocol '{protocol}'")));
                }
                return Ok(Self::plain(below_here(rest), format));
            }
        }
        Ok(Self::plain(PathBuf::from(text), format))
    }

    /// The image that a list of options names.
    pub(crate) fn of_options(options: KeyVals, persona: Persona) -> Outcome<Self> {
        Self::from_options(options, persona)
            .map_err(|message| could_not_open("", &message, persona))
    }

    /// The image at `path`.
    pub(crate) fn plain(path: impl Into<PathBuf>, format: Option<Format>) -> Self {
        Self {
            path: path.into(),
            format,
            options: KeyVals::default(),
            by_options: false,
            given: None,
            faults: None,
            data_file_faults: None,
            request_faults: None,
        }
    }

    /// Adds options given apart from the name.
    pub(crate) fn with_options(mut self, options: KeyVals) -> Outcome<Self> {
        self.options.extend(options);
        if self.faults.is_some() && self.options.get("driver") == Some("blkdebug") {
            // The filter is named twice: the format is that of what it filters.
            self.options.take("driver");
            if let Some(driver) = self.options.take("image.driver") {
                self.options.push("driver", &driver);
            }
        }
        if let Some(driver) = self.options.take("driver") {
            let format = named_format(&driver).map_err(Failure::new)?;
            self.format = Some(format);
        }
        Ok(self)
    }

    fn from_options(mut options: KeyVals, persona: Persona) -> Result<Self, String> {
        if options.is_empty() {
            return Err("Must specify either driver or file".into());
        }
        let filters = if persona.is_qemu() {
            faults::take_filters(&mut options)?
        } else {
            Filters::default()
        };
        let mut driver = options.take("driver");
        let mut path = options.take("file.filename");
        let protocol = options.take("file.driver");
        if let Some(protocol) = protocol.filter(|p| !is_protocol(p)) {
            return Err(format!("Unknown driver '{protocol}'"));
        }
        // A protocol named as the driver: the file itself, raw.
        if driver.as_deref().is_some_and(is_protocol) {
            path = options.take("filename");
            driver = Some("raw".into());
            if path.is_none() {
                return Err("The 'file' block driver requires a file name".into());
            }
        }
        let format = driver.map(|driver| named_format(&driver)).transpose()?;
        let Some(path) = path else {
            return Err(match format {
                None => "Must specify either driver or file".into(),
                Some(_) => "A block device must be specified for \"file\"".into(),
            });
        };
        let path = match path.strip_prefix("file:").filter(|_| persona.is_qemu()) {
            Some(rest) => below_here(rest),
            None => PathBuf::from(path),
        };
        Ok(Self {
            path,
            format,
            options,
            by_options: false,
            given: None,
            faults: filters.file,
            data_file_faults: filters.data_file,
            request_faults: filters.requests,
        })
    }

    /// The name as QEMU gives it, where the path alone would not open the image: all options.
    pub(crate) fn json_name(&self) -> Option<String> {
        let format = self.format?;
        let (key, id) = secrets::key_of(&self.options, format)?;
        let mut map = serde_json::Map::new();
        map.insert(key, id.into());
        map.insert("driver".into(), format.name().into());
        let path = self.path.display().to_string();
        let file = serde_json::json!({"driver": "file", "filename": path});
        map.insert("file".into(), file);
        Some(format!("json:{}", Value::Object(map)))
    }

    /// The name to print: as it was given.
    pub(crate) fn display(&self) -> String {
        self.given
            .clone()
            .unwrap_or_else(|| self.path.display().to_string())
    }
}

/// The message for an image that could not be opened.
pub(crate) fn could_not_open(name: &str, message: &str, persona: Persona) -> Failure {
    Failure::new(match persona {
        Persona::QemuIo if message.starts_with("Unknown driver") => {
            format!("can't open device {name}: {message}")
        }
        Persona::QemuIo => format!("can't open: {message}"),
        _ => format!("Could not open '{name}': {message}"),
    })
}

/// The format of that name.
pub(crate) fn named_format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| format!("Unknown driver '{name}'"))
}

fn is_protocol(driver: &str) -> bool {
    matches!(driver, "file" | "host_device")
}

/// The protocol a name starts with: what precedes a colon, if no slash comes earlier.
fn protocol_of(name: &str) -> Option<(&str, &str)> {
    let (protocol, rest) = name.split_once(':')?;
    (!protocol.contains('/')).then_some((protocol, rest))
}

/// A path after `file:`. A relative one with a colon of its own would read as a protocol again where
/// it is printed, so it says where it starts.
fn below_here(path: &str) -> PathBuf {
    if protocol_of(path).is_some() {
        Path::new(".").join(path)
    } else {
        PathBuf::from(path)
    }
}

/// Turns the object after `json:` into dotted keys.
fn flatten_json(text: &str) -> Result<KeyVals, String> {
    let value: Value = serde_json::from_str(&double_quoted(text))
        .map_err(|error| format!("Could not parse the JSON options: {error}"))?;
    let mut list = KeyVals::default();
    flatten("", &value, &mut list);
    Ok(list)
}

fn flatten(key: &str, value: &Value, list: &mut KeyVals) {
    let below = |name: &str| match key {
        "" => name.to_owned(),
        key => format!("{key}.{name}"),
    };
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(name, value)| flatten(&below(name), value, list)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(at, value)| flatten(&below(&at.to_string()), value, list)),
        Value::Bool(value) => list.push(key, if *value { "on" } else { "off" }),
        Value::String(value) => list.push(key, value),
        Value::Null => list.push(key, ""),
        Value::Number(value) => list.push(key, &value.to_string()),
    }
}

/// QEMU's JSON also takes strings in single quotes.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(open), c) if c == open => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (Some(_), '\\') => {
                match chars.next() {
                    Some('\'') => out.push('\''),
                    Some(c) => out.extend(['\\', c]),
                    None => out.push('\\'),
                };
            }
            (_, c) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(text: &str) -> Outcome<ImageSpec> {
        ImageSpec::parse(text, false, None, Persona::QemuImg)
    }

    #[test]
    fn json_names_take_both_kinds_of_quotes() {
        let spec = qemu("json:{'driver':'qcow2','file':{'driver':'file','filename':'a\"b'}}");
        let spec = spec.expect("parses");
        assert_eq!(spec.path, Path::new("a\"b"));
        assert_eq!(spec.format, Some(Format::Qcow2));
        let error = qemu("json:{\"driver\":\"qcow2\"}").expect_err("no file");
        assert!(
            error
                .to_string()
                .ends_with("must be specified for \"file\"")
        );
    }

    #[test]
    fn protocols_are_qemus_alone() {
        assert_eq!(qemu("file:a").expect("a").path, Path::new("a"));
        assert_eq!(qemu("file:a:b").expect("a").path, Path::new("./a:b"));
        assert_eq!(qemu("/x/a:b").expect("a").path, Path::new("/x/a:b"));
        let error = qemu("zork:a").expect_err("unknown");
        assert_eq!(
            error.to_string(),
            "Could not open 'zork:a': Unknown protocol 'zork'"
        );
        let spec = ImageSpec::parse("file:a", false, None, Persona::Platter);
        assert_eq!(spec.expect("a path").path, Path::new("file:a"));
    }

    #[test]
    fn option_lists_name_driver_and_file() {
        let text = "driver=qcow2,file.filename=a,cache-size=1M";
        let spec = ImageSpec::parse(text, true, None, Persona::QemuIo).expect("parses");
        assert_eq!(spec.options.get("cache-size"), Some("1M"));
        assert!(ImageSpec::parse("filename=a", true, None, Persona::QemuIo).is_err());
    }
}
