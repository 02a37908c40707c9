//! stub
use crate::util::{
    failure::{Failure, Outcome},
    persona::Persona,
};
/// Bench
#[derive(clap::Args, Debug)]
pub(crate) struct BenchArgs {}
pub(crate) fn run(_a: &BenchArgs, _p: Persona) -> Outcome {
    Err(Failure::new("no"))
}
