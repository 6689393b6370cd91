//! Trees of PCI buses.

use std::collections::BTreeMap;

use conf_space::Bdf;
use pcibackd::control::protocol::DeviceLine;
use pcibackd::text::printable;
use xenbus::PciDevice;
use xenbus::sim::{Bar, BarKind, Function};

use crate::output::class;

/// A text with others below it.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    text: String,
    children: Vec<Node>,
}

impl Node {
    fn new(text: String) -> Self {
        Self {
            text,
            children: Vec::new(),
        }
    }

    /// The tree as lines, drawn as lspci draws it.
    pub fn render(&self) -> String {
        let mut text = format!("{}\n", printable(&self.text));
        self.render_children(" ", &mut text);
        text
    }

    fn render_children(&self, indent: &str, text: &mut String) {
        let last = self.children.len().saturating_sub(1);
        for (index, child) in self.children.iter().enumerate() {
            let (branch, below) = if index == last {
                ("\\- ", "   ")
            } else {
                ("+- ", "|  ")
            };
            text.push_str(&format!("{indent}{branch}{}\n", printable(&child.text)));
            child.render_children(&format!("{indent}{below}"), text);
        }
    }
}

/// The host's buses. `physical` says of which physical function a device is a virtual one.
pub fn host(devices: &[DeviceLine], physical: &BTreeMap<Bdf, Bdf>) -> Vec<Node> {
    let mut buses: BTreeMap<(u16, u8), Vec<Node>> = BTreeMap::new();
    for device in devices {
        // Those of a physical function stand below it.
        if physical.contains_key(&device.device) {
            continue;
        }
        let mut node = Node::new(host_device(device));
        let of_it = |other: &&DeviceLine| physical.get(&other.device) == Some(&device.device);
        node.children = devices
            .iter()
            .filter(of_it)
            .map(|function| Node::new(format!("{} (virtual function)", host_device(function))))
            .collect();
        let bus = (device.device.segment(), device.device.bus());
        buses.entry(bus).or_default().push(node);
    }
    let bus = |((segment, bus), children)| Node {
        text: format!("{segment:04x}:{bus:02x}"),
        children,
    };
    buses.into_iter().map(bus).collect()
}

fn host_device(device: &DeviceLine) -> String {
    let holder = match (device.domain, device.seen_as, &device.driver) {
        (Some(domain), Some(seen_as), _) => format!("domain {domain}'s, at {seen_as} there"),
        (_, _, Some(driver)) if device.state == "dom0" => format!("dom0's {driver}"),
        _ => device.state.clone(),
    };
    format!(
        "{}  {} [{:04x}:{:04x}]: {holder}",
        device.device,
        class::name(device.class),
        device.vendor,
        device.id
    )
}

/// What a guest has found.
pub fn guest<'a>(functions: impl Iterator<Item = &'a Function>) -> Vec<Node> {
    let mut buses: BTreeMap<(u16, u8), Vec<Node>> = BTreeMap::new();
    for function in functions {
        let PciDevice { segment, bus, .. } = function.address;
        let mut node = Node::new(format!(
            "{}  {} [{:04x}:{:04x}]",
            function.address,
            class::name(function.class),
            function.vendor,
            function.device
        ));
        node.children = function
            .bars
            .iter()
            .map(|found| Node::new(bar(found)))
            .collect();
        buses.entry((segment, bus)).or_default().push(node);
    }
    let bus = |((segment, bus), children)| Node {
        text: format!("{segment:04x}:{bus:02x}"),
        children,
    };
    buses.into_iter().map(bus).collect()
}

/// An address register with what it decodes.
pub fn bar(bar: &Bar) -> String {
    let name = match bar.kind {
        BarKind::Rom => "ROM".to_owned(),
        _ => format!("BAR {}", bar.index),
    };
    let kind = match bar.kind {
        BarKind::Io => "I/O ports",
        BarKind::Memory32 => "of memory",
        BarKind::Memory64 => "of memory, 64-bit",
        BarKind::Rom => "of ROM",
    };
    let size = if bar.kind == BarKind::Io {
        bar.size.to_string()
    } else {
        bytes(bar.size)
    };
    format!("{name}: {size} {kind} at {:#x}", bar.address)
}

/// A size as persons say it.
pub fn bytes(size: u64) -> String {
    let in_units = |shift: u32| (size.trailing_zeros() >= shift).then_some(size >> shift);
    match (in_units(20), in_units(10)) {
        (Some(size), _) => format!("{size} MiB"),
        (None, Some(size)) => format!("{size} KiB"),
        (None, None) => format!("{size} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::network_card;

    fn device(bdf: &str, class: u32, driver: Option<&str>) -> DeviceLine {
        DeviceLine {
            id: 0x10c9,
            class,
            ..network_card(bdf, "dom0", driver)
        }
    }

    #[test]
    fn devices_stand_below_their_bus_and_virtual_functions_below_their_physical_one() {
        let mut devices = [
            device("00:1c.0", 0x06_04_00, Some("pcieport")),
            device("01:00.0", 0x02_00_00, Some("igb")),
            device("01:10.0", 0x02_00_00, None),
            device("01:10.2", 0x02_00_00, None),
        ];
        devices[2].state = "assigned".into();
        devices[2].domain = Some(1);
        devices[2].seen_as = Some("00:00.0".parse().unwrap());
        devices[3].state = "hidden".into();
        let physical = ["01:10.0", "01:10.2"]
            .map(|function| (function.parse().unwrap(), "01:00.0".parse().unwrap()));
        let trees = host(&devices, &physical.into());
        let text: String = trees.iter().map(Node::render).collect();
        let expected = "\
0000:00
 \\- 0000:00:1c.0  PCI bridge [8086:10c9]: dom0's pcieport
0000:01
 \\- 0000:01:00.0  Ethernet controller [8086:10c9]: dom0's igb
    +- 0000:01:10.0  Ethernet controller [8086:10c9]: domain 1's, at 0000:00:00.0 there (virtual function)
    \\- 0000:01:10.2  Ethernet controller [8086:10c9]: hidden (virtual function)
";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_address_register_says_how_much_of_what_is_where() {
        let of = |kind, size| {
            bar(&Bar {
                index: 2,
                kind,
                address: 0xfe00_0000,
                size,
            })
        };
        assert_eq!(
            of(BarKind::Memory64, 0x4000),
            "BAR 2: 16 KiB of memory, 64-bit at 0xfe000000"
        );
        assert_eq!(of(BarKind::Io, 32), "BAR 2: 32 I/O ports at 0xfe000000");
        assert_eq!(
            of(BarKind::Rom, 0x10_0000),
            "ROM: 1 MiB of ROM at 0xfe000000"
        );
        assert_eq!(
            of(BarKind::Memory32, 0x80),
            "BAR 2: 128 bytes of memory at 0xfe000000"
        );
    }
}
