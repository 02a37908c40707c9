//! The control socket of a server: JSON lines, and what each kind of server understands.
//!
//! A request is `{"execute": "resize", "arguments": {"size": "2G"}}`, with an `id` that comes back if
//! there is one. The answer is `{"return": …}`, or `{"error": "why not"}`.

mod arguments;
mod blk;
mod counters;
mod nvme;

use std::{path::Path, sync::Arc};

use serde_json::{Map, Value, json};
use vmm_glue::control::ControlSocket;

pub(crate) use arguments::Arguments;
pub(crate) use blk::BlkControl;
pub(crate) use counters::counters;
pub(crate) use nvme::NvmeControl;

use crate::util::failure::Failure;

/// What a server does when it is told to. Every method may be called from any thread.
pub(crate) trait Controlled: Send + Sync {
    /// The commands it knows, each with its arguments, for whoever asks for `help`.
    fn commands(&self) -> &'static [&'static str];

    /// Does one of them; the answer, or why not.
    fn execute(&self, command: &str, arguments: &mut Arguments) -> Result<Value, String>;
}

/// Serves a control socket until the value is dropped.
pub(crate) fn start(path: &Path, device: Arc<dyn Controlled>) -> Result<ControlSocket, Failure> {
    let answer = Arc::new(move |line: &str| answer(&*device, line).to_string());
    ControlSocket::serve(path, answer)
        .map_err(|reason| Failure::new(format!("--control {}: {reason}", path.display())))
}

fn answer(device: &dyn Controlled, line: &str) -> Value {
    let mut request = match serde_json::from_str::<Map<String, Value>>(line) {
        Ok(request) => request,
        Err(error) => return json!({"error": format!("expected a JSON object: {error}")}),
    };
    let id = request.remove("id");
    let mut answer = match execute(device, request) {
        Ok(value) => json!({"return": value}),
        Err(reason) => json!({"error": reason}),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

fn execute(device: &dyn Controlled, mut request: Map<String, Value>) -> Result<Value, String> {
    let Some(Value::String(command)) = request.remove("execute") else {
        return Err("expected 'execute' with the name of a command".to_owned());
    };
    let arguments = match request.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err("expected 'arguments' to be an object".to_owned()),
    };
    if let Some(name) = request.keys().next() {
        return Err(format!("unknown member '{name}'"));
    }
    if command == "help" {
        return Ok(json!(device.commands()));
    }
    let name = |text: &&str| text.split(' ').next() == Some(command.as_str());
    if !device.commands().iter().any(name) {
        return Err(format!("unknown command '{command}'; 'help' lists them"));
    }
    device.execute(&command, &mut Arguments::new(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Controlled for Echo {
        fn commands(&self) -> &'static [&'static str] {
            &["echo text=TEXT size=SIZE"]
        }

        fn execute(&self, _: &str, arguments: &mut Arguments) -> Result<Value, String> {
            let text = arguments.text("text")?;
            let size = arguments.size("size")?;
            arguments.end()?;
            Ok(json!([text, size]))
        }
    }

    #[test]
    fn requests_are_answered() {
        let ask = |line: &str| answer(&Echo, line).to_string();
        assert_eq!(
            ask(r#"{"execute":"echo","arguments":{"text":"a","size":"2k"},"id":7}"#),
            r#"{"id":7,"return":["a",2048]}"#
        );
        assert_eq!(
            ask(r#"{"execute":"echo","arguments":{"text":"a","size":5}}"#),
            r#"{"return":["a",5]}"#
        );
        assert!(ask(r#"{"execute":"help"}"#).contains("echo text=TEXT"));
        for (line, reason) in [
            ("", "expected a JSON object"),
            ("[]", "expected a JSON object"),
            ("{}", "'execute'"),
            (r#"{"execute":5}"#, "'execute'"),
            (r#"{"execute":"ech"}"#, "unknown command 'ech'"),
            (r#"{"execute":"echo","more":1}"#, "unknown member 'more'"),
            (r#"{"execute":"echo","arguments":[]}"#, "an object"),
            (r#"{"execute":"echo"}"#, "'text'"),
            (r#"{"execute":"echo","arguments":{"text":1}}"#, "'text'"),
            (
                r#"{"execute":"echo","arguments":{"text":"a","size":"x"}}"#,
                "'size'",
            ),
            (
                r#"{"execute":"echo","arguments":{"text":"a","size":1,"b":"x"}}"#,
                "'b'",
            ),
        ] {
            let answer = ask(line);
            assert!(answer.starts_with(r#"{"error":"#), "{line}: {answer}");
            assert!(answer.contains(reason), "{line}: {answer}");
        }
    }
}
