//! pciback: the command line.
//!
//! | module | holds |
//! |---|---|
//! | [`arguments`] | what can be typed |
//! | [`commands`] | one file for each command, or for those that belong together |
//! | [`devices`] | lists of devices, checked before anything is asked |
//! | [`daemon`] | asking the daemon |
//! | [`demo`] | the demonstration |
//! | [`output`] | tables, colours, the words for device classes |
//! | [`persist`] | hiding devices at every boot |
//! | [`progress`] | what takes long, told while somebody waits |
//! | [`ssdt`] | the ACPI table of virtio-mmio |
//! | [`virtio_device`] | virtio devices as they are typed |
//! | [`outcome`] | exit codes and what ends a command |
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

mod arguments;
mod commands;
mod daemon;
mod demo;
mod devices;
mod outcome;
mod output;
mod persist;
mod progress;
mod ssdt;
mod virtio_device;

use std::process::ExitCode;

use arguments::{Arguments, Command};
use clap::Parser;
use outcome::{CommandError, Outcome};
use pcibackd::text::chain;

fn main() -> ExitCode {
    let Arguments { run_dir, command } = Arguments::parse();
    match run(&run_dir, command) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            output::complain(&chain(&error));
            error.outcome().into()
        }
    }
}

fn run(run_dir: &std::path::Path, command: Command) -> Result<Outcome, CommandError> {
    match command {
        Command::Hide(arguments) => commands::hide::hide(run_dir, &arguments),
        Command::Unhide(arguments) => commands::hide::unhide(run_dir, &arguments),
        Command::Reset(arguments) => commands::reset::run(run_dir, &arguments),
        Command::List(arguments) => commands::list::run(run_dir, &arguments),
        Command::Show(arguments) => commands::show::run(run_dir, &arguments),
        Command::Set(arguments) => commands::set::run(run_dir, &arguments),
        Command::Vf(arguments) => commands::vf::run(run_dir, &arguments),
        Command::Status(arguments) => commands::status::run(run_dir, &arguments),
        Command::Metrics(arguments) => commands::metrics::run(run_dir, &arguments),
        Command::Trace(arguments) => commands::trace::run(run_dir, &arguments),
        Command::Persist(arguments) => commands::persist::run(&arguments),
        Command::Doctor(arguments) => commands::doctor::run(run_dir, &arguments),
        Command::Virtio(arguments) => commands::virtio::run(run_dir, &arguments),
        Command::Create(arguments) => commands::create::run(run_dir, &arguments),
        Command::Acpi(arguments) => commands::acpi::run(&arguments),
        Command::Exec(arguments) => commands::exec::run(run_dir, &arguments),
        Command::Facade(_) => commands::facade::run(run_dir),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Completions(arguments) => commands::shell::completions(&arguments),
        Command::Man(arguments) => commands::shell::man(&arguments),
    }
}
