//! pcibackd: the Xen PCI backend daemon.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use pcibackd::config::Config;
use pcibackd::daemon::{self, DEFAULT_RUN_DIR, DaemonError, Options, PlatformKind};
use pcibackd::text::chain;
use pcibackd::{facade, logging, memory};

/// Gives PV guests of Xen the PCI devices that are hidden from dom0
#[derive(Debug, Parser)]
#[command(name = "pcibackd", version)]
struct Arguments {
    /// Configuration file; without it /etc/pciback/pcibackd.toml, if there is one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only look at a configuration file: what is wrong with it, and what in it no device of this host matches; exit code 1 if it is wrong
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    check_config: Option<Option<PathBuf>>,
    /// What to run on: this machine's Xen, or one embedded in the process with simulated devices
    #[arg(long, value_enum, default_value = "xen")]
    platform: PlatformKind,
    /// Where the sockets and the records of hidden devices are; not to be cleared while guests run
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// For a mount namespace of its own, as pcibackd.service makes one: `pciback facade` lays the facade for everybody, from outside
    #[arg(long)]
    sandboxed: bool,
    /// Where messages go
    #[arg(long, value_enum, default_value = "stderr")]
    log: logging::Target,
    /// Say more; twice: everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    if let Some(code) = facade::run_if_keeper() {
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
        run_dir: arguments.run_dir,
        sandboxed: arguments.sandboxed,
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
