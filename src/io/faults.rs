//! Commands of the io language that suspend requests: for an image named with the filter `blkdebug`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use block::faults::{Event, Faults};

use crate::{
    io::{Said, lang::Parsed, queue::Opened},
    say,
};

/// How long `wait_break` waits for a request that may never come.
const PATIENCE: Duration = Duration::from_secs(30);

fn rules(opened: &Opened) -> Result<Arc<Faults>, Said> {
    opened
        .spec
        .faults
        .clone()
        .ok_or_else(|| Said::Text("Could not set a breakpoint: Operation not supported".into()))
}

fn tell(faults: &Faults) {
    for line in faults.take_told() {
        say!("blkdebug: {line}");
    }
}

/// `break`.
pub(super) fn set(opened: &mut Opened, args: &Parsed) -> Result<(), Said> {
    let faults = rules(opened)?;
    let event = Event::from_name(&args.operands[0])
        .ok()
        .flatten()
        .ok_or_else(|| Said::Text("Could not set a breakpoint: Invalid argument".into()))?;
    faults.suspend_at(event, &args.operands[1]);
    Ok(())
}

/// `remove_break`.
pub(super) fn remove(opened: &mut Opened, args: &Parsed) -> Result<(), Said> {
    rules(opened)?.remove_break(&args.operands[0]);
    Ok(())
}

/// `wait_break`.
pub(super) fn wait(opened: &mut Opened, args: &Parsed) -> Result<(), Said> {
    let faults = rules(opened)?;
    let tag = &args.operands[0];
    let started = Instant::now();
    while !faults.is_suspended(tag) {
        if started.elapsed() > PATIENCE {
            return Err(Said::Text(format!("no request was suspended as '{tag}'")));
        }
        opened.wait_a_moment();
    }
    tell(&faults);
    Ok(())
}

/// `resume`.
pub(super) fn resume(opened: &mut Opened, args: &Parsed) -> Result<(), Said> {
    let faults = rules(opened)?;
    if !faults.resume(&args.operands[0]) {
        return Err(Said::Text(
            "Could not resume request: No such file or directory".into(),
        ));
    }
    tell(&faults);
    opened.poll();
    Ok(())
}
