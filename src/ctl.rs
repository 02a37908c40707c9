//! `platter ctl`: tells a running server what to do.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::{
    say,
    util::failure::{Failure, Outcome},
};

/// Tell a running server what to do, over its control socket
#[derive(Args, Debug)]
#[command(after_long_help = "\
EXAMPLES
  What can this server be told?
    platter ctl /run/disk.ctl help

  Its counters, and a larger disk:
    platter ctl /run/disk.ctl counters
    platter ctl /run/disk.ctl resize size=80G

  Namespaces of an NVMe server:
    platter ctl /run/nvme.ctl add-namespace namespace=more.qcow2,format=qcow2
    platter ctl /run/nvme.ctl remove-namespace nsid=2

  One that a guest made in the pool of the server, with its image:
    platter ctl /run/nvme.ctl remove-namespace nsid=3 --delete

The socket is the one that 'platter serve … --control PATH' listens on. It speaks JSON, a line each:
  {\"execute\": \"resize\", \"arguments\": {\"size\": \"80G\"}}
is answered with {\"return\": …} or {\"error\": \"why not\"}. What is returned is printed here.")]
pub(crate) struct CtlArgs {
    /// The control socket of the server
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// What to do; 'help' lists what this server knows
    #[arg(value_name = "COMMAND")]
    command: String,
    /// Its arguments: NAME=VALUE
    #[arg(value_name = "NAME=VALUE")]
    arguments: Vec<String>,
    /// With remove-namespace: deletes the image and the sidecar of a namespace of the pool; the same as
    /// delete=true
    #[arg(long)]
    delete: bool,
}

/// Runs the command.
pub(crate) fn run(args: &CtlArgs) -> Outcome {
    let mut arguments = Map::new();
    for text in &args.arguments {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| Failure::usage("ctl", format!("'{text}': expected NAME=VALUE")))?;
        arguments.insert(name.to_owned(), Value::from(value));
    }
    if args.delete {
        arguments.insert("delete".to_owned(), Value::from(true));
    }
    let request = json!({"execute": args.command, "arguments": arguments});
    let failed = |error: std::io::Error| {
        Failure::new(format!(
            "control socket '{}': {error}",
            args.socket.display()
        ))
    };
    let mut stream = UnixStream::connect(&args.socket).map_err(failed)?;
    stream
        .write_all(format!("{request}\n").as_bytes())
        .map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .map_err(failed)?;
    if line.is_empty() {
        return Err(Failure::new("the server hung up without an answer"));
    }
    let mut answer: Value = serde_json::from_str(&line)
        .map_err(|error| Failure::new(format!("the server's answer is no JSON: {error}")))?;
    if let Some(reason) = answer["error"].as_str() {
        return Err(Failure::new(reason));
    }
    say!("{:#}", answer["return"].take());
    Ok(0)
}
