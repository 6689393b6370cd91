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
//! | `commands` | what is run to act on a guest |
//! | `live` | the configuration that holds now |
//! | `origin` | where a setting comes from |

mod commands;
mod device;
mod live;
mod origin;
mod settings;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use conf_space::overlay::quirk::{self, DeviceQuirk};
use conf_space::selector::DeviceNames;
use conf_space::topology::TopologyKind;
use serde::Deserialize;
use toml::Spanned;

pub use self::commands::Commands;
pub use self::device::{Defaults, DeviceEntry, Keys};
pub use self::live::Live;
pub use self::origin::{Origin, Setting};
pub use self::settings::{AerPolicy, DeviceSettings, InterruptControl, OnFailure, ResetChoice};

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
        for entry in self
            .quirks
            .iter()
            .filter(|entry| entry.device == device.bdf)
        {
            if let Err(error) = settings.quirks.insert(entry.quirk) {
                log::error!("{}: {} is left out: {error}", device.bdf, entry.quirk);
            }
        }
        settings
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
mod tests {
    use std::time::Duration;

    use conf_space::overlay::Permissive;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pcibackd.toml");
        fs::write(&path, text).unwrap();
        Config::load(Some(&path))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!("".parse::<Config>().unwrap(), Config::default());
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
            ("[defaults]\npermisive = true", "permisive"),
            ("[defaults]\nid = \"8086:10d3\"", "id"),
            ("[defaults]\nreset = \"hard\"", "hard"),
            ("[defaults]\naer = { timeout = 0 }", "nonzero"),
            ("[commands]\nkill = []", "program"),
            ("[commands]\nkil = [\"xl\"]", "kil"),
            ("[[device]]\nreset = \"none\"", "bdf, id or path"),
            ("[[device]]\nbdf = \"03:00\"", "03:00"),
            ("[[device]]\nid = \"8086\"", "vendor:device"),
            ("[[device]]\npath = \"00:1c.0/\"", "device.function"),
            ("[[device]]\nid = \"8086:10d3\"\nquirk = []", "quirk"),
            (
                "[[device]]\nid = \"8086:10d3\"\nquirks = [\"c8:3:ff\"]",
                "1, 2 or 4",
            ),
            ("[defaults]\npermissive = \"yes\"", "true, false, or a list"),
            ("[defaults]\npermissive = [\"0x48..0x40\"]", "0x1000"),
            (
                "[defaults]\npermissive = [{ rnge = \"0x48..0x40\" }]",
                "rnge",
            ),
            (
                "[defaults]\npermissive = [{ range = \"0x48\" }]",
                "two offsets",
            ),
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

    fn nic() -> DeviceNames {
        DeviceNames {
            bdf: "0000:03:00.0".parse().unwrap(),
            vendor: 0x8086,
            device: 0x10d3,
            subsystem: (0x8086, 0xa01f),
            path: "0000:00:1c.0/00.0".parse().ok(),
        }
    }

    fn permissive(text: &str) -> Permissive {
        parse(text).unwrap().settings_for(&nic()).permissive
    }

    #[test]
    fn what_is_not_said_of_a_device_comes_from_the_defaults_setting_by_setting() {
        let settings = parse(
            "[defaults]\nreset = \"pm\"\naer = { on_failure = \"kill\" }\n\
             [[device]]\nid = \"8086:10d3\"\naer = { timeout = 3 }\nallow_interrupt_control = true\n\
             allow_shared_interrupt = true\nallow_shared_pages = true\n\
             [[device]]\nid = \"8086:ffff\"\nreset = \"none\"\n",
        )
        .unwrap()
        .settings_for(&nic());
        let expected = DeviceSettings {
            reset: ResetChoice::Pm,
            allow_interrupt_control: InterruptControl::Yes,
            allow_shared_interrupt: true,
            allow_shared_pages: true,
            aer: AerPolicy {
                mmio_enabled: false,
                on_failure: OnFailure::Kill,
                timeout: Duration::from_secs(3),
            },
            ..DeviceSettings::default()
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn of_several_entries_for_a_device_the_later_one_has_the_last_word() {
        let text = "[[device]]\nbdf = \"03:00.0\"\npermissive = true\n\
                    [[device]]\npath = \"00:1c.0/00.0\"\npermissive = false\n";
        assert_eq!(permissive(text), Permissive::No);
    }

    #[test]
    fn an_entry_with_several_keys_is_for_the_device_that_all_of_them_name() {
        for (keys, all) in [
            ("bdf = \"03:00.0\"\nid = \"8086:10d3\"", true),
            (
                "bdf = \"03:00.0\"\nid = \"8086:10d3:8086:a01f\"\npath = \"00:1c.0/00.0\"",
                true,
            ),
            // Another card has come to the address, or into the slot.
            ("bdf = \"03:00.0\"\nid = \"8086:1533\"", false),
            (
                "path = \"00:1c.0/00.0\"\nid = \"8086:10d3:8086:0000\"",
                false,
            ),
            // The card has gone to another address.
            ("bdf = \"04:00.0\"\nid = \"8086:10d3\"", false),
        ] {
            let text = format!("[[device]]\n{keys}\npermissive = true\n");
            let config = parse(&text).unwrap();
            assert_eq!(
                config.settings_for(&nic()).permissive == Permissive::Yes,
                all,
                "{keys}"
            );
            let here = !keys.contains("04:00.0");
            assert_eq!(
                config.devices[0].keys.disagree_on(&nic()),
                !all && here,
                "{keys}"
            );
        }
    }

    #[test]
    fn ranges_come_with_or_without_a_reason_and_join() {
        let ranges = permissive(
            "[[device]]\nid = \"8086:10d3\"\npermissive = [\n  { range = \"0x40..0x44\", reason = \"payload size\" },\n  \"0x44..0x48\",\n]\n",
        );
        let Permissive::Ranges(ranges) = ranges else {
            panic!("{ranges:?}")
        };
        let shown: Vec<String> = ranges.iter().map(|range| range.to_string()).collect();
        assert_eq!(shown, ["0x40..0x48"]);
        assert_eq!(permissive("[defaults]\npermissive = []\n"), Permissive::No);
    }

    #[test]
    fn an_entry_knows_its_line() {
        let config = parse("\n[[device]]\nid = \"8086:10d3\"\n\n# another\n[[device]]\nbdf = \"03:00.0\"\npath = \"00:1c.0/0.0\"\n").unwrap();
        let found: Vec<(usize, String)> = config
            .devices
            .iter()
            .map(|entry| (entry.line, entry.keys.to_string()))
            .collect();
        let expected = [
            (2, "id = \"8086:10d3\""),
            (6, "bdf = \"0000:03:00.0\", path = \"0000:00:1c.0/00.0\""),
        ]
        .map(|(line, keys)| (line, keys.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_bad_line_in_the_file_of_quirks_is_told_of_and_the_others_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quirks");
        fs::write(
            &path,
            "03:00.0-c8:2:ff # payload\n03:00.0-c8:5:ff\n04:00.0-d0:1:1\n",
        )
        .unwrap();
        let text =
            format!("quirks = {path:?}\n[[device]]\nid = \"8086:10d3\"\nquirks = [\"d0:4:f0\"]\n");
        let config = parse(&text).unwrap();
        assert_eq!(config.warnings.len(), 1);
        assert!(
            config.warnings[0].contains("line 2"),
            "{:?}",
            config.warnings
        );
        let quirks: Vec<String> = config
            .settings_for(&nic())
            .quirks
            .iter()
            .map(|quirk| quirk.to_string())
            .collect();
        assert_eq!(quirks, ["000000d0:4:000000f0", "000000c8:2:000000ff"]);
    }

    #[test]
    fn commands_are_run_with_what_the_placeholders_stand_for() {
        let commands = parse("[commands]\nkill = [\"/bin/kill it\", \"{domain}/{device}\"]\n")
            .unwrap()
            .commands;
        let fill = |command: &[String]| Commands::fill(command, xenbus::DomId(7), nic().bdf);
        assert_eq!(fill(&commands.kill), ["/bin/kill it", "7/0000:03:00.0"]);
        assert_eq!(
            fill(&commands.detach),
            ["xl", "pci-detach", "7", "0000:03:00.0"]
        );
    }

    /// What stands commented out in the file that is installed is an example that must be understood.
    #[test]
    fn the_example_that_is_installed_is_understood() {
        let text = include_str!("../../packaging/pcibackd.toml");
        let examples: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(example) if !example.starts_with(' ') => format!("{example}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let without_file = examples.replace("quirks = \"/etc/pciback/quirks\"", "");
        assert_ne!(without_file, examples);
        let config: Config = without_file.parse().unwrap();
        assert!(!config.devices.is_empty() && !config.hide.is_empty());
        assert_eq!(config.commands, Commands::default());
        // Its [defaults] are those that hold without it.
        let mut other = nic();
        other.bdf = "0000:7f:00.0".parse().unwrap();
        (other.device, other.path) = (0, None);
        assert_eq!(config.settings_for(&other), DeviceSettings::default());
    }
}
