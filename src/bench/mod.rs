//! `platter bench`: how fast, how late, at what cost, and is the data right?

mod ahci;
mod args;
mod fill;
mod lane;
mod load;
mod nvme;
mod report;
mod suite;
mod virtio;

pub(crate) use args::BenchArgs;

use block::{AsyncDiskFile, Format, io::EngineKind};

use crate::{
    image::{
        open::{self, OpenHow},
        spec::ImageSpec,
    },
    util::{
        failure::{Failure, Outcome},
        interrupt,
        persona::Persona,
    },
};
use fill::Model;
use lane::FrontEnd;
use load::{Load, Mix};
use report::Row;

/// One measurement to be made.
#[derive(Clone, Copy, Debug)]
struct Case {
    format: Format,
    front_end: FrontEnd,
    engine: EngineKind,
    load: Load,
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, persona: Persona) -> Outcome {
    interrupt::watch();
    match &args.image {
        None => suite::run(args, persona),
        Some(image) => on_image(args, image, persona),
    }
}

/// The fio-style form: one load on one image.
fn on_image(args: &BenchArgs, image: &str, persona: Persona) -> Outcome {
    let spec = ImageSpec::parse(image, args.image_opts, args.format.as_deref(), persona)?;
    let mix = args.mix()?;
    let mut how = OpenHow {
        read_only: !mix.writes() && !args.verify,
        direct: args.direct,
        engine: args.engine,
        ..OpenHow::default()
    };
    if let Some(mode) = &args.cache {
        how.cache = open::cache_mode(mode)?;
    }
    let disk = open::open(&spec, &how, persona)?;
    let load = args.load(mix, disk.size())?;
    let mut model = if args.verify {
        Some(Model::fill(&*disk, load.size)?)
    } else {
        None
    };
    let mut rows = Vec::new();
    for front_end in args.front_ends()? {
        let case = Case {
            format: disk.format(),
            front_end,
            engine: args.engine.unwrap_or_default(),
            load,
        };
        rows.push(measure(&*disk, &case, model.as_mut())?);
        if let Some(model) = &model {
            model.check(&*disk)?;
        }
    }
    disk.close()
        .map_err(|error| Failure::new(error.to_string()))?;
    report::print(&rows, args.json(), true);
    Ok(0)
}

/// Makes one measurement.
fn measure(disk: &dyn AsyncDiskFile, case: &Case, model: Option<&mut Model>) -> Outcome<Row> {
    let result = load::run(disk, case.front_end, &case.load, model)?;
    Ok(Row::new(case, &result))
}

impl Mix {
    /// Whether it changes the disk.
    fn writes(self) -> bool {
        self.read_percent < 100
    }
}
