//! What persons and programs get to see.

pub mod class;
pub mod duration;
pub mod errors;
pub mod names;
pub mod style;
pub mod table;
pub mod traced;

use std::io::{self, Write};

use pcibackd::text::printable;
use serde::Serialize;

use self::style::Paint;
use crate::outcome::{CommandError, Outcome};

/// Prints to standard output. A reader that has seen enough (`| head`) is no failure.
pub fn print(text: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(CommandError::Write {
            what: "to standard output".to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Prints what programs read.
pub fn print_json(value: &impl Serialize) -> Result<(), CommandError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Write {
        what: "JSON".to_owned(),
        source: error.into(),
    })?;
    print(&format!("{text}\n"))
}

/// Prints what was asked for: for programs, or in words for persons.
pub fn show<T: Serialize>(
    json: bool,
    value: &T,
    words: impl FnOnce(&T, Paint) -> String,
) -> Result<Outcome, CommandError> {
    if json {
        print_json(value)?;
    } else {
        print(&words(value, Paint::for_stdout()))?;
    }
    Ok(Outcome::Done)
}

/// Prints one of several things that programs read, one on each line.
pub fn print_json_line(value: &impl Serialize) -> Result<(), CommandError> {
    let text = serde_json::to_string(value).map_err(|error| CommandError::Write {
        what: "JSON".to_owned(),
        source: error.into(),
    })?;
    print(&format!("{text}\n"))
}

/// Says on standard error how it goes.
pub fn tell(message: &str) {
    complain(message);
}

/// Says on standard error what went wrong. If that is closed there is nobody left to tell.
pub fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "pciback: {}", printable(message));
}
