//! What encryption costs at each size, done by the thread at hand and handed to another: the figures
//! behind the sizes in `block/src/encryption.rs`. Prints a table; the best of many tries counts, so
//! that other load on the machine does not.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use block::crypto::{
    SectorCipher,
    cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator},
    hash::HashAlgorithm,
};

const SIZES: [usize; 7] = [4, 8, 16, 32, 64, 128, 512];
const TRIES: usize = 300;

/// The shortest time that `work` takes.
fn best(mut work: impl FnMut()) -> Duration {
    (0..TRIES)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

/// The shortest time to hand something to a thread that sleeps, and to have its answer.
fn hand_over() -> Duration {
    let (to, jobs) = mpsc::channel::<()>();
    let (answer, answers) = mpsc::channel();
    let worker = thread::spawn(move || {
        while jobs.recv().is_ok() {
            if answer.send(()).is_err() {
                return;
            }
        }
    });
    let mut times: Vec<Duration> = (0..TRIES)
        .map(|_| {
            // Asleep, as a pool's threads are where this matters.
            thread::sleep(Duration::from_micros(200));
            let start = Instant::now();
            let handed = to.send(()).is_ok();
            let answered = answers.recv().is_ok();
            assert!(handed && answered, "the worker lives");
            start.elapsed()
        })
        .collect();
    drop(to);
    assert!(worker.join().is_ok(), "the worker ends");
    times.sort();
    times[TRIES / 2]
}

fn main() {
    let ciphers = [
        (
            "aes-256-xts",
            CipherAlgorithm::Aes256,
            CipherMode::Xts,
            IvGenerator::Plain64,
        ),
        (
            "aes-128-xts",
            CipherAlgorithm::Aes128,
            CipherMode::Xts,
            IvGenerator::Plain64,
        ),
        (
            "aes-256-cbc-essiv",
            CipherAlgorithm::Aes256,
            CipherMode::Cbc,
            IvGenerator::Essiv,
        ),
        (
            "serpent-256-xts",
            CipherAlgorithm::Serpent256,
            CipherMode::Xts,
            IvGenerator::Plain64,
        ),
        (
            "twofish-256-xts",
            CipherAlgorithm::Twofish256,
            CipherMode::Xts,
            IvGenerator::Plain64,
        ),
    ];
    let handing = hand_over().as_secs_f64() * 1e6;
    println!("handing over to a sleeping thread and back: {handing:.1} us\n");
    println!("| cipher | KiB | encrypt us | decrypt us | decrypt MiB/s |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, algorithm, mode, iv) in ciphers {
        let spec = CipherSpec {
            algorithm,
            mode,
            iv,
            iv_hash: Some(HashAlgorithm::Sha256),
        };
        let key: Vec<u8> = (0..spec.key_len() as u8).collect();
        let cipher = match SectorCipher::new(spec, &key) {
            Ok(cipher) => cipher,
            Err(error) => {
                println!("| {name} | | {error} | | |");
                continue;
            }
        };
        for kib in SIZES {
            let mut data = vec![0x5a; kib << 10];
            let encrypt = best(|| cipher.encrypt(7, &mut data)).as_secs_f64();
            let decrypt = best(|| cipher.decrypt(7, &mut data)).as_secs_f64();
            println!(
                "| {name} | {kib} | {:.1} | {:.1} | {:.0} |",
                encrypt * 1e6,
                decrypt * 1e6,
                kib as f64 / 1024.0 / decrypt
            );
        }
    }
}
