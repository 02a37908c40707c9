//! The command line, as far as the tests use it.

use std::collections::HashMap;

use crate::Result;

/// `key=value,…` of an option, with the first word if it has no key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) name: String,
    values: HashMap<String, String>,
}

impl Options {
    pub(crate) fn parse(text: &str) -> Self {
        let mut options = Self::default();
        for (at, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                Some((key, value)) => {
                    options.values.insert(key.to_owned(), value.to_owned());
                }
                None if at == 0 => part.clone_into(&mut options.name),
                None => {
                    options.values.insert(part.to_owned(), "on".to_owned());
                }
            }
        }
        options
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.values.insert(key.to_owned(), value.to_owned());
    }

    pub(crate) fn need(&self, key: &str) -> Result<&str> {
        let missing = || format!("{}: expected {key}=", self.name);
        self.get(key).ok_or_else(missing)
    }
}

/// What kind of machine it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing but a monitor.
    None,
    Pc,
    Q35,
}

/// The command line.
#[derive(Debug)]
pub(crate) struct Args {
    pub(crate) qtest: String,
    pub(crate) monitor: String,
    pub(crate) kind: Kind,
    /// Bytes of RAM.
    pub(crate) memory: u64,
    pub(crate) drives: Vec<Options>,
    pub(crate) devices: Vec<Options>,
    pub(crate) globals: Vec<String>,
    pub(crate) incoming: Option<String>,
}

impl Args {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut args = Self {
            qtest: String::new(),
            monitor: String::new(),
            kind: Kind::Pc,
            memory: 128 << 20,
            drives: Vec::new(),
            devices: Vec::new(),
            globals: Vec::new(),
            incoming: None,
        };
        while let Some(option) = words.next() {
            let value = words
                .next()
                .ok_or_else(|| format!("{option}: expected a value"))?;
            match option.as_str() {
                "-qtest" => args.qtest = socket(&value)?,
                "-chardev" => args.monitor = Options::parse(&value).need("path")?.to_owned(),
                "-M" | "-machine" => args.kind = kind(&value)?,
                "-m" => {
                    let megabytes: u64 = value.parse().map_err(|_| format!("-m {value}"))?;
                    args.memory = megabytes << 20;
                }
                "-drive" | "-blockdev" => args.drives.push(Options::parse(&value)),
                "-device" => args.devices.push(Options::parse(&value)),
                "-global" => args.globals.push(value),
                "-incoming" => args.incoming = Some(socket(&value)?),
                // What these ask for is so anyway, or nothing of it is here.
                "-qtest-log" | "-mon" | "-display" | "-audio" | "-accel" | "-object" => {}
                _ => return Err(format!("unknown option {option} {value}")),
            }
        }
        Ok(args)
    }

    /// The value of `-global DEVICE.KEY=`.
    pub(crate) fn global(&self, device: &str, key: &str) -> Option<&str> {
        let wanted = format!("{device}.{key}=");
        let mut globals = self.globals.iter();
        globals.find_map(|text| text.strip_prefix(&wanted))
    }
}

fn socket(text: &str) -> Result<String> {
    let path = text.strip_prefix("unix:");
    path.map(str::to_owned)
        .ok_or_else(|| format!("{text}: expected unix:PATH"))
}

fn kind(text: &str) -> Result<Kind> {
    match Options::parse(text).name.as_str() {
        "none" => Ok(Kind::None),
        "pc" => Ok(Kind::Pc),
        "q35" => Ok(Kind::Q35),
        _ => Err(format!("unknown machine {text}")),
    }
}
