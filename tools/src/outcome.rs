//! Exit codes, and what ends a command.

use std::io;
use std::process::ExitCode;

use pcibackd::control::client::ClientError;
use pcibackd::facade::{ExecError, FacadeError};

use crate::demo::DemoError;
use crate::persist::PersistError;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done.
    Done,
    /// Some or all of it failed.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// A command could not be run. The numbers are those of env(1), timeout(1) and other commands that run one.
    NotRun(u8),
}

impl Outcome {
    /// This, unless what came after it ended worse.
    pub fn and(self, next: Self) -> Self {
        if self == Self::Done { next } else { self }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(match outcome {
            Outcome::Done => 0,
            Outcome::Failed => 1,
            Outcome::Usage => 2,
            Outcome::NotRun(code) => code,
        })
    }
}

/// What ends a command before its end.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The daemon cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The daemon refused the request as a whole.
    #[error("{0}")]
    Refused(String),
    /// The daemon answered something else than was asked.
    #[error(
        "pcibackd gave an answer that belongs to another question; use the pciback of its version"
    )]
    Answer,
    /// The daemon has ended, or gave up a reader that did not read.
    #[error("pcibackd has hung up; see its log (journalctl -u pcibackd)")]
    Ended,
    /// A command could not be run with the facade.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// Devices will not be hidden at boot as asked.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// The toolstack did not do its part.
    #[error("`xl {words}` failed")]
    Xl {
        /// What it was to do.
        words: String,
        /// How it ended.
        #[source]
        source: io::Error,
    },
    /// xl would not come back in time.
    #[error(
        "with '{word}' xl comes back too late for a guest that is to get its devices before it runs: leave it out, and use 'xl console' or \
         'xl vncviewer' afterwards"
    )]
    XlWaits {
        /// The argument.
        word: String,
    },
    /// The facade could not be laid or taken away.
    #[error(transparent)]
    Facade(#[from] FacadeError),
    /// There is no waiting for signals.
    #[error("cannot wait for signals")]
    Wait(#[source] io::Error),
    /// The demonstration came to nothing.
    #[error("the demonstration cannot go on")]
    Demo(#[source] Box<DemoError>),
    /// Output could not be written.
    #[error("cannot write {what}")]
    Write {
        /// What was to be written.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl CommandError {
    /// The exit code that tells of it.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Exec(ExecError::Command { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Outcome::NotRun(127)
            }
            Self::Exec(ExecError::Command { .. }) => Outcome::NotRun(126),
            Self::Exec(_) => Outcome::NotRun(125),
            _ => Outcome::Failed,
        }
    }
}
