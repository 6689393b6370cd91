//! What tells a device at boot.

use std::fmt;

use conf_space::address::Bdf;
use conf_space::bdf_list::BdfPattern;
use conf_space::selector::{DeviceId, Selector, SlotPath};

/// A device, or some, as a POSIX shell and udev can tell them: by where they are below `/sys/devices`, and by their identification registers.
///
/// Its text is a line of the list that `packaging/reserve` reads: `PATTERN [VENDOR DEVICE [SUBVENDOR SUBDEVICE]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootMatch {
    /// A pattern of the shell (`*`, `?`) for the path in `/sys/devices`.
    path: String,
    id: Option<DeviceId>,
}

impl BootMatch {
    /// What matches the devices that are meant. Nothing for virtual functions by their number: they come long after the boot.
    pub fn of(selector: &Selector) -> Vec<Self> {
        match selector {
            Selector::Address(pattern) => of_addresses(pattern),
            Selector::Path(path) => of_place(path).into_iter().collect(),
            Selector::Id(id) => vec![Self {
                path: "*".into(),
                id: Some(*id),
            }],
        }
    }

    fn at(address: impl fmt::Display) -> Self {
        Self {
            path: format!("*/{address}"),
            id: None,
        }
    }

    /// The identification registers that are asked for, named as in sysfs.
    fn attributes(&self) -> Vec<(&'static str, u16)> {
        let Some(id) = self.id else { return Vec::new() };
        let mut attributes = vec![("vendor", id.vendor), ("device", id.device)];
        if let Some((vendor, device)) = id.subsystem {
            attributes.extend([("subsystem_vendor", vendor), ("subsystem_device", device)]);
        }
        attributes
    }

    /// A udev rule that reserves the device.
    pub fn udev_rule(&self) -> String {
        let attributes: String = self
            .attributes()
            .iter()
            .map(|(name, value)| format!("ATTR{{{name}}}==\"{value:#06x}\", "))
            .collect();
        format!(
            "DEVPATH==\"{}\", {attributes}ATTR{{driver_override}}=\"pciback\"",
            self.path
        )
    }
}

impl fmt::Display for BootMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        for (_, value) in self.attributes() {
            write!(f, " {value:#06x}")?;
        }
        Ok(())
    }
}

/// The device at this place: behind a bridge only device and function are known, for its bus number may be another at each boot.
fn of_place(path: &SlotPath) -> Option<BootMatch> {
    let text = path.to_string();
    if text.contains("/vf") {
        return None;
    }
    Some(BootMatch::at(text.replace('/', "/????:??:")))
}

/// The devices at these addresses: as few patterns as there are single functions, whole devices and whole buses in the range.
fn of_addresses(pattern: &BdfPattern) -> Vec<BootMatch> {
    let (first, last) = pattern.ends();
    let segment = first.segment();
    let number = |bdf: Bdf| u32::from(bdf.bus()) << 8 | u32::from(bdf.devfn());
    let (mut next, last) = (number(first), number(last));
    let mut found = Vec::new();
    while next <= last {
        let [.., bus, devfn] = next.to_be_bytes();
        let bdf = Bdf::from_devfn(segment, bus, devfn);
        // A block of 256 functions is a bus, one of eight a device.
        let whole = |size: u32| {
            next.is_multiple_of(size) && next.saturating_add(size) <= last.saturating_add(1)
        };
        let size = if whole(256) {
            found.push(BootMatch::at(format_args!("{segment:04x}:{bus:02x}:??.?")));
            256
        } else if whole(8) {
            let device = bdf.device();
            found.push(BootMatch::at(format_args!(
                "{segment:04x}:{bus:02x}:{device:02x}.?"
            )));
            8
        } else {
            found.push(BootMatch::at(bdf));
            1
        };
        next = next.saturating_add(size);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entry: &str) -> Vec<String> {
        BootMatch::of(&entry.parse().unwrap())
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn devices_and_buses_are_a_pattern_each() {
        assert_eq!(list("03:00.1"), ["*/0000:03:00.1"]);
        assert_eq!(list("1:03:1f.*"), ["*/0001:03:1f.?"]);
        assert_eq!(list("ff:*.*"), ["*/0000:ff:??.?"]);
    }

    #[test]
    fn a_range_is_its_functions_devices_and_buses() {
        assert_eq!(
            list("03:1e.6-05:01.1"),
            [
                "*/0000:03:1e.6",
                "*/0000:03:1e.7",
                "*/0000:03:1f.?",
                "*/0000:04:??.?",
                "*/0000:05:00.?",
                "*/0000:05:01.0",
                "*/0000:05:01.1"
            ]
        );
    }

    #[test]
    fn a_place_leaves_the_bus_numbers_behind_bridges_open() {
        assert_eq!(list("00:1c.0/00.0"), ["*/0000:00:1c.0/????:??:00.0"]);
        assert_eq!(
            list("00:1c.0/00.0/02.1"),
            ["*/0000:00:1c.0/????:??:00.0/????:??:02.1"]
        );
        assert!(list("00:1c.0/00.0/vf3").is_empty());
    }

    #[test]
    fn a_kind_is_told_by_its_registers() {
        assert_eq!(list("8086:10d3"), ["* 0x8086 0x10d3"]);
        assert_eq!(
            list("8086:10d3:1af4:0001"),
            ["* 0x8086 0x10d3 0x1af4 0x0001"]
        );
        let [kind] = &BootMatch::of(&"8086:10d3:1af4:0001".parse().unwrap())[..] else {
            panic!("not one");
        };
        assert_eq!(
            kind.udev_rule(),
            "DEVPATH==\"*\", ATTR{vendor}==\"0x8086\", ATTR{device}==\"0x10d3\", ATTR{subsystem_vendor}==\"0x1af4\", \
             ATTR{subsystem_device}==\"0x0001\", ATTR{driver_override}=\"pciback\""
        );
    }
}
