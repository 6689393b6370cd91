//! `pciback reset`.

use std::path::Path;

use clap::Args;
use pcibackd::config::ResetChoice;
use pcibackd::control::protocol::Request;

use super::hide::Tell;
use crate::arguments::DEVICE_LISTS;
use crate::outcome::{CommandError, Outcome};

const HELP: &str = "\
A device is reset after each guest anyway. This is for one that did not come back from that ('dead' in
'pciback list'): another method may revive it. A reset of the bus works if the device is alone on it.

Examples:
  pciback reset 03:00.0
  pciback reset --method bus 03:00.0";

/// What `pciback reset` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP, after_long_help = format!("{DEVICE_LISTS}\n\n{HELP}"))]
pub struct Reset {
    /// How; as its settings say if not given
    #[arg(long, value_enum, value_name = "METHOD")]
    pub method: Option<ResetChoice>,
    /// Also devices whose virtual functions guests have: the guests lose them
    #[arg(long)]
    pub force: bool,
    /// For programs: a JSON object per line, for each device
    #[arg(long)]
    pub json: bool,
    /// Devices, or lists of devices
    #[arg(required = true, value_name = "BDF")]
    pub devices: Vec<String>,
}

/// Resets devices.
pub fn run(run_dir: &Path, arguments: &Reset) -> Result<Outcome, CommandError> {
    let (method, force) = (arguments.method, arguments.force);
    let tell = Tell {
        command: "reset",
        json: arguments.json,
    };
    tell.carry_out(run_dir, &arguments.devices, |devices| Request::Reset {
        devices,
        method,
        force,
    })
}
