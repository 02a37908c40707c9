//! What the io language prints about a finished command.

use std::time::Duration;

use crate::util::size;

/// How a command reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Style {
    /// `-C`: one line for programs.
    pub(crate) machine: bool,
    /// `-q`: nothing.
    pub(crate) quiet: bool,
    /// `-v`: the data, too.
    pub(crate) dump: bool,
}

/// The lines for `done` of `wanted` bytes moved from `offset` in `ops` requests.
pub(crate) fn lines(
    verb: &str,
    style: Style,
    offset: u64,
    wanted: u64,
    done: u64,
    ops: u32,
    time: Duration,
) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let rate = done as f64 / seconds;
    let per_second = f64::from(ops) / seconds;
    if style.machine {
        return format!("{done},{ops},{},{rate:.3},{per_second:.3}", long_time(time));
    }
    format!(
        "{verb} {done}/{wanted} bytes at offset {offset}\n{}, {ops} ops; {} ({}/sec and {per_second:.4} ops/sec)",
        size::io_human(done as f64),
        short_time(time),
        size::io_human(rate),
    )
}

fn short_time(time: Duration) -> String {
    if time.as_secs() >= 60 {
        return long_time(time);
    }
    format!("{:02}.{:02} sec", time.as_secs(), time.subsec_millis() / 10)
}

fn long_time(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{}:{:02}:{:02}.{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        time.subsec_millis() / 10
    )
}

/// The data in hexadecimal and as text, sixteen bytes a line.
pub(crate) fn dump(bytes: &[u8], offset: u64) -> String {
    let mut out = String::new();
    for (at, line) in bytes.chunks(16).enumerate() {
        out += &format!("{:08x}: ", offset + at as u64 * 16);
        for byte in line {
            out += &format!(" {byte:02x}");
        }
        out += "  ";
        out.extend(line.iter().map(|byte| match byte {
            b if b.is_ascii_alphanumeric() => char::from(*b),
            _ => '.',
        }));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_those_of_qemu_io() {
        let time = Duration::from_millis(270);
        assert_eq!(
            lines("wrote", Style::default(), 512, 1 << 20, 1 << 20, 1, time),
            "wrote 1048576/1048576 bytes at offset 512\n1 MiB, 1 ops; 00.27 sec (3.704 MiB/sec and 3.7037 ops/sec)"
        );
        let machine = Style {
            machine: true,
            ..Style::default()
        };
        assert_eq!(
            lines(
                "read",
                machine,
                0,
                4096,
                4096,
                1,
                Duration::from_millis(500)
            ),
            "4096,1,0:00:00.50,8192.000,2.000"
        );
    }

    #[test]
    fn dumps_are_those_of_qemu_io() {
        assert_eq!(
            dump(&[0x41; 17], 0),
            "00000000:  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA\n\
             00000010:  41  A\n"
        );
    }
}
