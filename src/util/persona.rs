//! The name the program was called by decides how it speaks.

use std::{ffi::OsStr, path::Path};

use block::io::EngineKind;

use crate::{grumble, util::failure::Failure};

/// The program that is being played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Persona {
    /// Platter itself: careful about files that images name.
    Platter,
    /// `qemu-img`: its options, texts, exit statuses and habits.
    QemuImg,
    /// `qemu-io`, likewise.
    QemuIo,
}

/// The QEMU release whose texts the `qemu-img` and `qemu-io` names follow.
pub(crate) const QEMU_VERSION: &str = "10.0.13";

impl Persona {
    /// The persona for the name the program was called by.
    pub(crate) fn from_argv0(argv0: Option<&OsStr>) -> Self {
        let name = argv0.map(Path::new).and_then(Path::file_name);
        match name.and_then(OsStr::to_str) {
            Some("qemu-img") => Persona::QemuImg,
            Some("qemu-io") => Persona::QemuIo,
            _ => Persona::Platter,
        }
    }

    /// The name in front of every message.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Persona::Platter => "platter",
            Persona::QemuImg => "qemu-img",
            Persona::QemuIo => "qemu-io",
        }
    }

    /// Whether it is one of QEMU's programs.
    pub(crate) fn is_qemu(self) -> bool {
        self != Persona::Platter
    }

    /// The text of `--version`.
    pub(crate) fn version(self) -> String {
        let own = env!("CARGO_PKG_VERSION");
        match self {
            Persona::Platter => own.to_owned(),
            _ => format!("version {QEMU_VERSION} (platter {own})"),
        }
    }

    /// Prints a message to standard error as this program does.
    pub(crate) fn complain(self, message: &str) {
        grumble!("{}: {message}", self.name());
    }

    /// Prints a failure to standard error and returns the exit status.
    pub(crate) fn report(self, failure: &Failure) -> u8 {
        if let Some(message) = &failure.message {
            self.complain(message);
        }
        if let Some(command) = failure.see_help_of {
            grumble!("Try '{} {command} --help' for more info", self.name());
        }
        failure.status
    }
}

/// Reads the name of an engine, for clap.
pub(crate) fn engine(name: &str) -> Result<EngineKind, String> {
    EngineKind::from_name(name).ok_or_else(|| {
        let names: Vec<_> = EngineKind::ALL.iter().map(|kind| kind.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_name_decides() {
        let of = |name: &str| Persona::from_argv0(Some(OsStr::new(name)));
        assert_eq!(of("/usr/bin/qemu-img"), Persona::QemuImg);
        assert_eq!(of("qemu-io"), Persona::QemuIo);
        assert_eq!(of("./platter"), Persona::Platter);
        assert_eq!(of("qemu-img.real"), Persona::Platter);
        assert_eq!(Persona::from_argv0(None), Persona::Platter);
    }
}
