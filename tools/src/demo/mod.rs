//! `pciback demo`: the daemon at work on an embedded Xen with simulated devices, told as a story.
//!
//! What is told was seen, not planned: addresses, states, times and counts come from the machine, the guest, or the daemon's own answers
//! on its control socket. What should hold is checked, and the exit code tells whether it did.
//!
//! | module | holds |
//! |---|---|
//! | [`story`] | what happens, chapter by chapter |
//! | [`stage`] | machine and daemon, and how the story asks them |
//! | [`operations`], [`watcher`] | those who look on: at the guest's operations, at the backend's states |
//! | [`guest`], [`drivers`] | the guest: its frontend, its kernel, its drivers |
//! | [`timeline`], [`tree`], [`checks`] | how it is told |

mod checks;
mod drivers;
mod guest;
mod operations;
mod stage;
mod story;
mod timeline;
mod tree;
mod watcher;

use clap::Args;
use log::{LevelFilter, Log, Metadata, Record};
use pcibackd::daemon::DaemonError;
use pcibackd::host::HostError;
use pcibackd::text::chain;
use xenbus::XenError;
use xenbus::sim::{FrontendError, ToolstackError};

use crate::outcome::{CommandError, Outcome};
use crate::output::style::{Paint, Style};
use checks::Checks;
use stage::Stage;
use timeline::{Timeline, Who, duration};

const HELP: &str = "\
All that is told was seen, and what should hold is checked: the exit code is 0 if it does.

Examples:
  pciback demo";

/// What `pciback demo` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Demo {
    /// Also print what the daemon logs
    #[arg(short, long)]
    pub verbose: bool,
}

/// What can go wrong on stage.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// With the daemon.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// With a command that it was given.
    #[error(transparent)]
    Command(#[from] Box<CommandError>),
    /// With a simulated device.
    #[error(transparent)]
    Host(#[from] HostError),
    /// With the hypervisor.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// With xenstore.
    #[error(transparent)]
    Store(#[from] xenbus::xenstore::Error),
    /// With the toolstack.
    #[error(transparent)]
    Toolstack(#[from] ToolstackError),
    /// With the guest.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// The directory for its sockets.
    #[error(
        "cannot make a directory for its sockets; is the one that $TMPDIR names, or /tmp, writable?"
    )]
    Directory(#[source] std::io::Error),
    /// Something did not happen.
    #[error("waited {} for it in vain: {what}", duration(*.waited))]
    Waited {
        /// What.
        what: String,
        /// For how long.
        waited: std::time::Duration,
    },
    /// The toolstack's thread ended by a panic.
    #[error("the toolstack has panicked")]
    Panicked,
}

/// Gives the demonstration.
pub fn run(arguments: &Demo) -> Result<Outcome, CommandError> {
    let paint = Paint::for_stdout();
    let timeline = Timeline::new(paint);
    listen_to_log(&timeline, arguments.verbose);
    let mut checks = Checks::default();
    let told = Stage::new(timeline.clone()).and_then(|stage| {
        let told = story::tell(&stage, &mut checks);
        let ended = stage.end();
        told.and(ended)
    });
    if checks.any() {
        timeline.heading("What was checked");
        timeline.print(&checks.report(paint));
    }
    if let Err(error) = told {
        return Err(CommandError::Demo(Box::new(error)));
    }
    let (verdict, style, outcome) = if checks.all_hold() {
        ("All of it holds", Style::Good, Outcome::Done)
    } else {
        ("Not all of it holds", Style::Bad, Outcome::Failed)
    };
    let took = duration(timeline.elapsed());
    timeline.print(&format!("\n{} ({took})\n", paint.paint(style, verdict)));
    Ok(outcome)
}

/// Puts what the daemon logs into the timeline: warnings always.
fn listen_to_log(timeline: &Timeline, verbose: bool) {
    #[derive(Debug)]
    struct Listener(Timeline);
    impl Log for Listener {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            let level = record.level().as_str().to_lowercase();
            self.0
                .tell(Who::Daemon, &format!("{level}: {}", record.args()), "");
        }

        fn flush(&self) {}
    }
    let level = if verbose {
        LevelFilter::Info
    } else {
        LevelFilter::Warn
    };
    match log::set_boxed_logger(Box::new(Listener(timeline.clone()))) {
        Ok(()) => log::set_max_level(level),
        Err(error) => timeline.tell(
            Who::Daemon,
            &format!("its log is not shown: {}", chain(&error)),
            "",
        ),
    }
}
