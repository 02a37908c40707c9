//! `--object secret,…`: passwords by id, and the options of images that name them.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use block::{Format, crypto::Secret};
use serde_json::Value;

use crate::util::{
    failure::{Failure, Outcome},
    keyval::KeyVals,
};

/// The objects of this run of the program, as its command line defined them.
fn table() -> &'static Mutex<HashMap<String, Secret>> {
    static TABLE: OnceLock<Mutex<HashMap<String, Secret>>> = OnceLock::new();
    TABLE.get_or_init(Mutex::default)
}

/// Defines the objects of `--object`.
pub(crate) fn define(objects: &[String]) -> Outcome<()> {
    for object in objects {
        let (id, secret) = parse(object).map_err(Failure::new)?;
        let mut table = table().lock().unwrap_or_else(PoisonError::into_inner);
        if table.insert(id.clone(), secret).is_some() {
            return Err(Failure::new(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
    }
    Ok(())
}

fn parse(object: &str) -> Result<(String, Secret), String> {
    let mut options = match object.starts_with('{') {
        true => of_json(object)?,
        false => KeyVals::parse(object, Some("qom-type")),
    };
    let kind = options.take("qom-type").unwrap_or_default();
    if kind != "secret" {
        return Err(format!(
            "Parameter 'qom-type' does not accept value '{kind}'"
        ));
    }
    let id = options.take("id").ok_or("Parameter 'id' is missing")?;
    if options.get("keyid").is_some() || options.get("iv").is_some() {
        return Err(format!(
            "secret '{id}': encrypted secrets (keyid, iv) are not supported"
        ));
    }
    let format = options.take("format").unwrap_or_else(|| "raw".into());
    let secret = match (options.take("data"), options.take("file")) {
        (Some(data), None) => Secret::new(data.into_bytes()),
        (None, Some(file)) => Secret::from_file(Path::new(&file)).map_err(|e| e.to_string())?,
        (None, None) => return Err("Either 'file' or 'data' must be provided".into()),
        (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".into()),
    };
    if let Some(key) = options.first_key() {
        return Err(format!("Invalid parameter '{key}'"));
    }
    let secret = match format.as_str() {
        "raw" => secret,
        "base64" => decode(&id, &secret)?,
        other => {
            return Err(format!(
                "Parameter 'format' does not accept value '{other}'"
            ));
        }
    };
    Ok((id, secret))
}

fn of_json(object: &str) -> Result<KeyVals, String> {
    let failed = |error: &dyn std::fmt::Display| format!("--object: {error}");
    let value: Value = serde_json::from_str(object).map_err(|error| failed(&error))?;
    let mut options = KeyVals::default();
    for (key, value) in value
        .as_object()
        .ok_or_else(|| failed(&"expected an object"))?
    {
        let text = value
            .as_str()
            .ok_or_else(|| failed(&format!("{key}: expected a string")))?;
        options.push(key, text);
    }
    Ok(options)
}

fn decode(id: &str, secret: &Secret) -> Result<Secret, String> {
    let text: Vec<u8> = secret
        .as_bytes()
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    STANDARD
        .decode(text)
        .map(Secret::new)
        .map_err(|error| format!("secret '{id}': not base64: {error}"))
}

/// The secret of that id, which has to be text.
pub(crate) fn find(id: &str) -> Result<Secret, String> {
    let table = table().lock().unwrap_or_else(PoisonError::into_inner);
    let secret = table
        .get(id)
        .ok_or_else(|| format!("No secret with id '{id}'"))?;
    match std::str::from_utf8(secret.as_bytes()) {
        Ok(_) => Ok(secret.clone()),
        Err(_) => Err(format!("Data from secret {id} is not valid UTF-8")),
    }
}

/// How options call the id of a secret for images of a format.
fn key_option(format: Format) -> &'static str {
    match format {
        Format::Luks => "key-secret",
        _ => "encrypt.key-secret",
    }
}

/// The option that opens an image made with these options.
pub(crate) fn key_of(options: &KeyVals, format: Format) -> Option<(String, String)> {
    let key = key_option(format);
    options.get(key).map(|id| (key.to_owned(), id.to_owned()))
}

/// The options that name the secrets of an image, as they are for an overlay of it.
pub(crate) fn below(options: &KeyVals) -> KeyVals {
    let mut keys = KeyVals::default();
    for (key, id) in options
        .iter()
        .filter(|(key, _)| key.ends_with("key-secret"))
    {
        keys.push(key, id);
    }
    keys.prefixed("backing.")
}

/// Takes the secrets of an image, and of those below it, out of its options: each with the levels
/// down the chain. None of an image that stays locked, whose secrets need not even be defined.
pub(crate) fn take_keys(
    options: &mut KeyVals,
    locked: bool,
) -> Result<Vec<(usize, Secret)>, String> {
    const BELOW: &str = "backing.";
    let mut keys = Vec::new();
    let mut prefix = String::new();
    // As deep as any option goes.
    for depth in 0..=options.depth_of(BELOW) {
        // The header says what it is, too.
        if let Some(method) = options.take(&format!("{prefix}encrypt.format"))
            && !matches!(method.as_str(), "luks" | "aes")
        {
            return Err(format!(
                "Parameter 'encrypt.format' does not accept value '{method}'"
            ));
        }
        for key in ["encrypt.key-secret", "key-secret"] {
            if let Some(id) = options.take(&format!("{prefix}{key}"))
                && !locked
            {
                keys.push((depth, find(&id)?));
            }
        }
        prefix += BELOW;
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_secrets_with_an_id_and_data() {
        let text = |object: &str| {
            parse(object).map(|(id, secret)| {
                (
                    id,
                    String::from_utf8(secret.as_bytes().to_vec()).expect("text"),
                )
            })
        };
        let both = |id: &str, data: &str| Ok((id.to_owned(), data.to_owned()));
        assert_eq!(text("secret,id=a,data=x,,y"), both("a", "x,y"));
        assert_eq!(
            text("secret,id=a,data=c2V j,format=base64"),
            both("a", "sec")
        );
        assert_eq!(
            text("{\"qom-type\":\"secret\",\"id\":\"a\",\"data\":\"b\"}"),
            both("a", "b")
        );
        for (object, expected) in [
            ("secret,data=x", "'id' is missing"),
            ("foo,id=a", "does not accept value 'foo'"),
            ("secret,id=a", "Either 'file' or 'data'"),
            ("secret,id=a,data=x,file=y", "mutually exclusive"),
            ("secret,id=a,data=*,format=base64", "not base64"),
            ("secret,id=a,data=x,format=hex", "'hex'"),
            ("secret,id=a,data=x,keyid=b", "keyid"),
            ("secret,id=a,data=x,more=b", "'more'"),
        ] {
            let error = text(object).expect_err(object);
            assert!(error.contains(expected), "{object}: {error}");
        }
    }

    #[test]
    fn keys_of_a_chain_are_found_by_their_depth() {
        define(&[
            "secret,id=chain0,data=a".into(),
            "secret,id=chain1,data=b".into(),
        ])
        .expect("defined");
        let text = "encrypt.key-secret=chain0,backing.driver=luks,backing.key-secret=chain1,size=1";
        let mut options = KeyVals::parse(text, None);
        let keys = take_keys(&mut options, false).expect("taken");
        let found: Vec<_> = keys
            .iter()
            .map(|(depth, secret)| (*depth, secret.as_bytes()))
            .collect();
        assert_eq!(found, [(0, &b"a"[..]), (1, &b"b"[..])]);
        assert_eq!(options.get("size"), Some("1"));
        assert!(options.get("backing.key-secret").is_none());
        let mut options = KeyVals::parse("key-secret=nobody", None);
        assert_eq!(
            take_keys(&mut options.clone(), true).map(|keys| keys.len()),
            Ok(0)
        );
        let error = take_keys(&mut options, false).expect_err("unknown");
        assert_eq!(error, "No secret with id 'nobody'");
    }
}
