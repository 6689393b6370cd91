//! `pciback trace`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Args;
use clap::builder::PossibleValuesParser;
use conf_space::Bdf;
use nix::sys::signal::{SigSet, Signal};
use pcibackd::control::client;
use pcibackd::control::protocol::{Request, Response};
use pcibackd::control::traced::Filter;
use pcibackd::session::meter;

use crate::daemon::understand;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::output::style::Paint;
use crate::output::traced::Lines;

const HELP: &str = "\
A line for each operation: seconds since the trace began, the guest, its device, the command, what was read
or written, the registers and fields by their names in the PCI specifications, and how long it took.
Tracing costs a guest that is traced about a microsecond per operation, and others nothing. A reader that is
too slow misses operations, and is told how many. Ctrl-C ends it.

Examples:
  pciback trace
  pciback trace web --writes
  pciback trace 03:00.0 --errors
  pciback trace 3 --command conf_write --command enable_msix
  pciback trace --output /tmp/trace.json";

/// What `pciback trace` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Trace {
    /// Only this guest, by number or name, or only this device of the host
    #[arg(value_name = "DOM|BDF")]
    pub target: Option<String>,
    /// Only what changes something: no reads
    #[arg(long)]
    pub writes: bool,
    /// Only what was dropped, refused, or failed
    #[arg(long)]
    pub errors: bool,
    /// Only this command; may be given several times
    #[arg(long = "command", value_name = "COMMAND", value_parser = commands())]
    pub commands: Vec<String>,
    /// Write into this file, as a JSON object per line
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// For programs: a JSON object per line
    #[arg(long)]
    pub json: bool,
}

fn commands() -> PossibleValuesParser {
    let names = meter::COMMANDS.iter().map(|command| command.name());
    PossibleValuesParser::new(names.chain([meter::UNKNOWN]))
}

/// Shows guests' operations until it is interrupted.
pub fn run(run_dir: &Path, arguments: &Trace) -> Result<Outcome, CommandError> {
    let interrupt = Interrupt::catch()?;
    let mut out = Destination::open(arguments)?;
    let mut answers = client::ask_for_many(run_dir, &Request::Trace(filter(arguments)))?;
    let connection = answers.connection().map_err(cannot("use the connection"))?;
    let interrupted = interrupt.hang_up(connection)?;
    let guests = match answers.next() {
        Some(first) => understand(first?, |response| match response {
            Response::Tracing { guests } => Some(guests),
            _ => None,
        })?,
        None => return Err(CommandError::Ended),
    };
    if guests.is_empty() {
        output::complain("no guest that is to be traced is there; waiting for it");
    }
    let (mut operations, mut lost) = (0u64, 0u64);
    for answer in answers {
        let answer = match answer {
            // What hanging up left of the last line.
            Err(_) if interrupted.load(Ordering::Acquire) => break,
            other => other?,
        };
        match &answer {
            Response::Operation(_) => operations = operations.saturating_add(1),
            Response::Lost { operations, .. } => lost = lost.saturating_add(*operations),
            _ => return Err(CommandError::Answer),
        }
        if !out.write(&answer)? {
            return Ok(Outcome::Done);
        }
    }
    out.flush()?;
    let missed = match lost {
        0 => "none was missed".to_owned(),
        lost => format!("{lost} were missed"),
    };
    output::complain(&format!("{operations} operations; {missed}"));
    if interrupted.load(Ordering::Acquire) {
        Ok(Outcome::Done)
    } else {
        Err(CommandError::Ended)
    }
}

/// An address of a device has a colon, and neither a guest's number nor its name has one.
fn filter(arguments: &Trace) -> Filter {
    let target = arguments.target.as_deref();
    let device: Option<Bdf> = target.and_then(|target| target.parse().ok());
    Filter {
        guest: target.filter(|_| device.is_none()).map(str::to_owned),
        device,
        writes: arguments.writes,
        errors: arguments.errors,
        commands: arguments.commands.clone(),
    }
}

fn cannot(what: &'static str) -> impl Fn(io::Error) -> CommandError {
    move |source| CommandError::Write {
        what: what.to_owned(),
        source,
    }
}

/// Ctrl-C, and what `timeout` sends.
struct Interrupt(SigSet);

impl Interrupt {
    /// From now on they kill nobody.
    fn catch() -> Result<Self, CommandError> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
        let blocked = signals.thread_block().map_err(io::Error::from);
        blocked.map_err(cannot("and wait for Ctrl-C"))?;
        Ok(Self(signals))
    }

    /// The first ends the connection, and so the command; a second ends the process.
    fn hang_up(self, connection: UnixStream) -> Result<Arc<AtomicBool>, CommandError> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        let wait = move || {
            if self.0.wait().is_ok() {
                flag.store(true, Ordering::Release);
                // If it has ended, so will the command.
                let _ = connection.shutdown(Shutdown::Both);
            }
            if let Ok(signal) = self.0.wait() {
                std::process::exit((signal as i32).saturating_add(128));
            }
        };
        thread::Builder::new()
            .spawn(wait)
            .map_err(cannot("and wait for Ctrl-C"))?;
        Ok(interrupted)
    }
}

/// Where it goes, and how it looks there.
struct Destination {
    out: BufWriter<Box<dyn Write>>,
    name: String,
    lines: Option<Lines>,
}

impl Destination {
    fn open(arguments: &Trace) -> Result<Self, CommandError> {
        let Some(path) = &arguments.output else {
            return Ok(Self {
                out: BufWriter::new(Box::new(io::stdout())),
                name: "to standard output".to_owned(),
                lines: (!arguments.json).then(|| Lines::new(Paint::for_stdout())),
            });
        };
        let name = path.display().to_string();
        let file = File::create(path).map_err(|source| CommandError::Write {
            what: name.clone(),
            source,
        })?;
        Ok(Self {
            out: BufWriter::new(Box::new(file)),
            name,
            lines: None,
        })
    }

    /// Writes a line, which is seen at once. `false`: nobody reads any more.
    fn write(&mut self, answer: &Response) -> Result<bool, CommandError> {
        let written = match &mut self.lines {
            Some(lines) => self.out.write_all(lines.line(answer).as_bytes()),
            None => serde_json::to_writer(&mut self.out, answer)
                .map_err(io::Error::from)
                .and_then(|()| self.out.write_all(b"\n")),
        };
        match written.and_then(|()| self.out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn flush(&mut self) -> Result<(), CommandError> {
        self.out.flush().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> CommandError {
        CommandError::Write {
            what: self.name.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Arguments, Command};

    fn parse(arguments: &[&str]) -> Filter {
        let arguments = ["pciback", "trace"].iter().chain(arguments);
        match Arguments::try_parse_from(arguments).unwrap().command {
            Command::Trace(arguments) => filter(&arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_device_is_told_from_a_guest_by_its_address() {
        assert_eq!(parse(&[]), Filter::default());
        assert_eq!(parse(&["03:00.0"]).device, Some(Bdf::from_devfn(0, 3, 0)));
        for guest in ["3", "web", "03.00.0"] {
            let filter = parse(&[guest]);
            assert_eq!(
                (filter.guest.as_deref(), filter.device),
                (Some(guest), None)
            );
        }
    }

    #[test]
    fn only_commands_that_there_are_can_be_asked_for() {
        let filter = parse(&["--command", "conf_read", "--command", "enable_msix"]);
        assert_eq!(filter.commands, ["conf_read", "enable_msix"]);
        assert!(Arguments::try_parse_from(["pciback", "trace", "--command", "read"]).is_err());
    }
}
