//! The options that `platter serve nvme` and `platter serve ahci` share.

use std::path::PathBuf;

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
    /// End after the first connection of each socket
    #[arg(long)]
    pub(crate) once: bool,
    /// A socket on which 'platter ctl' tells the running server what to do
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
}

impl VfioUserArgs {
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
