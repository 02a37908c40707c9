//! What a 4 KiB read costs in the virtio-blk device and its driver, over a disk that costs nothing.
//! Both run on one thread. An argument selects one depth, for a profile.

use std::{io, sync::Arc, time::Instant};

use virtio_devices::{
    Interrupt,
    testing::NullDisk,
    virtio_blk::{
        VirtioBlk, VirtioBlkConfig,
        driver::{Driver, DriverConfig},
    },
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        Ok(())
    }

    fn signal_config(&self) -> io::Result<()> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const ROUNDS: u64 = 1_000_000;
    let only: Option<u64> = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    println!("depth indirect segments  device ns  driver ns  per request");
    for (depth, indirect, segments) in [
        (1, false, 1),
        (32, false, 1),
        (32, true, 1),
        (32, true, 8),
        (128, true, 1),
    ] {
        if only.is_some_and(|only| only != depth) {
            continue;
        }
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 64 << 20),
            (GuestAddress(1 << 32), 64 << 20),
        ])?);
        let device = VirtioBlk::new(Box::new(NullDisk(1 << 30)), VirtioBlkConfig::default())?;
        device.ack_features(device.features())?;
        let config = DriverConfig {
            indirect,
            max_segments: segments,
            ..DriverConfig::default()
        };
        let mut driver = Driver::new(&memory, GuestAddress(0), config)?;
        let mut worker = device.queue_worker(
            0,
            &driver.queue(),
            Arc::clone(&memory),
            Arc::new(NoInterrupt),
        )?;
        let data: Vec<(GuestAddress, u32)> = (0..u64::from(segments))
            .map(|index| (GuestAddress((1 << 32) + index * 8192), 4096))
            .collect();
        let (mut in_device, mut done) = (0, 0u64);
        let start = Instant::now();
        while done < ROUNDS {
            for index in 0..depth {
                driver.read((done + index) % 100_000, &data);
            }
            let _ = driver.publish();
            let before = Instant::now();
            worker.process();
            in_device += before.elapsed().as_nanos();
            done += driver.poll(|used| assert_eq!(used.status, 0)) as u64;
        }
        let total = start.elapsed().as_nanos() as f64 / done as f64;
        let in_device = in_device as f64 / done as f64;
        println!(
            "{depth:5} {indirect:8} {segments:8} {in_device:10.1} {:10.1}",
            total - in_device
        );
    }
    Ok(())
}
