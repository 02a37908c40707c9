//! The io language: its commands, their options, numbers and patterns.

use crate::util::size::{self, SizeError};

/// A command of the language.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Abort,
    AioDiscard,
    AioFlush,
    AioRead,
    AioWrite,
    Alloc,
    Break,
    Close,
    Discard,
    Flush,
    Help,
    Info,
    Length,
    Map,
    Open,
    Quit,
    Read,
    Readv,
    RemoveBreak,
    Reopen,
    Resume,
    Sigraise,
    Sleep,
    Truncate,
    WaitBreak,
    Write,
    Writev,
}

/// What the language knows about a command.
#[derive(Debug)]
pub(crate) struct Command {
    /// Which one.
    pub(crate) verb: Verb,
    /// Its name.
    pub(crate) name: &'static str,
    /// Another name, or nothing.
    pub(crate) alias: &'static str,
    /// The fewest arguments, options included.
    pub(crate) min: usize,
    /// The most arguments, if there is a most.
    pub(crate) max: Option<usize>,
    /// Options, as for `getopt`: a colon follows those with a value.
    pub(crate) options: &'static str,
    /// The arguments, for the help.
    pub(crate) args: &'static str,
    /// What it does, in a line.
    pub(crate) summary: &'static str,
    /// It needs an open image.
    pub(crate) needs_image: bool,
    /// It changes the image.
    pub(crate) writes: bool,
}

impl Command {
    /// The line of the help.
    pub(crate) fn usage(&self) -> String {
        let args = match self.args {
            "" => String::new(),
            args => format!("{args} "),
        };
        format!("{} {args}-- {}", self.name, self.summary)
    }
}

macro_rules! command {
    ($verb:ident, $name:literal, $alias:literal, $min:literal..$max:expr, $options:literal,
     $args:literal, $summary:literal, image $image:literal, writes $writes:literal) => {
        Command {
            verb: Verb::$verb,
            name: $name,
            alias: $alias,
            min: $min,
            max: $max,
            options: $options,
            args: $args,
            summary: $summary,
            needs_image: $image,
            writes: $writes,
        }
    };
}

/// Every command, in the order of the help.
#[rustfmt::skip]
pub(crate) const COMMANDS: &[Command] = &[
    command!(Abort, "abort", "", 0..Some(0), "", "", "simulate a program crash using abort(3)", image false, writes false),
    command!(AioDiscard, "aio_discard", "", 2..None, "Cq", "[-Cq] off len", "asynchronously discards a number of bytes", image true, writes true),
    command!(AioFlush, "aio_flush", "", 0..Some(0), "", "", "completes all outstanding aio requests", image true, writes false),
    command!(AioRead, "aio_read", "", 2..None, "CP:iqrv", "[-Ciqrv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes", image true, writes false),
    command!(AioWrite, "aio_write", "", 2..None, "CfiP:qruz", "[-Cfiqruz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes", image true, writes true),
    command!(Alloc, "alloc", "a", 1..Some(2), "", "offset [count]", "checks if offset is allocated in the file", image true, writes false),
    command!(Break, "break", "", 2..Some(2), "", "event tag", "sets a breakpoint on event and tags the stopped request as tag", image true, writes false),
    command!(Close, "close", "c", 0..Some(0), "", "", "close the current open file", image true, writes false),
    command!(Discard, "discard", "d", 2..None, "Cq", "[-Cq] off len", "discards a number of bytes at a specified offset", image true, writes true),
    command!(Flush, "flush", "f", 0..Some(0), "", "", "flush all in-core file state to disk", image true, writes false),
    command!(Help, "help", "?", 0..Some(1), "", "[command]", "help for one or all commands", image false, writes false),
    command!(Info, "info", "i", 0..Some(0), "", "", "prints information about the current file", image true, writes false),
    command!(Length, "length", "l", 0..Some(0), "", "", "gets the length of the current file", image true, writes false),
    command!(Map, "map", "", 0..Some(1), "", "", "prints the allocated areas of a file", image true, writes false),
    command!(Open, "open", "o", 1..None, "rsCnki:t:d:o:U", "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open the file specified by path", image false, writes false),
    command!(Quit, "quit", "q", 0..Some(0), "", "", "exit the program", image false, writes false),
    command!(Read, "read", "r", 2..None, "abCl:pP:qrs:v", "[-abCqrv] [-P pattern [-s off] [-l len]] off len", "reads a number of bytes at a specified offset", image true, writes false),
    command!(Readv, "readv", "rv", 2..None, "CP:qrv", "[-Cqrv] [-P pattern] off len [len..]", "reads a number of bytes at a specified offset", image true, writes false),
    command!(RemoveBreak, "remove_break", "", 1..Some(1), "", "tag", "remove a breakpoint by tag", image true, writes false),
    command!(Reopen, "reopen", "", 0..None, "c:o:rw", "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options", image true, writes false),
    command!(Resume, "resume", "", 1..Some(1), "", "tag", "resumes the request tagged as tag", image true, writes false),
    command!(Sigraise, "sigraise", "", 1..Some(1), "", "signal", "raises a signal", image false, writes false),
    command!(Sleep, "sleep", "", 1..Some(1), "", "", "waits for the given value in milliseconds", image false, writes false),
    command!(Truncate, "truncate", "t", 1..Some(3), "m:", "[-m prealloc_mode] off", "truncates the current file at the given offset", image true, writes true),
    command!(WaitBreak, "wait_break", "", 1..Some(1), "", "tag", "waits for the suspension of a request", image true, writes false),
    command!(Write, "write", "w", 2..None, "bcCfnpP:qrs:uz", "[-bcCfnqruz] [-P pattern | -s source_file] off len", "writes a number of bytes at a specified offset", image true, writes true),
    command!(Writev, "writev", "wv", 2..None, "CfqrP:", "[-Cfqr] [-P pattern] off len [len..]", "writes a number of bytes at a specified offset", image true, writes true),
];

/// The command of that name.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|command| command.name == name || (!name.is_empty() && command.alias == name))
}

/// Options and operands of a command line.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    options: Vec<(char, String)>,
    /// What is no option.
    pub(crate) operands: Vec<String>,
}

impl Parsed {
    /// Whether the option was given.
    pub(crate) fn has(&self, option: char) -> bool {
        self.options.iter().any(|(name, _)| *name == option)
    }

    /// The last value of the option.
    pub(crate) fn value(&self, option: char) -> Option<&str> {
        let found = self.options.iter().rev().find(|(name, _)| *name == option);
        found.map(|(_, value)| value.as_str())
    }

    /// Every value of the option.
    pub(crate) fn values(&self, option: char) -> impl Iterator<Item = &str> {
        self.options
            .iter()
            .filter(move |(name, _)| *name == option)
            .map(|(_, value)| value.as_str())
    }
}

/// Sorts arguments into options and operands, wherever the options stand. The error is a message in
/// the words of `getopt`.
pub(crate) fn parse_args(command: &Command, args: &[&str]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if *arg == "--" {
            parsed.operands.extend(args.map(|arg| (*arg).to_owned()));
            break;
        }
        let Some(letters) = arg.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            parsed.operands.push((*arg).to_owned());
            continue;
        };
        for (at, letter) in letters.char_indices() {
            let known = command
                .options
                .find(letter)
                .filter(|_| letter != ':')
                .ok_or_else(|| format!("{}: invalid option -- '{letter}'", command.name))?;
            if !command.options[known + 1..].starts_with(':') {
                parsed.options.push((letter, String::new()));
                continue;
            }
            let attached = &letters[at + letter.len_utf8()..];
            let value = if attached.is_empty() {
                args.next().copied().ok_or_else(|| {
                    format!(
                        "{}: option requires an argument -- '{letter}'",
                        command.name
                    )
                })?
            } else {
                attached
            };
            parsed.options.push((letter, value.to_owned()));
            break;
        }
    }
    Ok(parsed)
}

/// Reads a size or an offset.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(number) if i64::try_from(number).is_ok() => Ok(number),
        Ok(_) | Err(SizeError::TooLarge) => {
            Err(format!("Parsing error: argument too large -- {text}"))
        }
        Err(SizeError::NotANumber) => Err(format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        )),
    }
}

/// Reads a byte: decimal, hexadecimal or octal.
pub(crate) fn pattern(text: &str) -> Result<u8, String> {
    let value = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        u8::from_str_radix(hex, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        u8::from_str_radix(text, 8)
    } else {
        text.parse()
    };
    value.map_err(|_| format!("{text} is not a valid pattern byte"))
}

/// The most bytes of one request.
pub(crate) const MAX_REQUEST: u64 = 0x7fff_fe00;

/// Reads a length, which one request must be able to move.
pub(crate) fn length(text: &str) -> Result<u64, String> {
    let len = number(text)?;
    if len > MAX_REQUEST {
        return Err(format!("length cannot exceed {MAX_REQUEST}, given {text}"));
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Parsed, String> {
        let words: Vec<_> = line.split_whitespace().collect();
        let command = find(words[0]).expect("a command");
        parse_args(command, &words[1..])
    }

    #[test]
    fn options_cluster_and_stand_anywhere() {
        let parsed = parse("write -pP 0xa 0 64k -q").expect("parses");
        assert!(parsed.has('p') && parsed.has('q') && !parsed.has('z'));
        assert_eq!(parsed.value('P'), Some("0xa"));
        assert_eq!(parsed.operands, ["0", "64k"]);
        let parsed = parse("read -P5 -s1k -l 2k 0 4k").expect("parses");
        assert_eq!(
            (parsed.value('s'), parsed.value('l')),
            (Some("1k"), Some("2k"))
        );
        assert_eq!(parse("read 0 -- -5").expect("parses").operands, ["0", "-5"]);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(
            parse("read -Z 0 1").unwrap_err(),
            "read: invalid option -- 'Z'"
        );
        assert_eq!(
            parse("read 0 1 -P").unwrap_err(),
            "read: option requires an argument -- 'P'"
        );
        assert!(pattern("300").is_err() && pattern("zz").is_err());
        assert_eq!(
            (pattern("0xcd"), pattern("010"), pattern("0")),
            (Ok(205), Ok(8), Ok(0))
        );
        assert!(
            length("3G")
                .unwrap_err()
                .starts_with("length cannot exceed 2147483136, given 3G")
        );
        assert!(number("9E").unwrap_err().contains("too large"));
    }

    #[test]
    fn names_and_aliases_are_unique() {
        for command in COMMANDS {
            assert_eq!(find(command.name).map(|c| c.verb), Some(command.verb));
            if !command.alias.is_empty() {
                assert_eq!(find(command.alias).map(|c| c.verb), Some(command.verb));
            }
        }
        assert!(find("").is_none());
    }
}
