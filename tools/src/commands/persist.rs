//! `pciback persist`, and what `hide --persist` and `unhide --persist` do with the configuration.

use std::path::{Path, PathBuf};

use clap::Args;
use conf_space::selector::Selector;
use pcibackd::config::DEFAULT_PATH;
use pcibackd::text::chain;

use crate::outcome::{CommandError, Outcome};
use crate::output;
use crate::persist::config_file::{Change, ConfigFile};
use crate::persist::{self, Hidden, PersistError, initramfs};

const HELP: &str = "\
`pciback hide --persist` and `unhide --persist` do this themselves. It is for a 'hide' list that was edited by hand.
Written are the udev rule /etc/udev/rules.d/10-pciback.rules, and by update-initramfs or dracut the initramfs, in
which the devices are reserved before any driver is loaded.

Examples:
  pciback persist
  pciback persist --list";

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
    /// A file of the system that is meant.
    fn path(&self, path: &str) -> PathBuf {
        let root = self.root.as_deref().unwrap_or(Path::new("/"));
        root.join(path.trim_start_matches('/'))
    }
}

/// Brings what hides devices at boot up to the configuration, or lists it.
pub fn run(arguments: &Persist) -> Result<Outcome, CommandError> {
    if !arguments.list {
        return Ok(renew(&arguments.boot)?);
    }
    let hidden = Hidden::read(&arguments.boot.path(DEFAULT_PATH))?;
    output::print(&hidden.list())?;
    Ok(complain_of_refused(&hidden))
}

/// Adds entries to the configuration, or takes them out, and brings the rest up to it.
pub fn change(
    boot: &BootOptions,
    entries: &[Selector],
    hide: bool,
) -> Result<Outcome, PersistError> {
    let mut file = ConfigFile::open(&boot.path(DEFAULT_PATH))?;
    let path = file.path().display().to_string();
    let (mut changed, mut outcome) = (false, Outcome::Done);
    for entry in entries {
        let change = if hide {
            file.add(entry)?
        } else {
            file.remove(entry)?
        };
        changed |= change == Change::Made;
        match change {
            Change::Made if hide => {
                output::tell(&format!("{entry}: hidden at every boot ({path})"))
            }
            Change::Made => output::tell(&format!("{entry}: no longer hidden at boot ({path})")),
            Change::None if hide => {
                output::tell(&format!("{entry}: is hidden at every boot already"));
            }
            Change::None => output::tell(&format!("{entry}: was not hidden at boot by {path}")),
            Change::Within(other) => {
                outcome = Outcome::Failed;
                output::complain(&format!(
                    "{entry} stays hidden at boot by the entry {other} of {path}: take that one out, or edit it"
                ));
            }
        }
    }
    if !changed {
        return Ok(outcome);
    }
    file.save()?;
    Ok(match renew(boot)? {
        Outcome::Done => outcome,
        failed => failed,
    })
}

fn renew(boot: &BootOptions) -> Result<Outcome, PersistError> {
    let hidden = Hidden::read(&boot.path(DEFAULT_PATH))?;
    let outcome = complain_of_refused(&hidden);
    hidden.write_rules(&boot.path(persist::RULES))?;
    if boot.no_initramfs || boot.root.is_some() {
        output::tell("the initramfs is left as it is");
        return Ok(outcome);
    }
    match initramfs::make() {
        Ok(()) => Ok(outcome),
        // The rest is done.
        Err(error) => {
            output::complain(&chain(&error));
            Ok(Outcome::Failed)
        }
    }
}

fn complain_of_refused(hidden: &Hidden) -> Outcome {
    for error in &hidden.refused {
        output::complain(&format!("configuration, hide: {error}"));
    }
    if hidden.refused.is_empty() {
        Outcome::Done
    } else {
        Outcome::Failed
    }
}
