//! pcibackd: the Xen PCI backend daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pcibackd::config::Config;
use pcibackd::daemon::{self, DEFAULT_RUN_DIR, Options, PlatformKind};
use pcibackd::text::chain;
use pcibackd::{facade, logging, memory};

/// Gives PV guests of Xen the PCI devices that are hidden from dom0
#[derive(Debug, Parser)]
#[command(name = "pcibackd", version)]
struct Arguments {
    /// Configuration file; without it /etc/pciback/pcibackd.toml, if there is one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to run on: this machine's Xen, or one embedded in the process with simulated devices
    #[arg(long, value_enum, default_value = "xen")]
    platform: PlatformKind,
    /// Where the sockets and the records of hidden devices are; not to be cleared while guests run
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
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
    if let Err(error) = logging::start(arguments.log, arguments.verbose) {
        eprintln!("pcibackd: {error}");
    }
    memory::keep_small();
    let result = Config::load(arguments.config.as_deref())
        .map_err(|error| chain(&error))
        .and_then(|config| {
            daemon::run(Options {
                config,
                platform: arguments.platform,
                run_dir: arguments.run_dir,
            })
            .map_err(|error| chain(&error))
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            log::error!("{why}");
            ExitCode::FAILURE
        }
    }
}
