//! The configuration file, `/etc/pciback/pcibackd.toml`. Everything in it has a default; without the file all of them hold.
//!
//! ```toml
//! facade = "global"        # /sys/bus/pci/drivers/pciback for everybody; "private": for `pciback exec` only; "off"
//! hide = ["03:00.0"]       # hidden at start
//! quirks = "/etc/pciback/quirks"
//! metrics = "127.0.0.1:9465"
//! topology = "vpci"        # how guests see their devices; "passthrough": at their addresses on the host
//!
//! [defaults]               # for all devices
//! reset = "auto"
//!
//! [[device]]               # for those that these keys name; of several entries for a device the later one has the last word
//! id = "8086:10d3"
//! path = "0000:00:1c.0/00.0"
//! permissive = [{ range = "0xc8..0xca", reason = "its driver sets the payload size" }]
//!
//! [guest."database"]
//! topology = "passthrough"
//!
//! [commands]
//! kill = ["xl", "destroy", "{domain}"]
//! ```
//!
//! | module | holds |
//! |---|---|
//! | this one | the file as a whole |
//! | `settings` | what can be set for a device |
//! | `device` | which devices it is set for |
//! | `virtio` | a guest's virtio devices |
//! | `commands` | what is run to act on a guest |
//! | `live` | the configuration that holds now |
//! | `origin` | where a setting comes from |

mod commands;
mod device;
mod live;
mod origin;
mod settings;
mod virtio;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use conf_space::overlay::Quirk;
use conf_space::overlay::quirk::{self, DeviceQuirk, Quirks};
use conf_space::selector::DeviceNames;
use conf_space::topology::TopologyKind;
use serde::{Deserialize, Serialize};
use toml::Spanned;

pub use self::commands::Commands;
pub use self::device::{Defaults, DeviceEntry, Keys};
pub use self::live::Live;
pub use self::origin::{Origin, Setting};
pub use self::settings::{
    AerPolicy, AerSetting, DeviceSettings, HostChoice, InterruptControl, Intx, OnFailure,
    ResetChoice,
};

pub use self::virtio::{
    Card, CardLink, Console, Disk, HostPath, Interface, Mac, MmioSlot, MmioSlotError, Model,
    NamedPort, Place, PlaceError, PortName, Serial, Slot, SlotError, VirtioDevice, XlDisk,
};

use self::device::DeviceTable;
use crate::metrics::Loopback;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// On one virtual bus, 0000:00.
    #[default]
    Vpci,
    /// At their addresses on the host.
    Passthrough,
}

impl Topology {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Vpci, Self::Passthrough];

    /// Its name in the configuration file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vpci => "vpci",
            Self::Passthrough => "passthrough",
        }
    }
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
    /// Virtio devices that it gets, if it is an HVM guest.
    #[serde(default)]
    pub virtio: Vec<VirtioDevice>,
    /// What is set for virtio disks that it has from xl's configuration, by their names there (`xvde`).
    #[serde(default)]
    pub disk: BTreeMap<String, XlDisk>,
}

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Who sees the facade.
    pub facade: Facade,
    /// Lists of devices to hide at start, as `pciback hide` takes them.
    pub hide: Vec<String>,
    /// How guests see their devices.
    pub topology: Topology,
    /// Guests with settings of their own, by name.
    pub guest: BTreeMap<String, Guest>,
    /// What is run to act on a guest.
    pub commands: Commands,
    /// Where metrics are to be had besides the unix socket.
    pub metrics: Option<Loopback>,
    /// Devices with settings of their own, in the order of the file.
    pub devices: Vec<DeviceEntry>,
    /// What holds for all devices that nothing else is said of.
    pub defaults: Defaults,
    /// Quirks from the file of quirks.
    pub quirks: Vec<DeviceQuirk>,
    /// What is wrong with the file of quirks, line by line. It does not keep the daemon from starting.
    pub warnings: Vec<String>,
    /// The file that was asked for.
    pub asked_for: Option<PathBuf>,
}

/// The file as it is read.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tables {
    facade: Facade,
    hide: Vec<String>,
    topology: Topology,
    quirks: Option<PathBuf>,
    defaults: Defaults,
    device: Vec<Spanned<DeviceTable>>,
    guest: BTreeMap<String, Guest>,
    commands: Commands,
    metrics: Option<Loopback>,
}

impl Config {
    /// Reads a file. A missing file is the defaults, unless it was asked for by name.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(asked_for: Option<&Path>) -> Result<Self, ConfigError> {
        let path = asked_for.unwrap_or(Path::new(DEFAULT_PATH));
        match fs::read_to_string(path) {
            Ok(text) => Ok(Self {
                asked_for: asked_for.map(Path::to_owned),
                ..Self::parse(&text, path)?
            }),
            Err(error) if asked_for.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Reads the same file again.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load_again(&self) -> Result<Self, ConfigError> {
        Self::load(self.asked_for.as_deref())
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let tables: Tables = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let mut config = Self {
            facade: tables.facade,
            hide: tables.hide,
            topology: tables.topology,
            guest: tables.guest,
            commands: tables.commands,
            metrics: tables.metrics,
            devices: DeviceEntry::all(tables.device, text),
            defaults: tables.defaults,
            ..Self::default()
        };
        if let Some(path) = tables.quirks {
            config.add_quirks(&path)?;
        }
        Ok(config)
    }

    /// One bad line is told of, and the others are used.
    fn add_quirks(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        for (line, entry) in quirk::parse_file(&text) {
            match entry {
                Ok(quirk) => self.quirks.push(quirk),
                Err(error) => self
                    .warnings
                    .push(format!("{}, line {line}: {error}", path.display())),
            }
        }
        Ok(())
    }

    /// How a guest sees its devices.
    pub fn topology_of(&self, guest: &str) -> TopologyKind {
        self.guest
            .get(guest)
            .and_then(|guest| guest.topology)
            .unwrap_or(self.topology)
            .into()
    }

    /// What holds for a device: `[defaults]`, then each `[[device]]` that it matches in the order of the file, setting by setting, and the
    /// lines of the file of quirks that name it.
    pub fn settings_for(&self, device: &DeviceNames) -> DeviceSettings {
        let mut settings = DeviceSettings::default();
        self.defaults.0.apply_to(&mut settings);
        for entry in &self.devices {
            if entry.keys.match_all(device) {
                entry.settings.apply_to(&mut settings);
            }
        }
        self.lay_quirks(device, &mut settings.quirks, |_| ());
        settings
    }

    /// The lines of the file of quirks that have no effect, since the device has too many quirks.
    pub fn left_out_for(&self, device: &DeviceNames) -> Vec<Quirk> {
        let mut quirks = self.settings_for(device).quirks;
        let mut left_out = Vec::new();
        self.lay_quirks(device, &mut quirks, |quirk| left_out.push(quirk));
        left_out
    }

    /// Silent, as it is done again and again, also when any user of dom0 reads a file of the facade.
    fn lay_quirks(
        &self,
        device: &DeviceNames,
        quirks: &mut Quirks,
        mut left_out: impl FnMut(Quirk),
    ) {
        let entries = self.quirks.iter();
        for entry in entries.filter(|entry| entry.device == device.bdf) {
            if quirks.insert(entry.quirk).is_err() {
                left_out(entry.quirk);
            }
        }
    }
}

/// From the text of a file.
impl FromStr for Config {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, Path::new(DEFAULT_PATH))
    }
}

#[cfg(test)]
mod tests;
