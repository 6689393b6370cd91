//! What is told of a device's settings, and of the writes that were dropped.

use conf_space::address::Bdf;
use serde::{Deserialize, Serialize};

/// A device's settings, as they are now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsShown {
    /// The device.
    pub device: Bdf,
    /// Each by its name in the configuration file.
    pub settings: Vec<SettingLine>,
    /// What ends that which was set at run time; `None`: nothing was.
    pub until: Option<String>,
}

/// The settings of guests of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSettingsShown {
    /// The name.
    pub guest: String,
    /// Each by its name in the configuration file.
    pub settings: Vec<SettingLine>,
    /// When what was set at run time holds; `None`: nothing was.
    pub until: Option<String>,
}

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingLine {
    /// Its name.
    pub name: String,
    /// As the configuration file would have it.
    pub value: String,
    /// Where it comes from.
    pub from: String,
    /// The reasons that the file gives: range, reason.
    pub reasons: Vec<(String, String)>,
}

/// Writes of a device's guest that did not reach the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedShown {
    /// The device.
    pub device: Bdf,
    /// Whose writes, in words.
    pub of: String,
    /// By register, in the order in which they were first written.
    pub writes: Vec<DroppedLine>,
    /// Writes to more registers than are told apart.
    pub elsewhere: u32,
    /// What would let those through that may be.
    pub suggestion: Option<Suggestion>,
}

/// Writes to one register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedLine {
    /// The header or capability that it is in; empty when it is in none.
    pub block: String,
    /// Name of the register; empty when it is none that is known.
    pub register: String,
    /// Offset of the writes.
    pub offset: u16,
    /// Their width in bytes.
    pub width: u16,
    /// How many there were.
    pub count: u32,
    /// What was written last.
    pub last: u32,
    /// Why this is not to be let through; `None`: it may be.
    pub never: Option<String>,
    /// What to think of before it is let through.
    pub note: Option<String>,
}

/// What would let dropped writes through, and no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suggestion {
    /// For now: the arguments of `pciback`.
    pub command: String,
    /// For good: an entry of the configuration file.
    pub entry: String,
    /// Registers that it leaves closed, as there is no room for more ranges.
    pub left_out: u32,
}
