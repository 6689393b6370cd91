//! Where a setting comes from.

use std::fmt;

use conf_space::selector::DeviceNames;

use super::Config;
use super::device::Keys;
use super::settings::Partial;

/// A setting of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// `permissive`.
    Permissive,
    /// `quirks`.
    Quirks,
    /// `allow_interrupt_control`.
    InterruptControl,
    /// `allow_shared_interrupt`.
    SharedInterrupt,
    /// `allow_shared_pages`.
    SharedPages,
    /// `reset`.
    Reset,
    /// `aer`.
    Aer,
    /// `host`.
    Host,
    /// `intx`.
    Intx,
}

/// What in the configuration a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nothing says otherwise.
    BuiltIn,
    /// `[defaults]`.
    Defaults,
    /// A `[[device]]`.
    Device {
        /// The line that it begins at.
        line: usize,
        /// Which devices it is for.
        keys: Keys,
    },
    /// The file of quirks.
    QuirkFile,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("default"),
            Self::Defaults => f.write_str("[defaults]"),
            Self::Device { line, keys } => write!(f, "[[device]], line {line}: {keys}"),
            Self::QuirkFile => f.write_str("file of quirks"),
        }
    }
}

impl Config {
    /// Where a device's setting comes from; of several places, the one that has the last word.
    pub fn origin_of(&self, setting: Setting, device: &DeviceNames) -> Origin {
        if setting == Setting::Quirks && self.quirks.iter().any(|entry| entry.device == device.bdf)
        {
            return Origin::QuirkFile;
        }
        let entry = self
            .devices
            .iter()
            .rfind(|entry| entry.keys.match_all(device) && entry.settings.says(setting));
        match entry {
            Some(entry) => Origin::Device {
                line: entry.line,
                keys: entry.keys.clone(),
            },
            None if self.defaults.0.says(setting) => Origin::Defaults,
            None => Origin::BuiltIn,
        }
    }

    /// The reasons that were given for the ranges that a device's guest may write: range, reason.
    pub fn reasons_for(&self, device: &DeviceNames) -> Vec<(String, String)> {
        let matching = self
            .devices
            .iter()
            .filter(|entry| entry.keys.match_all(device))
            .map(|entry| &entry.settings);
        let last = [&self.defaults.0]
            .into_iter()
            .chain(matching)
            .filter_map(|settings| settings.permissive.as_ref())
            .next_back();
        let reasons = last.map(|permissive| permissive.reasons.as_slice());
        let pairs = reasons.unwrap_or_default().iter();
        pairs
            .map(|(range, reason)| (range.to_string(), reason.clone()))
            .collect()
    }
}

impl Partial {
    fn says(&self, setting: Setting) -> bool {
        match setting {
            Setting::Permissive => self.permissive.is_some(),
            Setting::Quirks => self.quirks.is_some(),
            Setting::InterruptControl => self.allow_interrupt_control.is_some(),
            Setting::SharedInterrupt => self.allow_shared_interrupt.is_some(),
            Setting::SharedPages => self.allow_shared_pages.is_some(),
            Setting::Reset => self.reset.is_some(),
            Setting::Aer => self.aer.is_some(),
            Setting::Host => self.host.is_some(),
            Setting::Intx => self.intx.is_some(),
        }
    }
}
