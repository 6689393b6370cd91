//! How a PCI function looks to drivers.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use virtio::pci::{Layout, Mode, Shape};

#[derive(Serialize, Deserialize)]
#[serde(remote = "Mode", rename_all = "lowercase")]
enum ModeName {
    Legacy,
    Transitional,
    Modern,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Layout", rename_all = "lowercase")]
enum LayoutName {
    Qemu,
    Compact,
}

/// A shape as it is written.
#[derive(Serialize, Deserialize)]
struct Table {
    #[serde(with = "ModeName", default = "mode")]
    mode: Mode,
    #[serde(with = "LayoutName", default = "layout")]
    layout: Layout,
    #[serde(default)]
    legacy_in_memory: bool,
}

fn mode() -> Mode {
    Mode::Transitional
}

fn layout() -> Layout {
    Layout::Qemu
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Shape, D::Error> {
    let Table {
        mode,
        layout,
        legacy_in_memory,
    } = Table::deserialize(from)?;
    if legacy_in_memory && !mode.has_legacy() {
        return Err(de::Error::custom(
            "legacy_in_memory is for devices with a legacy interface: choose the mode \"transitional\" or \"legacy\", or leave it out",
        ));
    }
    Ok(Shape {
        mode,
        layout,
        legacy_in_memory,
    })
}

pub(super) fn serialize<S: Serializer>(shape: &Shape, to: S) -> Result<S::Ok, S::Error> {
    let table = Table {
        mode: shape.mode,
        layout: shape.layout,
        legacy_in_memory: shape.legacy_in_memory,
    };
    table.serialize(to)
}
