//! JSON laid out as QEMU's programs do: four spaces, and empty lists and objects on two lines.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::{
    Map, Value,
    ser::{Formatter, Serializer},
};

use crate::say;

/// Prints a value to standard output, with a newline.
pub(crate) fn print<T: Serialize>(value: &T) {
    say!("{}", to_string(value));
}

/// A value as text.
pub(crate) fn to_string<T: Serialize>(value: &T) -> String {
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, Layout::default());
    // Writing to memory does not fail, and every key we serialise is a string.
    if value.serialize(&mut serializer).is_err() {
        return String::from("null");
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// An object whose keys come in a given order; those that are not in it come last.
pub(crate) struct InOrder {
    pub(crate) map: Map<String, Value>,
    pub(crate) order: &'static [&'static str],
}

impl Serialize for InOrder {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let known = self
            .order
            .iter()
            .filter_map(|key| self.map.get_key_value(*key));
        let rest = self
            .map
            .iter()
            .filter(|(key, _)| !self.order.contains(&key.as_str()));
        serializer.collect_map(known.chain(rest))
    }
}

#[derive(Default)]
struct Layout {
    depth: usize,
}

impl Layout {
    fn newline<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(b"    "))
    }

    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        self.newline(writer)?;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(b",")?;
        }
        self.newline(writer)
    }
}

impl Formatter for Layout {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.item(w, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.item(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn empty_containers_take_two_lines() {
        let text = super::to_string(&json!({"a": [], "b": {"c": 1}}));
        assert_eq!(
            text,
            "{\n    \"a\": [\n    ],\n    \"b\": {\n        \"c\": 1\n    }\n}"
        );
    }
}
