//! Ways to say which device is meant, from the most exact to the most lasting.
//!
//! | form | means | holds |
//! |---|---|---|
//! | `0000:03:00.0`, `03:00.*`, ... | addresses, see [`bdf_list`] | until a card is added or removed: bus numbers are given out at boot |
//! | `0000:00:1c.0/00.0` | a place in the machine, see [`SlotPath`] | as long as the card stays in its slot |
//! | `8086:10d3`, `8086:10d3:8086:a01f` | a kind of device, see [`DeviceId`] | wherever the card is, and for all of its kind |

mod id;
mod path;

use std::fmt;
use std::str::FromStr;

pub use self::id::{DeviceId, ParseIdError};
pub use self::path::{ParsePathError, SlotPath};

use crate::address::Bdf;
use crate::bdf_list::{self, BdfPattern, EntryError, EntryProblem};

/// One device of the host by all that it can be told by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNames {
    /// Its address now.
    pub bdf: Bdf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
    /// Where it is in the machine, if that is known.
    pub path: Option<SlotPath>,
}

/// One entry of a list of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// Addresses.
    Address(BdfPattern),
    /// A place in the machine.
    Path(SlotPath),
    /// A kind of device.
    Id(DeviceId),
}

impl Selector {
    /// Whether this device is meant.
    pub fn matches(&self, device: &DeviceNames) -> bool {
        match self {
            Self::Address(pattern) => pattern.matches(device.bdf),
            Self::Path(path) => device.path.as_ref() == Some(path),
            Self::Id(id) => id.matches(device),
        }
    }

    /// The address, if a single one is meant, whatever device is there.
    pub fn exact(&self) -> Option<Bdf> {
        match self {
            Self::Address(pattern) => pattern.exact(),
            Self::Path(_) | Self::Id(_) => None,
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(pattern) => pattern.fmt(f),
            Self::Path(path) => path.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}

impl FromStr for Selector {
    type Err = EntryProblem;

    fn from_str(entry: &str) -> Result<Self, EntryProblem> {
        if entry.contains('/') {
            return Ok(Self::Path(entry.parse()?));
        }
        match entry.parse() {
            Ok(id) => Ok(Self::Id(id)),
            Err(ParseIdError) => entry.parse().map(Self::Address),
        }
    }
}

/// Parses a list, whose entries are separated as in [`bdf_list::parse`]. Each gives a result of its own.
pub fn parse(list: &str) -> Vec<Result<Selector, EntryError>> {
    bdf_list::parse_entries(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> DeviceNames {
        DeviceNames {
            bdf: "03:00.1".parse().unwrap(),
            vendor: 0x8086,
            device: 0x10d3,
            subsystem: (0x8086, 0xa01f),
            path: "00:1c.0/00.1".parse().ok(),
        }
    }

    #[test]
    fn a_list_may_mix_all_forms() {
        let list = "03:00.1,(04:00.*) 0000:00:1c.0/00.1,8086:10D3 8086:10d3:8086:a01f 3:0:1";
        let shown: Vec<String> = parse(list)
            .into_iter()
            .map(|entry| entry.unwrap().to_string())
            .collect();
        let expected = [
            "0000:03:00.1",
            "0000:04:00.*",
            "0000:00:1c.0/00.1",
            "8086:10d3",
            "8086:10d3:8086:a01f",
            "0000:03:00.1",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn each_form_finds_the_device_and_no_other() {
        let mut other = device();
        other.bdf = "03:00.2".parse().unwrap();
        other.path = "00:1c.0/00.2".parse().ok();
        other.device = 0x10d4;
        for text in [
            "03:00.1",
            "00:1c.0/00.1",
            "8086:10d3",
            "8086:10d3:8086:a01f",
        ] {
            let selector: Selector = text.parse().unwrap();
            assert!(selector.matches(&device()), "{text}");
            assert!(!selector.matches(&other), "{text}");
        }
    }

    #[test]
    fn a_device_whose_place_is_unknown_is_at_no_path() {
        let mut lost = device();
        lost.path = None;
        assert!(!"00:1c.0/00.1".parse::<Selector>().unwrap().matches(&lost));
    }

    #[test]
    fn what_is_wrong_with_an_entry_is_told_for_what_it_was_meant_as() {
        for (text, part) in [
            ("00:1c.0/", "device.function"),
            ("00:1c/00.0", "path"),
            ("03:00", "function is missing"),
            ("8086:10d", "expected dddd:bb:ss.f"),
        ] {
            let error = text.parse::<Selector>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
