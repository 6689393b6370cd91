//! Hiding devices at every boot, before drivers are loaded.
//!
//! The configuration's `hide` says which. Two things are made from it: a udev rule, for devices that come while the system runs, and the list that the
//! initramfs holds (`packaging/reserve` reads it), for those that are there from the start: udev loads drivers in parallel, so its rules alone would
//! come too late for a device whose driver another device needs, too.
//!
//! | module | holds |
//! |---|---|
//! | [`config_file`] | the configuration file, edited with its comments kept |
//! | [`boot_match`] | what tells a device at boot: patterns for the shell and for udev |
//! | [`initramfs`] | making the initramfs anew |

pub mod boot_match;
pub mod config_file;
pub mod initramfs;

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use conf_space::bdf_list::EntryError;
use conf_space::selector;
use pcibackd::config::{Config, ConfigError};

use boot_match::BootMatch;
pub use initramfs::InitramfsError;

/// The rule's file. Before the rules that come with udev, which load drivers (80-drivers.rules).
pub const RULES: &str = "/etc/udev/rules.d/10-pciback.rules";

/// What keeps devices from being hidden at boot.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration cannot be edited.
    #[error("cannot edit {}: {problem}", path.display())]
    Edit {
        /// The file.
        path: PathBuf,
        /// What stands against it.
        problem: String,
    },
    /// A file cannot be written.
    #[error("cannot write {}; this takes root, and a file system that is not read-only", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The initramfs is still the old one.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
}

/// What the configuration hides.
#[derive(Debug, Default)]
pub struct Hidden {
    /// How to tell the devices at boot.
    pub matches: Vec<BootMatch>,
    /// Entries that mean nothing. They void none of the others.
    pub refused: Vec<EntryError>,
}

impl Hidden {
    /// From the configuration at this path. One that is missing hides nothing.
    ///
    /// # Errors
    /// [`PersistError::Config`].
    pub fn read(config: &Path) -> Result<Self, PersistError> {
        let mut hidden = Self::default();
        if !config.exists() {
            return Ok(hidden);
        }
        for entry in Config::load(Some(config))?
            .hide
            .iter()
            .flat_map(|list| selector::parse(list))
        {
            match entry {
                Ok(selector) => hidden.matches.extend(BootMatch::of(&selector)),
                Err(error) => hidden.refused.push(error),
            }
        }
        Ok(hidden)
    }

    /// The list for the initramfs.
    pub fn list(&self) -> String {
        lines(self.matches.iter().map(ToString::to_string))
    }

    /// The udev rules.
    pub fn rules(&self) -> String {
        const HEAD: &str = "\
# Made by `pciback persist` from the hide list of pcibackd's configuration; what is changed here is lost.
ACTION!=\"add\", GOTO=\"pciback_end\"
SUBSYSTEM!=\"pci\", GOTO=\"pciback_end\"
# Bridges are dom0's; those of the class \"other\" are none.
ATTR{class}==\"0x06*\", ATTR{class}!=\"0x0680*\", GOTO=\"pciback_end\"
";
        let rules = lines(self.matches.iter().map(BootMatch::udev_rule));
        format!("{HEAD}{rules}LABEL=\"pciback_end\"\n")
    }

    /// Writes the udev rules, or takes them away if nothing is hidden.
    ///
    /// # Errors
    /// [`PersistError::Write`].
    pub fn write_rules(&self, path: &Path) -> Result<(), PersistError> {
        let written = if self.matches.is_empty() {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        } else {
            replace(path, &self.rules())
        };
        written.map_err(|source| PersistError::Write {
            path: path.to_owned(),
            source,
        })
    }
}

fn lines(each: impl Iterator<Item = String>) -> String {
    each.fold(String::new(), |mut text, line| {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{line}");
        text
    })
}

/// Puts a file in the place of another: whoever reads it, even after a power cut, finds the old or the new text and nothing else.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut file = tempfile::Builder::new()
        .prefix(".pciback-")
        .tempfile_in(directory)?;
    let mode = match fs::metadata(path) {
        Ok(metadata) => metadata.permissions(),
        Err(_) => std::os::unix::fs::PermissionsExt::from_mode(0o644),
    };
    file.as_file().set_permissions(mode)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(text: &str) -> Hidden {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, text).unwrap();
        Hidden::read(file.path()).unwrap()
    }

    #[test]
    fn a_typo_in_the_hide_list_voids_no_other_entry() {
        let hidden = hidden("hide = [\"03:00.0, 03:00\", \"04:00.*\"]");
        assert_eq!(hidden.list(), "*/0000:03:00.0\n*/0000:04:00.?\n");
        assert_eq!(hidden.refused.len(), 1);
    }

    #[test]
    fn the_rules_apply_to_pci_devices_that_come() {
        assert_eq!(
            hidden("hide = [\"03:00.0\"]").rules(),
            "# Made by `pciback persist` from the hide list of pcibackd's configuration; what is changed here is lost.\n\
             ACTION!=\"add\", GOTO=\"pciback_end\"\n\
             SUBSYSTEM!=\"pci\", GOTO=\"pciback_end\"\n\
             # Bridges are dom0's; those of the class \"other\" are none.\n\
             ATTR{class}==\"0x06*\", ATTR{class}!=\"0x0680*\", GOTO=\"pciback_end\"\n\
             DEVPATH==\"*/0000:03:00.0\", ATTR{driver_override}=\"pciback\"\n\
             LABEL=\"pciback_end\"\n"
        );
    }

    #[test]
    fn nothing_hidden_means_no_rules_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rules.d/10-pciback.rules");
        hidden("hide = [\"03:00.0\"]").write_rules(&path).unwrap();
        assert!(path.exists());
        hidden("").write_rules(&path).unwrap();
        hidden("").write_rules(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_keeps_its_mode_when_it_is_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
