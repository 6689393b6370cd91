//! The daemon's command line. In the library for its manual page.

use std::path::PathBuf;

use clap::Parser;
use nix::sys::sysinfo::sysinfo;
use xenbus::sim::MachineOptions;

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
    /// With an embedded Xen: MiB of memory that each guest may give its devices, which stay in the host's memory then; without it as much as all
    /// guests together
    #[arg(long, value_name = "MIB")]
    pub guest_memory: Option<u64>,
    /// With an embedded Xen: MiB of memory that all guests together may give their devices; without it half of what the host has, or what one guest
    /// may give if that is more
    #[arg(long, value_name = "MIB")]
    pub all_guests_memory: Option<u64>,
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

impl Arguments {
    /// What an embedded machine is like.
    pub fn machine(&self) -> MachineOptions {
        // Guests' memory is pinned, and they are not to have the host run out of it.
        let half = sysinfo().map_or(0, |host| host.ram_total() / 2);
        let (guest_memory, all_guests_memory) =
            limits(self.guest_memory, self.all_guests_memory, half);
        MachineOptions {
            map_windows: self.map_bars,
            guest_memory,
            all_guests_memory,
            ..MachineOptions::default()
        }
    }
}

/// How many bytes a guest may give, and all of them: of what was said in MiB, and of half of the host's memory in bytes.
fn limits(each: Option<u64>, all: Option<u64>, half: u64) -> (u64, u64) {
    const MIB: u64 = 1 << 20;
    let bytes = |mib: u64| mib.saturating_mul(MIB);
    let each = each.map(bytes);
    let all = all.map_or_else(|| half.max(each.unwrap_or(0)), bytes);
    (each.unwrap_or(all), all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_together_pin_half_of_the_host_unless_more_is_said() {
        const HALF: u64 = 8 << 30;
        assert_eq!(limits(None, None, HALF), (HALF, HALF));
        assert_eq!(limits(Some(1024), None, HALF), (1 << 30, HALF));
        // What one was told that it may give, it may.
        assert_eq!(limits(Some(12 << 10), None, HALF), (12 << 30, 12 << 30));
        assert_eq!(limits(None, Some(1024), HALF), (1 << 30, 1 << 30));
        assert_eq!(limits(Some(0), Some(u64::MAX), HALF), (0, u64::MAX));
    }
}
