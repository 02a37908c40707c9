//! Several loads at once, each on a thread and a processor of its own.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::{
    Result,
    cpu::{self, Of},
    side::{Load, OnThread, Side, Slice},
};

/// The processors that this process may use.
///
/// # Errors
/// The host's.
pub fn processors() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .collect())
}

fn pin(processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}

/// Loads that run at the same time and count as one side.
pub struct Lanes {
    threads: Vec<OnThread>,
}

impl Lanes {
    /// Starts `count` threads, each pinned to a processor; `make` makes the load of each on it.
    ///
    /// # Errors
    /// Those of `make`, or when there are too few processors.
    pub fn start<L: Load>(
        count: usize,
        make: impl Fn() -> Result<L> + Clone + Send + 'static,
    ) -> Result<Self> {
        let processors = processors()?;
        if processors.len() < count {
            let there = processors.len();
            return Err(
                format!("{count} queues need {count} processors, there are {there}").into(),
            );
        }
        let threads = processors.into_iter().take(count).map(|processor| {
            let make = make.clone();
            OnThread::start(move || {
                pin(processor)?;
                make()
            })
        });
        Ok(Self {
            threads: threads.collect::<Result<_>>()?,
        })
    }
}

impl Side for Lanes {
    fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice> {
        let count = self.threads.len() as u64;
        let (start, before) = (Instant::now(), cpu::time(Of::Process));
        for (lane, thread) in (0..).zip(&self.threads) {
            thread.begin(length, seed * count + lane)?;
        }
        let mut sum = Slice::default();
        let slices: Vec<Result<Slice>> = self.threads.iter_mut().map(OnThread::end).collect();
        for slice in slices {
            let slice = slice?;
            sum.ios += slice.ios;
            sum.thread_cpu += slice.thread_cpu;
        }
        sum.wall = start.elapsed();
        sum.all_cpu = cpu::time(Of::Process) - before;
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::side::Stop;

    struct Ten;

    impl Load for Ten {
        fn run(&mut self, _stop: Stop, _seed: u64) -> Result<u64> {
            assert_eq!(processors()?.len(), 1);
            Ok(10)
        }
    }

    #[test]
    fn lanes_are_pinned_and_add_up() {
        let count = processors().unwrap().len().min(2);
        let mut lanes = Lanes::start(count, || Ok(Ten)).unwrap();
        let slice = lanes.slice(Duration::ZERO, 1).unwrap();
        assert_eq!(slice.ios, 10 * count as u64);
        assert!(Lanes::start(CpuSet::MAX_CPU + 1, || Ok(Ten)).is_err());
    }
}
