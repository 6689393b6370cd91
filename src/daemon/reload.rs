//! Reading the configuration file again (SIGHUP), and looking at one without starting (`--check-config`).

use std::path::Path;

use conf_space::overlay::quirk::Quirks;
use conf_space::selector::{self, DeviceNames};
use log::{error, info, warn};

use crate::config::{Config, ConfigError, Live};
use crate::host::sysfs::Sysfs;
use crate::host::{Bus, HostError};
use crate::text::chain;

/// Puts what the file says now in the place of what it said. A file that cannot be used changes nothing. `hidden` are the hidden devices.
pub(super) fn reload(live: &Live, hidden: &[DeviceNames]) {
    let old = live.get();
    let new = match old.load_again() {
        Ok(new) => new,
        Err(error) => {
            error!(
                "the configuration stays as it was, and guests are served on: {}",
                chain(&error)
            );
            return;
        }
    };
    let found = [bad_entries(&new), left_out(&new, hidden)].concat();
    for warning in new.warnings.iter().chain(&found) {
        warn!("configuration: {warning}");
    }
    live.replace(new);
    info!("the configuration was read again");
}

/// What is found in a configuration file.
#[derive(Debug, Default)]
pub struct Findings {
    /// What is wrong with it.
    pub errors: Vec<String>,
    /// What has no effect on this host.
    pub warnings: Vec<String>,
}

/// Looks at a configuration file, and at what this host has of the devices that it names.
///
/// # Errors
/// When the file cannot be used at all.
pub fn check_config(file: Option<&Path>) -> Result<Findings, ConfigError> {
    let config = Config::load(file)?;
    let mut findings = Findings {
        errors: bad_entries(&config),
        warnings: Vec::new(),
    };
    findings.errors.extend(config.warnings.iter().cloned());
    match host_devices() {
        Ok(devices) => {
            findings.warnings = unmatched(&config, &devices);
            findings.warnings.extend(left_out(&config, &devices));
        }
        Err(why) => findings.warnings.push(format!(
            "whether this host has the devices that the file names was not looked at: {why}"
        )),
    }
    Ok(findings)
}

fn host_devices() -> Result<Vec<DeviceNames>, String> {
    // A daemon may be serving them, and a facade be in place.
    let bus = Sysfs::to_look_at("/sys");
    let told = |error: HostError| chain(&error);
    let found = bus.list().map_err(told)?.into_iter();
    Ok(found
        .filter_map(|bdf| bus.describe(bdf).ok())
        .map(|description| description.names())
        .collect())
}

/// Entries of `hide` that name nothing.
fn bad_entries(config: &Config) -> Vec<String> {
    let entries = config.hide.iter().flat_map(|list| selector::parse(list));
    entries
        .filter_map(Result::err)
        .map(|error| format!("hide: {error}"))
        .collect()
}

/// Lines of the file of quirks that have no effect.
pub(super) fn left_out(config: &Config, devices: &[DeviceNames]) -> Vec<String> {
    let told = |device: &DeviceNames| {
        let (bdf, most) = (device.bdf, Quirks::CAPACITY);
        let left_out = config.left_out_for(device).into_iter();
        left_out.map(move |quirk| {
            format!("quirks: {quirk} of {bdf} is left out: a device can have {most} at most, those of its [[device]] counted")
        })
    };
    devices.iter().flat_map(told).collect()
}

/// Entries that no device of the host matches.
fn unmatched(config: &Config, devices: &[DeviceNames]) -> Vec<String> {
    let mut found = Vec::new();
    for selector in config
        .hide
        .iter()
        .flat_map(|list| selector::parse(list))
        .flatten()
    {
        if !devices.iter().any(|device| selector.matches(device)) {
            found.push(format!("hide: no device of this host matches {selector}"));
        }
    }
    for entry in &config.devices {
        let (line, keys) = (entry.line, &entry.keys);
        if devices.iter().any(|device| keys.match_all(device)) {
            continue;
        }
        let other = devices.iter().find(|device| keys.disagree_on(device));
        found.push(match other {
            Some(other) => format!(
                "line {line}: no device of this host matches {keys}: at that place is {} [{:04x}:{:04x}]",
                other.bdf, other.vendor, other.device
            ),
            None => format!("line {line}: no device of this host matches {keys}"),
        });
    }
    for entry in &config.quirks {
        if !devices.iter().any(|device| device.bdf == entry.device) {
            found.push(format!(
                "quirks: there is no device {} on this host",
                entry.device
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        text.parse().unwrap()
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

    #[test]
    fn what_no_device_of_the_host_matches_is_told_with_its_line() {
        let config = config(
            "hide = [\"03:00.0, 8086:ffff\", \"nonsense\"]\n\
             [[device]]\nid = \"8086:10d3\"\n\
             [[device]]\nbdf = \"03:00.0\"\nid = \"8086:1533\"\n\
             [[device]]\npath = \"00:1d.0/00.0\"\n",
        );
        let told = unmatched(&config, &[nic()]);
        assert_eq!(told.len(), 3, "{told:?}");
        for (told, part) in told.iter().zip([
            "8086:ffff",
            "line 4: no device of this host matches bdf = \"0000:03:00.0\", id = \"8086:1533\": at that place is 0000:03:00.0 [8086:10d3]",
            "line 7",
        ]) {
            assert!(told.contains(part), "{told}");
        }
        assert_eq!(bad_entries(&config).len(), 1);
    }

    #[test]
    fn quirks_for_which_a_device_has_no_room_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quirks");
        let lines: String = (0..17)
            .map(|n| format!("03:00.0-{:x}:1:1\n", 0xc0 + n))
            .collect();
        std::fs::write(&path, lines).unwrap();
        let text = format!("quirks = {path:?}\n");
        let told = left_out(&config(&text), &[nic()]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].contains("000000d0:1:00000001 of 0000:03:00.0"),
            "{told:?}"
        );
        let text = format!("{text}[[device]]\nid = \"8086:10d3\"\nquirks = [\"60:1:1\"]\n");
        assert_eq!(left_out(&config(&text), &[nic()]).len(), 2);
    }

    #[test]
    fn a_file_that_is_broken_meanwhile_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pcibackd.toml");
        let write = |text| std::fs::write(&path, text).unwrap();
        write("[defaults]\nreset = \"pm\"\n");
        let live = Live::new(Config::load(Some(&path)).unwrap());
        for broken in ["[defaults]\nrset = \"none\"\n", "[defaults\n"] {
            write(broken);
            reload(&live, &[nic()]);
            assert_eq!(live.version(), 0);
            assert_eq!(live.get().settings_for(&nic()).reset.name(), "pm");
        }
        write("[defaults]\nreset = \"none\"\n");
        reload(&live, &[nic()]);
        assert_eq!(live.get().settings_for(&nic()).reset.name(), "none");
        std::fs::remove_file(&path).unwrap();
        reload(&live, &[nic()]);
        assert_eq!(live.get().settings_for(&nic()).reset.name(), "none");
    }
}
