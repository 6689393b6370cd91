//! Places in the machine that stay the same when buses are renumbered.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::address::{self, Bdf};

/// The way to a device from its root bus: device and function numbers of every bridge on it, and last its own.
///
/// Written as ACPI and DMAR tables name devices: the first address in full, and `device.function` for each further step.
/// `0000:00:1c.0/00.0` is function 00.0 behind the bridge 0000:00:1c.0, whichever bus number that bridge's bus has got.
/// A virtual function is told by its number on its physical function, `0000:00:1c.0/00.0/vf3`: its address depends on how
/// many there are.
///
/// Device and function numbers are the board's wiring, and root buses are the firmware's; bus numbers behind bridges are
/// given out in the order in which devices are found, and so change when a card is added.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SlotPath {
    root: Bdf,
    /// Device << 3 | function of each step below.
    steps: Vec<u8>,
    virtual_function: Option<u16>,
}

impl SlotPath {
    /// A device on a root bus.
    pub fn root(bdf: Bdf) -> Self {
        Self {
            root: bdf,
            steps: Vec::new(),
            virtual_function: None,
        }
    }

    /// A device directly behind a root port.
    pub fn below(port: Bdf, device: Bdf) -> Self {
        Self {
            steps: vec![device.devfn()],
            ..Self::root(port)
        }
    }

    /// A device from all addresses on the way to it: the bridges, outermost first, and the device itself. `None` without any.
    pub fn of(way: impl IntoIterator<Item = Bdf>) -> Option<Self> {
        let mut way = way.into_iter();
        let mut path = Self::root(way.next()?);
        path.steps.extend(way.map(Bdf::devfn));
        Some(path)
    }

    /// A virtual function of the device at this path.
    #[must_use]
    pub fn virtual_function(mut self, number: u16) -> Self {
        self.virtual_function = Some(number);
        self
    }
}

impl fmt::Display for SlotPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.fmt(f)?;
        for step in &self.steps {
            write!(f, "/{:02x}.{:x}", step >> 3, step & Bdf::MAX_FUNCTION)?;
        }
        if let Some(number) = self.virtual_function {
            write!(f, "/vf{number}")?;
        }
        Ok(())
    }
}

/// A text that is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ParsePathError {
    /// It does not begin with the address of a device on a root bus.
    #[error(
        "a path begins with the address of a root port, as in 0000:00:1c.0/00.0; 'pciback show' tells a device's"
    )]
    Root(#[source] address::ParseBdfError),
    /// A step is none.
    #[error(
        "each step of a path is device.function in hexadecimal, as in 0000:00:1c.0/00.0, and the last may be vf and a number"
    )]
    Step,
}

impl FromStr for SlotPath {
    type Err = ParsePathError;

    fn from_str(text: &str) -> Result<Self, ParsePathError> {
        let mut parts = text.split('/');
        let root = parts.next().unwrap_or_default();
        let mut path = Self::root(root.parse().map_err(ParsePathError::Root)?);
        for part in parts {
            if path.virtual_function.is_some() {
                return Err(ParsePathError::Step);
            }
            match part.strip_prefix("vf") {
                Some(number) => path.virtual_function = Some(decimal(number)?),
                None => path.steps.push(step(part)?),
            }
        }
        Ok(path)
    }
}

fn decimal(text: &str) -> Result<u16, ParsePathError> {
    // `parse` would take a sign.
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ParsePathError::Step);
    }
    text.parse().map_err(|_| ParsePathError::Step)
}

fn step(text: &str) -> Result<u8, ParsePathError> {
    let (device, function) = text.split_once('.').ok_or(ParsePathError::Step)?;
    let device = address::parse_device(device).map_err(|_| ParsePathError::Step)?;
    let function = address::parse_function(function).map_err(|_| ParsePathError::Step)?;
    Bdf::new(0, 0, device, function)
        .map(Bdf::devfn)
        .ok_or(ParsePathError::Step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_shows() {
        for text in [
            "0000:00:1f.2",
            "0000:00:1c.0/00.0",
            "0001:80:03.1/00.0/1f.7/00.1",
            "0000:00:1c.0/00.0/vf12",
        ] {
            assert_eq!(text.parse::<SlotPath>().unwrap().to_string(), text);
        }
        assert_eq!(
            "00:1c.0/0.0".parse::<SlotPath>(),
            "0000:00:1c.0/00.0".parse()
        );
    }

    #[test]
    fn does_not_change_when_buses_are_renumbered() {
        let way =
            |bus: u8| SlotPath::of([Bdf::from_devfn(0, 0, 0x1c << 3), Bdf::from_devfn(0, bus, 1)]);
        assert_eq!(way(3), way(4));
        assert_eq!(way(3).unwrap().to_string(), "0000:00:1c.0/00.1");
    }

    #[test]
    fn what_is_no_path_is_refused() {
        for text in [
            "",
            "/",
            "00:1c.0/",
            "00:1c.0//00.0",
            "00:1c.0/20.0",
            "00:1c.0/00.8",
            "00:1c.0/vf",
            "00:1c.0/vf+1",
            "00:1c.0/vf65536",
            "00:1c.0/vf1/00.0",
        ] {
            assert!(text.parse::<SlotPath>().is_err(), "{text:?}");
        }
    }
}
