//! The configuration file, `/etc/pciback/pcibackd.toml`. Everything in it has a default; without the file all of them hold.
//!
//! ```toml
//! facade = "global"        # /sys/bus/pci/drivers/pciback for everybody; "private": for `pciback exec` only; "off"
//! hide = ["03:00.0"]       # hidden at start
//! topology = "vpci"        # how guests see their devices; "passthrough": at their addresses on the host
//!
//! [guest."database"]
//! topology = "passthrough"
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use conf_space::topology::TopologyKind;
use serde::Deserialize;

/// Where the file is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/pciback/pcibackd.toml";

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says something that is not understood.
    #[error("{path} is not a valid configuration; pcibackd does not start with half of it")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// Who sees `/sys/bus/pci/drivers/pciback`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Facade {
    /// Everybody in dom0: any toolstack works as it is.
    #[default]
    Global,
    /// Only commands that `pciback exec` runs.
    Private,
    /// Nobody.
    Off,
}

/// How a guest sees its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// On one virtual bus, 0000:00.
    #[default]
    Vpci,
    /// At their addresses on the host.
    Passthrough,
}

impl From<Topology> for TopologyKind {
    fn from(topology: Topology) -> Self {
        match topology {
            Topology::Vpci => Self::Vpci,
            Topology::Passthrough => Self::Passthrough,
        }
    }
}

/// What is set for one guest, by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Overrides the general one.
    pub topology: Option<Topology>,
}

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who sees the facade.
    pub facade: Facade,
    /// Lists of devices to hide at start, as `pciback hide` takes them.
    pub hide: Vec<String>,
    /// How guests see their devices.
    pub topology: Topology,
    /// Guests with settings of their own, by name.
    pub guest: BTreeMap<String, Guest>,
}

impl Config {
    /// Reads a file. A missing file is the defaults, unless it was asked for by name.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(asked_for: Option<&Path>) -> Result<Self, ConfigError> {
        let path = asked_for.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if asked_for.is_none() && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// How a guest sees its devices.
    pub fn topology_of(&self, guest: &str) -> TopologyKind {
        self.guest
            .get(guest)
            .and_then(|guest| guest.topology)
            .unwrap_or(self.topology)
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pcibackd.toml");
        fs::write(&path, text).unwrap();
        Config::load(Some(&path))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_guest_may_have_a_topology_of_its_own() {
        let config =
            parse("topology = \"vpci\"\n[guest.\"database\"]\ntopology = \"passthrough\"\n")
                .unwrap();
        assert_eq!(config.topology_of("database"), TopologyKind::Passthrough);
        assert_eq!(config.topology_of("web"), TopologyKind::Vpci);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_place() {
        for (text, named) in [
            ("facde = \"off\"", "facde"),
            ("facade = \"of\"", "facade"),
            ("[guest.a]\ntopolgy = \"vpci\"", "topolgy"),
        ] {
            let error = crate::text::chain(&parse(text).unwrap_err());
            assert!(error.contains(named) && error.contains("line"), "{error}");
        }
    }

    #[test]
    fn a_file_asked_for_by_name_must_be_there() {
        assert!(matches!(
            Config::load(Some(Path::new("/nonexistent/pcibackd.toml"))),
            Err(ConfigError::Read { .. })
        ));
    }
}
