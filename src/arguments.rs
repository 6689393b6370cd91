//! The daemon's command line. In the library for its manual page.

use std::path::PathBuf;

use clap::Parser;

use crate::daemon::{DEFAULT_RUN_DIR, PlatformKind};
use crate::logging;

const SIGNALS: &str = "\
SIGHUP has the configuration read again. SIGTERM ends the daemon, and guests keep their devices for the next one.

Exit code 78: the configuration or this host is not right, and starting again does not help.

Examples:
  pcibackd --check-config
  systemctl reload pcibackd
  pcibackd --platform sim --run-dir /tmp/pciback";

/// Gives PV guests of Xen the PCI devices that are hidden from dom0
#[derive(Debug, Parser)]
#[command(name = "pcibackd", version, after_help = SIGNALS)]
pub struct Arguments {
    /// Configuration file; without it /etc/pciback/pcibackd.toml, if there is one
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only look at a configuration file: what is wrong with it, and what in it no device of this host matches; exit code 1 if it is wrong
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub check_config: Option<Option<PathBuf>>,
    /// What to run on: this machine's Xen, or one embedded in the process with simulated devices, or with this machine's by VFIO
    #[arg(long, value_enum, default_value = "xen")]
    pub platform: PlatformKind,
    /// With an embedded Xen: guests may map their devices' memory. What they get for that lets them do all that pcibackd can with the device
    #[arg(long)]
    pub map_bars: bool,
    /// With an embedded Xen: MiB of memory that each guest may give its devices, which stay in the host's memory then; without it half of what
    /// the host has
    #[arg(long, value_name = "MIB")]
    pub guest_memory: Option<u64>,
    /// Where the sockets and the records of hidden devices are; not to be cleared while guests run
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// For a mount namespace of its own, as pcibackd.service makes one: `pciback facade` lays the facade for everybody, from outside
    #[arg(long)]
    pub sandboxed: bool,
    /// Where messages go
    #[arg(long, value_enum, default_value = "stderr")]
    pub log: logging::Target,
    /// Say more; twice: everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}
