//! What the libraries report, in the words of the program that is played.

use std::fmt;

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

use crate::grumble;

/// Tells that an image was found corrupt and is marked so, and nothing else.
pub(crate) struct Corruption;

/// The target of the event.
const TARGET: &str = "block::corruption";

impl<S: Subscriber> Layer<S> for Corruption {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target() == TARGET
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut what = What(None);
        event.record(&mut what);
        if let Some(what) = what.0 {
            // The library adds which field has which value.
            let end = what.find(" (field ").unwrap_or(what.len());
            grumble!(
                "qcow2: Marking image as corrupt: {}; further corruption events will be suppressed",
                &what[..end]
            );
        }
    }
}

struct What(Option<String>);

impl Visit for What {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "corruption" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}
