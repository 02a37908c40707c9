//! The options that `platter serve nvme` and `platter serve ahci` share.

use std::{path::PathBuf, time::Duration};

use block::io::EngineKind;
use clap::Args;

use crate::{
    image::open::{self, OpenHow},
    util::failure::Failure,
};

/// How images are opened and the socket is served.
#[derive(Args, Clone, Debug)]
pub(crate) struct VfioUserArgs {
    /// Bypass the host's page cache
    #[arg(long)]
    direct: bool,
    /// Cache mode: writeback (the default), writethrough, none, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE")]
    cache: Option<String>,
    /// The engine: sync, io_uring or linux-aio (which needs --direct)
    #[arg(long, value_name = "ENGINE", value_parser = crate::util::persona::engine)]
    engine: Option<EngineKind>,
    /// Microseconds that a queue's thread looks for commands before it sleeps, at most; 0: never
    #[arg(long, value_name = "US", default_value_t = 32, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    poll_max: u32,
    /// End after the first connection of each socket
    #[arg(long)]
    pub(crate) once: bool,
    /// A socket on which 'platter ctl' tells the running server what to do
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
}

impl VfioUserArgs {
    /// How long a worker looks before it sleeps.
    pub(crate) fn poll_max(&self) -> Duration {
        Duration::from_micros(self.poll_max.into())
    }

    /// How to open an image.
    pub(crate) fn how(&self, read_only: bool) -> Result<OpenHow, Failure> {
        let mut how = OpenHow {
            read_only,
            direct: self.direct,
            engine: self.engine,
            named_files_need_format: true,
            ..OpenHow::default()
        };
        if let Some(mode) = &self.cache {
            how.cache = open::cache_mode(mode)?;
        }
        Ok(how)
    }
}
