//! Bytes flipped anywhere, from a seed.

use super::*;

/// Random numbers (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Images flipped at random.
const FLIPS: u64 = 1500;

#[test]
fn flipped_bytes_never_panic_and_never_hang() {
    let image = Arc::new(valid());
    let cluster = 4096;
    let mask = 0x00ff_ffff_ffff_fe00;
    let l1 = be64(&image, 40);
    let table = be64(&image, 48);
    let places = [
        0,
        l1,
        be64(&image, l1 as usize) & mask,
        table,
        be64(&image, table as usize),
        be64(&image, 64),
    ];
    let rounds = std::env::var("PLATTER_FLIPS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(FLIPS);
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        for seed in 1..=rounds {
            let _ = sender.send(seed);
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            let mut bytes = image.to_vec();
            for _ in 0..=random.below(6) {
                let place = places[random.below(places.len() as u64) as usize];
                // Mostly where something is.
                let within = if random.below(2) == 0 { 128 } else { cluster };
                let at = (place + random.below(within)) as usize;
                if at < bytes.len() {
                    bytes[at] = match random.below(4) {
                        0 => 0,
                        1 => 0xff,
                        2 => bytes[at] ^ (1 << random.below(8)),
                        _ => random.below(256) as u8,
                    };
                }
            }
            let host = SimHost::new(SimConfig::seeded(seed));
            host.create("a.qcow2", &bytes);
            let run = || {
                let options = OpenOptions::new().format(Format::Qcow2);
                if let Ok(disk) = options.open_on("a.qcow2", Arc::new(host.clone())) {
                    exercise(&disk);
                }
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                eprintln!("seed {seed} panics");
                std::panic::resume_unwind(panic);
            }
        }
    });
    let mut last = 0;
    loop {
        match receiver.recv_timeout(Duration::from_secs(30)) {
            Ok(seed) => last = seed,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("seed {last} hangs"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    if let Err(panic) = worker.join() {
        std::panic::resume_unwind(panic);
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|text| text.trim().strip_suffix(" kB"))
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap();
    assert!(peak < 1 << 20, "peak of {peak} KiB");
}
