//! The qtest protocol: a command a line, an answer a line.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Result, machine::Machine};

/// Answers commands until the test is gone.
pub(crate) fn serve(socket: UnixStream, machine: &Arc<Mutex<Machine>>) -> Result<()> {
    let mut out = socket.try_clone().map_err(|e| e.to_string())?;
    let mut clock = 0_u64;
    for line in BufReader::new(socket).lines() {
        // The test ends the machine by closing.
        let Ok(line) = line else { return Ok(()) };
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = command(&mut machine, &words, &mut clock)
            .ok_or_else(|| format!("no command of the protocol: {line}"))?;
        if out.write_all(format!("OK{answer}\n").as_bytes()).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Bytes of the access that a command's last letter names.
fn width(letter: Option<char>) -> Option<usize> {
    match letter? {
        'b' => Some(1),
        'w' => Some(2),
        'l' => Some(4),
        'q' => Some(8),
        _ => None,
    }
}

/// What stands behind OK; `None` for what is no command.
fn command(machine: &mut Machine, words: &[&str], clock: &mut u64) -> Option<String> {
    let (name, rest) = words.split_first()?;
    let at = |index: usize| rest.get(index).copied().and_then(number);
    let last = name.chars().last();
    match *name {
        "outb" | "outw" | "outl" => {
            let data = at(1)?.to_le_bytes();
            machine.write_port(at(0)? as u16, &data[..width(last)?]);
        }
        "inb" | "inw" | "inl" => {
            let mut data = [0; 8];
            machine.read_port(at(0)? as u16, &mut data[..width(last)?]);
            return Some(format!(" 0x{:04x}", u64::from_le_bytes(data)));
        }
        "writeb" | "writew" | "writel" | "writeq" => {
            let data = at(1)?.to_le_bytes();
            machine.write(at(0)?, &data[..width(last)?]);
        }
        "readb" | "readw" | "readl" | "readq" => {
            let mut data = [0; 8];
            machine.read(at(0)?, &mut data[..width(last)?]);
            return Some(format!(" 0x{:016x}", u64::from_le_bytes(data)));
        }
        "read" | "b64read" => {
            let mut data = vec![0; usize::try_from(at(1)?).ok()?];
            machine.read(at(0)?, &mut data);
            return Some(if *name == "read" {
                format!(" 0x{}", hex(&data))
            } else {
                format!(" {}", base64(&data))
            });
        }
        "write" => {
            let mut data = from_hex(rest.get(2)?.strip_prefix("0x")?)?;
            data.resize(usize::try_from(at(1)?).ok()?, 0);
            machine.write(at(0)?, &data);
        }
        "b64write" => {
            let mut data = from_base64(rest.get(2)?)?;
            data.resize(usize::try_from(at(1)?).ok()?, 0);
            machine.write(at(0)?, &data);
        }
        "memset" => {
            let data = vec![at(2)? as u8; usize::try_from(at(1)?).ok()?];
            machine.write(at(0)?, &data);
        }
        "endianness" => return Some(" little".to_owned()),
        // Time is the host's; nothing here waits for the machine's.
        "clock_step" | "clock_set" => {
            *clock += at(0).unwrap_or(1);
            return Some(format!(" {clock}"));
        }
        // Nobody looks at interrupts but through the devices.
        "irq_intercept_in" | "irq_intercept_out" => {}
        _ => return None,
    }
    Some(String::new())
}

fn hex(data: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * data.len());
    for byte in data {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    text.as_bytes()
        .chunks(2)
        .map(|pair| Some((digit(pair[0])? << 4 | digit(*pair.get(1)?)?) as u8))
        .collect()
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(data: &[u8]) -> String {
    let mut text = String::new();
    for chunk in data.chunks(3) {
        let mut bytes = [0; 4];
        bytes[1..=chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes(bytes);
        for at in 0..4 {
            if at <= chunk.len() {
                let index = bits >> (18 - 6 * at) & 63;
                text.push(char::from(ALPHABET[index as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut data = Vec::new();
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'=').collect();
    for chunk in digits.chunks(4) {
        let mut bits = 0;
        for (at, byte) in chunk.iter().enumerate() {
            let value = ALPHABET.iter().position(|it| it == byte)?;
            bits |= (value as u32) << (18 - 6 * at);
        }
        data.extend_from_slice(&bits.to_be_bytes()[1..chunk.len()]);
    }
    Some(data)
}
