//! Platter's nvme and ahci beside QEMU's own, in one emulated guest: what unmodified drivers get out of them.
//!
//! `cargo bench --bench in_guest -- --help` says how to run it. It needs the lab of `tests/lab/setup.sh`.

#[path = "../lab/mod.rs"]
mod lab;

mod machine;
mod measured;

use std::error::Error;
use std::process::ExitCode;

use measured::{Lab, Plan, Row, Work};

const HELP: &str = "\
usage: in_guest [--pairs N] [--seconds N] [--count N] [--size MIB] [--only TEXT]

Boots one guest with four disks of the same content: behind Platter's nvme and ahci, over vfio-user, and behind QEMU's
nvme and ich9-ahci. fio in the guest reads and writes 4 KiB at random, with 1 and with 32 in flight, in pairs of runs in
turn; then once more with so many accesses, while QEMU counts accesses to the device's registers, the guest interrupts, and
Platter how often it found something to do. Prints a table in Markdown.

  --pairs N     pairs of runs for each row (5)
  --seconds N   length of a run (2)
  --count N     accesses of the run that is counted (4000)
  --size MIB    size of each image (256)
  --only TEXT   only rows with this in their name

PLATTER_LAB_PROGRAM names a platter to measure instead of the one that cargo built for this.";

const NOTE: &str = "
Emulation has no exits. An access to a register would be one under a hypervisor, and is what QEMU writes down; so may an
interrupt be. A drain is a look of Platter's worker that found something; QEMU's devices do not count theirs.";

fn options() -> Result<Option<Plan>, Box<dyn Error>> {
    let mut plan = Plan {
        pairs: 5,
        seconds: 2,
        count: 4000,
        size: 256 << 20,
        only: String::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            value.ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            // cargo says so.
            "--bench" => {}
            "--help" | "-h" => return Ok(None),
            "--pairs" => plan.pairs = value()?.parse()?,
            "--seconds" => plan.seconds = value()?.parse()?,
            "--count" => plan.count = value()?.parse()?,
            "--size" => plan.size = value()?.parse::<u64>()? << 20,
            "--only" => plan.only = value()?,
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    Ok(Some(plan))
}

fn main() -> ExitCode {
    match options() {
        Ok(None) => println!("{HELP}"),
        Ok(Some(plan)) => run(&plan),
        Err(error) => {
            eprintln!("in_guest: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Prints the table, as it grows.
fn run(plan: &Plan) {
    let mut lab = Lab::start(plan);
    println!("{}", Row::HEAD);
    for device in 0..lab.devices() {
        for work in Work::ALL {
            let name = lab.name(device, work);
            if name.contains(&plan.only) {
                println!("{}", lab.compare(plan, device, work));
            }
        }
    }
    println!("{NOTE}");
    lab.stop();
}
