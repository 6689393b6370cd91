//! `pciback hide` and `pciback unhide`.

use std::path::Path;

use clap::Args;
use pcibackd::control::protocol::{Entry, Request, Response};

use crate::arguments::DEVICE_LISTS;
use crate::daemon;
use crate::devices::DeviceLists;
use crate::outcome::{CommandError, Outcome};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  pciback hide 03:00.0
  pciback hide 0000:03:10.0 0000:03:10.2
  pciback hide '04:00.*'";

/// What `pciback hide` takes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{DEVICE_LISTS}\n\n{EXAMPLES}"))]
pub struct Hide {
    /// Also what dom0 lives on: its root disk's controller, its only network card
    #[arg(long)]
    pub force: bool,
    /// Devices, or lists of devices
    #[arg(required = true, value_name = "BDF")]
    pub devices: Vec<String>,
}

/// What `pciback unhide` takes.
#[derive(Debug, Args)]
#[command(after_long_help = DEVICE_LISTS)]
pub struct Unhide {
    /// Devices, or lists of devices
    #[arg(required = true, value_name = "BDF")]
    pub devices: Vec<String>,
}

/// Hides devices.
pub fn hide(run_dir: &Path, arguments: &Hide) -> Result<Outcome, CommandError> {
    let force = arguments.force;
    carry_out(run_dir, "hide", &arguments.devices, |devices| {
        Request::Hide { devices, force }
    })
}

/// Gives devices back.
pub fn unhide(run_dir: &Path, arguments: &Unhide) -> Result<Outcome, CommandError> {
    carry_out(run_dir, "unhide", &arguments.devices, |devices| {
        Request::Unhide { devices }
    })
}

/// Has something done with every device that the lists name, and reports on each.
pub(super) fn carry_out(
    run_dir: &Path,
    command: &str,
    lists: &[String],
    request: impl FnOnce(Vec<String>) -> Request,
) -> Result<Outcome, CommandError> {
    let lists = DeviceLists::parse(lists);
    for error in &lists.refused {
        output::complain(&format!("{command}: {error}"));
    }
    let Some(understood) = lists.for_daemon() else {
        output::complain(&format!(
            "{command}: no device is named, so nothing is done"
        ));
        return Ok(Outcome::Usage);
    };
    let entries = daemon::ask(run_dir, &request(understood), |response| match response {
        Response::Entries { entries } => Some(entries),
        _ => None,
    })?;
    let failed = !lists.refused.is_empty() || entries.iter().any(|entry| !entry.ok);
    for entry in &entries {
        let line = report(entry);
        if entry.ok {
            output::print(&format!("{}\n", pcibackd::text::printable(&line)))?;
        } else {
            output::complain(&format!("{command}: {line}"));
        }
    }
    Ok(if failed {
        Outcome::Failed
    } else {
        Outcome::Done
    })
}

/// What became of an entry. A reason often names the device itself, and no name is said twice.
fn report(Entry { entry, message, .. }: &Entry) -> String {
    if message.contains(entry.as_str()) {
        message.clone()
    } else {
        format!("{entry}: {message}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_named_once() {
        let entry = |message: &str| Entry {
            entry: "0000:03:00.0".into(),
            ok: false,
            message: message.into(),
        };
        assert_eq!(report(&entry("hidden")), "0000:03:00.0: hidden");
        let reason = "0000:03:00.0 is a bridge: only the devices behind it can be given to a guest";
        assert_eq!(report(&entry(reason)), reason);
    }
}
