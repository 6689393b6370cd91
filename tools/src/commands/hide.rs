//! `pciback hide` and `pciback unhide`.

use std::path::Path;

use clap::Args;
use conf_space::selector::Selector;
use pcibackd::control::protocol::{Entry, Request, Response};

use super::persist::{self, BootOptions};
use crate::arguments::DEVICE_LISTS;
use crate::daemon;
use crate::devices::DeviceLists;
use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::progress::Progress;

const EXAMPLES: &str = "\
Examples:
  pciback hide 03:00.0
  pciback hide 0000:03:10.0 0000:03:10.2
  pciback hide '04:00.*'
  pciback hide --group 01:00.0
  pciback hide --persist 03:00.0";

const UNHIDE: &str = "\
Examples:
  pciback unhide 03:00.0
  pciback unhide '04:00.*' 05:00.1";

/// What `pciback hide` takes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{DEVICE_LISTS}\n\n{EXAMPLES}"))]
#[command(group = BootOptions::with_persist(), group = BootOptions::another_system())]
pub struct Hide {
    /// Also what dom0 lives on (its root disk's controller, its only network card), and devices whose virtual functions guests have
    #[arg(long)]
    pub force: bool,
    /// With all devices of its IOMMU group, bridges excepted, or not at all: where devices are reached through VFIO, a guest gets a group as a whole
    #[arg(long, conflicts_with_all = ["persist", "next_boot"])]
    pub group: bool,
    /// At every boot as well, before drivers are loaded: in the configuration, by a udev rule and in the initramfs
    #[arg(long)]
    pub persist: bool,
    /// Not now, but at every boot from the next on
    #[arg(long, requires = "persist", conflicts_with = "force")]
    pub next_boot: bool,
    /// What concerns the next boot
    #[command(flatten)]
    pub boot: BootOptions,
    /// For programs: a JSON object per line, for each device
    #[arg(long)]
    pub json: bool,
    /// Devices, or lists of devices
    #[arg(required = true, value_name = "BDF")]
    pub devices: Vec<String>,
}

/// What `pciback unhide` takes.
#[derive(Debug, Args)]
#[command(after_help = UNHIDE, after_long_help = format!("{DEVICE_LISTS}\n\n{UNHIDE}"))]
#[command(group = BootOptions::with_persist(), group = BootOptions::another_system())]
pub struct Unhide {
    /// Also devices whose virtual functions guests have: the guests lose them
    #[arg(long)]
    pub force: bool,
    /// With all that is hidden of its IOMMU group
    #[arg(long, conflicts_with_all = ["persist", "next_boot", "force"])]
    pub group: bool,
    /// At no later boot either: out of the configuration, the udev rule and the initramfs
    #[arg(long)]
    pub persist: bool,
    /// Not now, but from the next boot on
    #[arg(long, requires = "persist")]
    pub next_boot: bool,
    /// What concerns the next boot
    #[command(flatten)]
    pub boot: BootOptions,
    /// For programs: a JSON object per line, for each device
    #[arg(long)]
    pub json: bool,
    /// Devices, or lists of devices
    #[arg(required = true, value_name = "BDF")]
    pub devices: Vec<String>,
}

/// Hides devices.
pub fn hide(run_dir: &Path, arguments: &Hide) -> Result<Outcome, CommandError> {
    let (force, group) = (arguments.force, arguments.group);
    let request = |devices| match group {
        true => Request::HideGroup { devices, force },
        false => Request::Hide { devices, force },
    };
    let tell = Tell {
        command: "hide",
        json: arguments.json,
    };
    let lists = tell.check(&arguments.devices)?;
    let Some(entries) = lists.entries() else {
        return Ok(Outcome::Usage);
    };
    let mut done = entries.to_vec();
    if !arguments.next_boot {
        // What cannot be hidden now cannot be at boot.
        done = tell.for_each(run_dir, entries, request)?;
    }
    let outcome = lists.outcome(done.len());
    if !arguments.persist || done.is_empty() {
        return Ok(outcome);
    }
    Ok(outcome.and(persist::change(&arguments.boot, &done, true)?))
}

/// Gives devices back.
pub fn unhide(run_dir: &Path, arguments: &Unhide) -> Result<Outcome, CommandError> {
    let (force, group) = (arguments.force, arguments.group);
    let request = |devices| match group {
        true => Request::UnhideGroup { devices },
        false => Request::Unhide { devices, force },
    };
    let tell = Tell {
        command: "unhide",
        json: arguments.json,
    };
    let lists = tell.check(&arguments.devices)?;
    let Some(entries) = lists.entries() else {
        return Ok(Outcome::Usage);
    };
    let mut done = entries.len();
    if !arguments.next_boot {
        done = tell.for_each(run_dir, entries, request)?.len();
    }
    let outcome = lists.outcome(done);
    if !arguments.persist {
        return Ok(outcome);
    }
    // A guest may have it now; at the next boot nobody has.
    Ok(outcome.and(persist::change(&arguments.boot, entries, false)?))
}

/// How a command tells what became of each entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tell<'a> {
    /// What the command is called.
    pub command: &'a str,
    /// Whether a program listens.
    pub json: bool,
}

impl Tell<'_> {
    /// Has something done with every device that the lists name, and reports on each.
    pub fn carry_out(
        self,
        run_dir: &Path,
        lists: &[String],
        request: impl Fn(Vec<String>) -> Request,
    ) -> Result<Outcome, CommandError> {
        let lists = self.check(lists)?;
        let Some(entries) = lists.entries() else {
            return Ok(Outcome::Usage);
        };
        let done = self.for_each(run_dir, entries, request)?;
        Ok(lists.outcome(done.len()))
    }

    /// Checks what was typed, and says what is wrong with it.
    fn check(self, lists: &[String]) -> Result<DeviceLists, CommandError> {
        let lists = DeviceLists::parse(lists);
        for error in &lists.refused {
            if self.json {
                output::print_json_line(&Entry {
                    entry: error.entry.clone(),
                    ok: false,
                    message: error.problem.to_string(),
                })?;
            } else {
                output::complain(&format!("{}: {error}", self.command));
            }
        }
        if lists.entries().is_none() {
            output::complain(&format!(
                "{}: no device is named, so nothing is done",
                self.command
            ));
        }
        Ok(lists)
    }

    /// Has the daemon carry out each entry, and says what became of its devices. Returns the entries of which nothing failed.
    fn for_each(
        self,
        run_dir: &Path,
        entries: &[Selector],
        request: impl Fn(Vec<String>) -> Request,
    ) -> Result<Vec<Selector>, CommandError> {
        let mut done = Vec::new();
        for entry in entries {
            let request = request(vec![entry.to_string()]);
            let progress = Progress::start(run_dir);
            let results = daemon::ask(run_dir, &request, |response| match response {
                Response::Entries { entries } => Some(entries),
                _ => None,
            })?;
            drop(progress);
            if self.report_all(&results)? == Outcome::Done {
                done.push(entry.clone());
            }
        }
        Ok(done)
    }

    /// Says what became of each entry.
    pub fn report_all(self, entries: &[Entry]) -> Result<Outcome, CommandError> {
        for entry in entries {
            self.result(entry)?;
        }
        Ok(if entries.iter().all(|entry| entry.ok) {
            Outcome::Done
        } else {
            Outcome::Failed
        })
    }

    fn result(self, result: &Entry) -> Result<(), CommandError> {
        if self.json {
            return output::print_json_line(result);
        }
        let line = report(result);
        if result.ok {
            output::print(&format!("{}\n", pcibackd::text::printable(&line)))?;
        } else {
            output::complain(&format!("{}: {line}", self.command));
        }
        Ok(())
    }
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
