//! pcibackd: the Xen PCI backend daemon.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use pcibackd::arguments::Arguments;
use pcibackd::config::Config;
use pcibackd::daemon::{self, DaemonError, Options};
use pcibackd::text::chain;
use pcibackd::{facade, fdstore, logging, memory};

fn main() -> ExitCode {
    if let Some(code) = facade::run_if_keeper().or_else(fdstore::run_if_store) {
        return code;
    }
    let arguments = Arguments::parse();
    if let Some(file) = &arguments.check_config {
        return check_config(file.as_deref().or(arguments.config.as_deref()));
    }
    if let Err(error) = logging::start(arguments.log, arguments.verbose) {
        eprintln!("pcibackd: {error}");
    }
    memory::keep_small();
    let config = match Config::load(arguments.config.as_deref()) {
        Ok(config) => config,
        Err(error) => return failed(&error, EX_CONFIG),
    };
    let options = Options {
        config,
        platform: arguments.platform,
        machine: arguments.machine(),
        run_dir: arguments.run_dir,
        sandboxed: arguments.sandboxed,
        fdstore: fdstore::Starts::of_daemon(),
    };
    match daemon::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (DaemonError::KernelBackend | DaemonError::Running { .. })) => {
            failed(&error, EX_CONFIG)
        }
        Err(error) => failed(&error, EXIT_FAILURE),
    }
}

fn check_config(file: Option<&Path>) -> ExitCode {
    let findings = match daemon::check_config(file) {
        Ok(findings) => findings,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(EXIT_FAILURE);
        }
    };
    for warning in &findings.warnings {
        eprintln!("warning: {warning}");
    }
    for error in &findings.errors {
        eprintln!("error: {error}");
    }
    if findings.errors.is_empty() {
        println!("the configuration can be used");
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_FAILURE)
    }
}

/// Something that starting again cannot heal (`sysexits.h`). systemd does not try.
const EX_CONFIG: u8 = 78;
const EXIT_FAILURE: u8 = 1;

fn failed(error: &dyn Error, code: u8) -> ExitCode {
    log::error!("{}", chain(error));
    ExitCode::from(code)
}
