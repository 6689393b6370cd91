//! `pciback persist`, and what `hide --persist` and `unhide --persist` do with the configuration.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use conf_space::selector::Selector;
use pcibackd::config::DEFAULT_PATH;
use pcibackd::host::Bus;
use pcibackd::host::sysfs::Sysfs;
use pcibackd::text::chain;
use serde::Serialize;

use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::persist::config_file::{ConfigFile, overlap};
use crate::persist::{self, Hidden, PersistError, initramfs};

const HELP: &str = "\
`pciback hide --persist` and `unhide --persist` do this themselves. It is for a 'hide' list that was edited by hand.
Written are the udev rule /etc/udev/rules.d/10-pciback.rules, and by update-initramfs or dracut the initramfs, in
which the devices are reserved before any driver is loaded.

Examples:
  pciback persist
  pciback persist --list
  pciback persist --json | jq .refused";

/// What `pciback persist` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Persist {
    /// What concerns the next boot
    #[command(flatten)]
    pub boot: BootOptions,
    /// Change nothing; print the list for the initramfs: where each device is in /sys/devices
    #[arg(long)]
    pub list: bool,
    /// For programs: JSON
    #[arg(long)]
    pub json: bool,
}

/// What `pciback persist --json` prints.
#[derive(Debug, Serialize)]
struct Persisted {
    /// Where each device is in /sys/devices, as a pattern, and its identification registers if these are asked for.
    list: Vec<String>,
    /// Entries of `hide` that mean nothing.
    refused: Vec<Refused>,
    initramfs: Initramfs,
}

#[derive(Debug, Serialize)]
struct Refused {
    /// As written.
    entry: String,
    /// What is wrong with it.
    problem: String,
}

/// What became of the initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Initramfs {
    Made,
    /// As it was, as wished.
    Left,
    Failed,
}

/// What concerns the next boot, for all commands that change it.
#[derive(Debug, Args)]
pub struct BootOptions {
    /// The system below this directory instead of the one that runs, such as an image that is being made; its initramfs is left as it is
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Leave the initramfs as it is: it is made anew later, by `pciback persist` or with the next kernel
    #[arg(long)]
    pub no_initramfs: bool,
}

impl BootOptions {
    /// For commands that change the next boot only with `--persist`: without it these options mean nothing.
    pub fn with_persist() -> ArgGroup {
        ArgGroup::new("later")
            .arg("no_initramfs")
            .requires("persist")
    }

    /// For commands that act on the system that runs, too, which is not the one below `--root`.
    pub fn another_system() -> ArgGroup {
        ArgGroup::new("elsewhere").arg("root").requires("next_boot")
    }

    /// A file of the system that is meant.
    fn path(&self, path: &str) -> PathBuf {
        let root = self.root.as_deref().unwrap_or(Path::new("/"));
        root.join(path.trim_start_matches('/'))
    }
}

/// Brings what hides devices at boot up to the configuration, or lists it.
pub fn run(arguments: &Persist) -> Result<Outcome, CommandError> {
    let hidden = Hidden::read(&arguments.boot.path(DEFAULT_PATH))?;
    complain_of_refused(&hidden);
    let initramfs = if arguments.list {
        Initramfs::Left
    } else {
        renew(&arguments.boot, &hidden)?
    };
    if arguments.json {
        let refused = hidden.refused.iter().map(|error| Refused {
            entry: error.entry.clone(),
            problem: error.problem.to_string(),
        });
        output::print_json(&Persisted {
            list: hidden.list().lines().map(str::to_owned).collect(),
            refused: refused.collect(),
            initramfs,
        })?;
    } else if arguments.list {
        output::print(&hidden.list())?;
    }
    Ok(outcome(&hidden, initramfs))
}

/// Adds entries to the configuration, or takes them out, and brings the rest up to it.
pub fn change(
    boot: &BootOptions,
    entries: &[Selector],
    hide: bool,
) -> Result<Outcome, PersistError> {
    let mut file = ConfigFile::open(&boot.path(DEFAULT_PATH))?;
    let path = file.path().display().to_string();
    // All of them first: what keeps one hidden may be what another takes out.
    let changed = entries
        .iter()
        .map(|entry| {
            if hide {
                file.add(entry)
            } else {
                file.remove(entry)
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    let list = file.entries()?;
    let bus = (boot.root.is_none()).then(|| Sysfs::to_look_at("/sys"));
    let mut outcome = Outcome::Done;
    for (entry, &changed) in entries.iter().zip(&changed) {
        let bus = bus.as_ref().map(|bus| bus as &dyn Bus);
        if !hide && let Some(other) = still_meant(bus, &list, entry) {
            outcome = Outcome::Failed;
            output::complain(&format!(
                "{entry} stays hidden at boot by the entry {other} of {path}: take that one out, or edit it"
            ));
            continue;
        }
        output::tell(&match (hide, changed) {
            (true, true) => format!("{entry}: hidden at every boot ({path})"),
            (true, false) => format!("{entry}: is hidden at every boot already"),
            (false, true) => format!("{entry}: no longer hidden at boot ({path})"),
            (false, false) => format!("{entry}: was not hidden at boot by {path}"),
        });
    }
    if !changed.contains(&true) {
        return Ok(outcome);
    }
    file.save()?;
    let hidden = Hidden::read(&boot.path(DEFAULT_PATH))?;
    complain_of_refused(&hidden);
    let initramfs = renew(boot, &hidden)?;
    Ok(outcome.and(self::outcome(&hidden, initramfs)))
}

/// What of the list means the device of this entry, too: a range that it is in, or, which takes a look at the device on the `bus`, its slot or
/// its kind.
fn still_meant(bus: Option<&dyn Bus>, list: &[Selector], entry: &Selector) -> Option<String> {
    let device = entry
        .exact()
        .zip(bus)
        .and_then(|(bdf, bus)| bus.describe(bdf).ok())
        .map(|description| description.names());
    let means_it = |other: &&Selector| {
        overlap(other, entry) || device.as_ref().is_some_and(|device| other.matches(device))
    };
    Some(list.iter().find(means_it)?.to_string())
}

fn renew(boot: &BootOptions, hidden: &Hidden) -> Result<Initramfs, PersistError> {
    hidden.write_rules(&boot.path(persist::RULES))?;
    if boot.no_initramfs || boot.root.is_some() {
        output::tell("the initramfs is left as it is");
        return Ok(Initramfs::Left);
    }
    Ok(match initramfs::make() {
        Ok(()) => Initramfs::Made,
        // The rest is done.
        Err(error) => {
            output::complain(&chain(&error));
            Initramfs::Failed
        }
    })
}

fn complain_of_refused(hidden: &Hidden) {
    for error in &hidden.refused {
        output::complain(&format!("configuration, hide: {error}"));
    }
}

fn outcome(hidden: &Hidden, initramfs: Initramfs) -> Outcome {
    if hidden.refused.is_empty() && initramfs != Initramfs::Failed {
        Outcome::Done
    } else {
        Outcome::Failed
    }
}

#[cfg(test)]
mod tests {
    use pcibackd::host::sim::SimBus;
    use xenbus::sim::Machine;

    use super::*;

    fn selectors(list: &[&str]) -> Vec<Selector> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_device_that_is_hidden_by_its_kind_stays_so_when_its_address_is_taken_out() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::new(directory.path()).unwrap();
        let bus = SimBus::with_example_devices(&machine);
        let still = |list: &[&str], entry: &str| {
            still_meant(Some(&*bus), &selectors(list), &entry.parse().unwrap())
        };
        let list = ["8086:ffff", "1b36:0010", "03:00.0"];
        assert_eq!(still(&list, "02:00.0").as_deref(), Some("1b36:0010"));
        assert_eq!(still(&list[..1], "02:00.0"), None);
        assert_eq!(still(&list[..1], "1b36:0010"), None);
    }

    #[test]
    fn a_device_that_is_hidden_by_a_range_stays_so_when_its_address_is_taken_out() {
        let still = |entry: &str| {
            let list = selectors(&["04:00.*"]);
            still_meant(None, &list, &entry.parse().unwrap())
        };
        assert_eq!(still("04:00.1").as_deref(), Some("0000:04:00.*"));
        assert_eq!(still("06:00.0"), None);
    }

    #[test]
    fn entries_that_mean_the_same_device_are_taken_out_together() {
        let image = tempfile::tempdir().unwrap();
        let file = image.path().join(DEFAULT_PATH.trim_start_matches('/'));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "hide = [\"04:00.1\", \"04:00.*\", \"06:00.0\"]\n").unwrap();
        let boot = BootOptions {
            root: Some(image.path().to_owned()),
            no_initramfs: true,
        };
        let entries = selectors(&["04:00.1", "04:00.*"]);
        assert_eq!(change(&boot, &entries, false).unwrap(), Outcome::Done);
        let left = std::fs::read_to_string(&file).unwrap();
        assert_eq!(left, "hide = [ \"06:00.0\"]\n");
    }
}
