//! Where messages go: standard error, or syslog.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};
use syslog::{Facility, Formatter3164, LogFormat};

use crate::text::printable;

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// Standard error. Under systemd with the priorities that the journal understands.
    Stderr,
    /// The local syslog daemon.
    Syslog,
}

/// Starts logging. To be called once.
///
/// # Errors
/// When something logs already.
pub fn start(target: Target, verbose: u8) -> Result<(), log::SetLoggerError> {
    let level = match verbose {
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let sink: Box<dyn Log> = match target {
        Target::Stderr => Box::new(Stderr {
            journal: std::env::var_os("JOURNAL_STREAM").is_some(),
        }),
        Target::Syslog => Box::new(Syslog::new()),
    };
    log::set_max_level(level);
    log::set_boxed_logger(sink)
}

/// Messages of the crates we use are of interest when something is being looked for, not every day.
fn is_wanted(metadata: &Metadata<'_>) -> bool {
    const OURS: [&str; 7] = [
        "pcibackd",
        "pciback",
        "xenbus",
        "conf_space",
        "msi",
        "sriov",
        "virtio",
    ];
    let name = metadata.target().split("::").next().unwrap_or_default();
    OURS.contains(&name) || metadata.level() <= Level::Warn
}

struct Stderr {
    journal: bool,
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_wanted(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = printable(&record.args().to_string());
        // sd-daemon(3): a level in angle brackets before the line.
        let (prefix, word) = match record.level() {
            Level::Error => ("<3>", "error: "),
            Level::Warn => ("<4>", "warning: "),
            Level::Info => ("<6>", ""),
            Level::Debug | Level::Trace => ("<7>", "debug: "),
        };
        let line = if self.journal {
            format!("{prefix}{message}\n")
        } else {
            format!("pcibackd: {word}{message}\n")
        };
        // There is nowhere to say that saying something failed.
        let _ = io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Sends datagrams without ever waiting: a syslog daemon that is stopped or gone must not stop us.
struct Syslog {
    formatter: Formatter3164,
    socket: Mutex<Option<UnixDatagram>>,
    lost: AtomicU64,
}

impl Syslog {
    const PATH: &str = "/dev/log";

    fn new() -> Self {
        let formatter = Formatter3164 {
            facility: Facility::LOG_DAEMON,
            hostname: None,
            process: "pcibackd".into(),
            pid: std::process::id(),
        };
        Self {
            formatter,
            socket: Mutex::new(None),
            lost: AtomicU64::new(0),
        }
    }

    fn send(&self, line: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match socket.take() {
            Some(open) => open,
            None => {
                let open = UnixDatagram::unbound()?;
                open.set_nonblocking(true)?;
                open.connect(Self::PATH)?;
                open
            }
        };
        // After an error the socket is dropped: the next message connects anew, to a syslog daemon that was restarted.
        open.send(line)?;
        *socket = Some(open);
        Ok(())
    }
}

impl Log for Syslog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_wanted(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut message = printable(&record.args().to_string());
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            message = format!("({lost} messages before this one were lost) {message}");
        }
        let mut line = Vec::new();
        let mut formatter = self.formatter.clone();
        let formatted = match record.level() {
            Level::Error => formatter.err(&mut line, message),
            Level::Warn => formatter.warning(&mut line, message),
            Level::Info => formatter.info(&mut line, message),
            Level::Debug | Level::Trace => formatter.debug(&mut line, message),
        };
        if formatted.is_err() || self.send(&line).or_else(|_| self.send(&line)).is_err() {
            self.lost
                .fetch_add(lost.saturating_add(1), Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}
