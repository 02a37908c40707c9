//! The arguments of a control command, taken one by one.

use serde_json::{Map, Value};

use crate::util::size;

/// What is left of the arguments.
#[derive(Debug)]
pub(crate) struct Arguments(Map<String, Value>);

impl Arguments {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self(map)
    }

    fn take(&mut self, name: &str) -> Result<Value, String> {
        self.0
            .remove(name)
            .ok_or_else(|| format!("the argument '{name}' is missing"))
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &str) -> Result<String, String> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            other => Err(format!("'{name}' is {other}, expected a text")),
        }
    }

    /// A size: a number of bytes, or a text such as `2G`.
    pub(crate) fn size(&mut self, name: &str) -> Result<u64, String> {
        let value = self.take(name)?;
        let size = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => size::parse(text).ok(),
            _ => None,
        };
        size.ok_or_else(|| format!("'{name}' is {value}, expected a size such as 2G"))
    }

    /// A number, or a text that is one.
    pub(crate) fn number(&mut self, name: &str) -> Result<u32, String> {
        let value = self.take(name)?;
        let number = match &value {
            Value::Number(number) => number.as_u64().and_then(|it| u32::try_from(it).ok()),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        number.ok_or_else(|| format!("'{name}' is {value}, expected a number"))
    }

    /// True or false, which it is if nobody says anything.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, String> {
        match self.0.remove(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(Value::String(text)) if text == "true" => Ok(true),
            Some(Value::String(text)) if text == "false" => Ok(false),
            Some(other) => Err(format!("'{name}' is {other}, expected true or false")),
        }
    }

    /// Nothing may be left that nobody asked for.
    pub(crate) fn end(&self) -> Result<(), String> {
        match self.0.keys().next() {
            Some(name) => Err(format!("unknown argument '{name}'")),
            None => Ok(()),
        }
    }
}
