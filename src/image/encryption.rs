//! How new images are encrypted, and how passwords change: the options of `create` and `amend`.

use std::time::Duration;

use block::{
    Format,
    crypto::{
        KeyChange, Secret,
        cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator},
        hash::HashAlgorithm,
        luks::{DEFAULT_ITER_TIME, LuksOptions},
    },
    formats::qcow2::create::Encrypt,
};

use crate::{
    image::secrets,
    util::keyval::{KeyVals, parse_switch},
};

/// The options after their prefix, in the order in which `create` tells them.
const KEYS: [&str; 7] = [
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "detached-header",
    "iter-time",
];

/// What `create` is told about encryption.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// What was given, in the order in which it is told.
    given: Vec<(String, String)>,
    luks: bool,
}

impl Wanted {
    /// Takes the options out of a list.
    pub(crate) fn take(options: &mut KeyVals, format: Format) -> Self {
        let mut wanted = Self {
            luks: format == Format::Luks,
            ..Self::default()
        };
        let mut keys: Vec<String> = Vec::new();
        match format {
            Format::Luks => {
                keys.push("key-secret".into());
                keys.extend(KEYS.map(str::to_owned));
            }
            Format::Qcow2 => {
                keys.extend(["encryption", "encrypt.format", "encrypt.key-secret"].map(Into::into));
                keys.extend(KEYS.map(|key| format!("encrypt.{key}")));
            }
            _ => {}
        }
        for key in keys {
            if let Some(value) = options.take(&key) {
                wanted.given.push((key, value));
            }
        }
        wanted
    }

    /// The options as `create` tells them, each with a space before it.
    pub(crate) fn announcement(&self) -> String {
        self.given
            .iter()
            .map(|(key, value)| format!(" {key}={value}"))
            .collect()
    }

    fn get(&self, key: &str) -> Option<&str> {
        let found = self.given.iter().find(|(given, _)| given == key);
        found.map(|(_, value)| value.as_str())
    }

    /// What is to be made, with its password. The messages are QEMU's.
    pub(crate) fn resolve(&self) -> Result<Option<Encrypt>, String> {
        if self.luks {
            let secret = self.secret("key-secret")?;
            let options = self.luks_options("")?;
            return Ok(Some(Encrypt::Luks { options, secret }));
        }
        let alias = match self.get("encryption") {
            Some(value) => parse_switch(value)
                .ok_or("Parameter 'encryption' expects 'on' or 'off'")?
                .then_some("aes"),
            None => None,
        };
        let method = match (self.get("encrypt.format"), alias) {
            (Some(_), Some(_)) => {
                return Err(
                    "'encrypt.format' and its alias 'encryption' can't be used at the same time"
                        .into(),
                );
            }
            (method, alias) => method.or(alias),
        };
        let details = |key: &&(String, String)| {
            !matches!(
                key.0.as_str(),
                "encryption" | "encrypt.format" | "encrypt.key-secret"
            )
        };
        match method {
            None => match self.given.iter().find(|(key, _)| key != "encryption") {
                Some(_) => Err("Parameter 'encrypt.format' is missing".into()),
                None => Ok(None),
            },
            Some("aes") => {
                // It is needed to open the image only, but so that is known to work.
                self.secret("encrypt.key-secret")?;
                match self.given.iter().find(details) {
                    Some((key, _)) => Err(format!("Parameter '{key}' is unexpected")),
                    None => Ok(Some(Encrypt::Aes)),
                }
            }
            Some("luks") => {
                let secret = self.secret("encrypt.key-secret")?;
                let options = self.luks_options("encrypt.")?;
                Ok(Some(Encrypt::Luks { options, secret }))
            }
            Some(other) => Err(format!(
                "Parameter 'format' does not accept value '{other}'"
            )),
        }
    }

    fn secret(&self, key: &str) -> Result<Secret, String> {
        match self.get(key) {
            Some(id) => secrets::find(id),
            None => Err(format!("Parameter '{key}' is required for cipher")),
        }
    }

    fn luks_options(&self, prefix: &str) -> Result<LuksOptions, String> {
        let value = |key: &str| self.get(&format!("{prefix}{key}"));
        if value("detached-header").and_then(parse_switch) == Some(true) {
            return Err("Detached LUKS headers are not supported".into());
        }
        fn named<T>(
            key: &str,
            value: Option<&str>,
            from_name: impl Fn(&str) -> Option<T>,
        ) -> Result<Option<T>, String> {
            let read = |name: &str| {
                from_name(name)
                    .ok_or_else(|| format!("Parameter '{key}' does not accept value '{name}'"))
            };
            value.map(read).transpose()
        }
        let default = LuksOptions::default();
        let spec = CipherSpec {
            algorithm: named(
                "cipher-alg",
                value("cipher-alg"),
                CipherAlgorithm::from_name,
            )?
            .unwrap_or(default.spec.algorithm),
            mode: named("cipher-mode", value("cipher-mode"), CipherMode::from_name)?
                .unwrap_or(default.spec.mode),
            iv: named("ivgen-alg", value("ivgen-alg"), IvGenerator::from_name)?
                .unwrap_or(default.spec.iv),
            iv_hash: named(
                "ivgen-hash-alg",
                value("ivgen-hash-alg"),
                HashAlgorithm::from_name,
            )?,
        };
        let options = LuksOptions {
            spec,
            hash: named("hash-alg", value("hash-alg"), HashAlgorithm::from_name)?
                .unwrap_or(default.hash),
            iter_time: iter_time(value("iter-time"))?.unwrap_or(DEFAULT_ITER_TIME),
        };
        options.check().map_err(|error| error.message())
    }
}

fn iter_time(value: Option<&str>) -> Result<Option<Duration>, String> {
    let read = |text: &str| {
        text.parse()
            .map(Duration::from_millis)
            .map_err(|_| "Parameter 'iter-time' expects a number".to_owned())
    };
    value.map(read).transpose()
}

/// Takes a change of passwords out of the options of `amend`; `None` where they ask for none.
pub(crate) fn take_key_change(
    options: &mut KeyVals,
    format: Format,
    force: bool,
) -> Result<Option<KeyChange>, String> {
    let prefix = if format == Format::Luks {
        ""
    } else {
        "encrypt."
    };
    let mut take = |key: &str| options.take(&format!("{prefix}{key}"));
    let (state, new, old) = (take("state"), take("new-secret"), take("old-secret"));
    let (slot, time) = (take("keyslot"), take("iter-time"));
    let read_slot = |text: String| {
        text.parse::<usize>()
            .map_err(|_| format!("Parameter '{prefix}keyslot' expects a number"))
    };
    let given = new.is_some() || old.is_some() || slot.is_some() || time.is_some();
    let slot = slot.map(read_slot).transpose()?;
    match state.as_deref() {
        None if !given => Ok(None),
        None => Err(format!("Parameter '{prefix}state' is missing")),
        Some("active") => {
            if old.is_some() {
                return Err("'old-secret' must not be given when activating keyslots".into());
            }
            let new = new.ok_or("'new-secret' is required to activate a keyslot")?;
            Ok(Some(KeyChange::Add {
                new: secrets::find(&new)?,
                slot,
                iter_time: iter_time(time.as_deref())?.unwrap_or(DEFAULT_ITER_TIME),
                force,
            }))
        }
        Some("inactive") => {
            if new.is_some() {
                return Err("'new-secret' must not be given when erasing keyslots".into());
            }
            if time.is_some() {
                return Err("'iter-time' must not be given when erasing keyslots".into());
            }
            Ok(Some(KeyChange::Erase {
                old: old.as_deref().map(secrets::find).transpose()?,
                slot,
                force,
            }))
        }
        Some(other) => Err(format!("Parameter 'state' does not accept value '{other}'")),
    }
}
