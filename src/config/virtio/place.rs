//! Where a device is in the guest, and how it looks to drivers there.

use serde::{Deserialize, Serialize};
use virtio::pci::{Layout, Mode, Shape};
use virtio::transport::mmio::Version;

use super::{MmioSlot, MmioSlotError, Slot, SlotError};

/// Where a device is, and what it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub enum Place {
    /// A PCI function.
    Pci {
        /// `None`: the highest slot that is free.
        slot: Option<Slot>,
        /// How it looks to drivers.
        shape: Shape,
    },
    /// In the guest's memory.
    Mmio {
        /// `None`: the lowest slot that is free.
        slot: Option<MmioSlot>,
        /// Of its registers.
        version: Version,
    },
}

/// What is written of a place does not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// A slot of PCI.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A slot of virtio-mmio.
    #[error(transparent)]
    MmioSlot(#[from] MmioSlotError),
    /// A version of virtio-mmio.
    #[error("the version of virtio-mmio is 1, which is the legacy one, or 2")]
    Version,
    /// No legacy interface to have there.
    #[error(
        "legacy_in_memory is for devices with a legacy interface: choose the mode \"transitional\" or \"legacy\", or leave it out"
    )]
    NoLegacy,
    /// A key of the other transport.
    #[error("a device with transport = \"{transport}\" has no key {key}")]
    Foreign {
        /// The device's transport.
        transport: &'static str,
        /// The key.
        key: &'static str,
    },
}

/// A place as it is written.
#[derive(Default, Serialize, Deserialize)]
struct Table {
    #[serde(default)]
    transport: Transport,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    slot: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<ModeName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layout: Option<LayoutName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    legacy_in_memory: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u8>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Transport {
    #[default]
    Pci,
    Mmio,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Legacy,
    Transitional,
    Modern,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LayoutName {
    Qemu,
    Compact,
}

/// The version of this number; `None`: the newest.
pub(super) fn version(number: Option<u8>) -> Result<Version, PlaceError> {
    match number {
        Some(1) => Ok(Version::One),
        Some(2) | None => Ok(Version::Two),
        Some(_) => Err(PlaceError::Version),
    }
}

fn pci(table: &Table) -> Result<Place, PlaceError> {
    if table.version.is_some() {
        let (transport, key) = ("pci", "version");
        return Err(PlaceError::Foreign { transport, key });
    }
    let mode = match table.mode {
        Some(ModeName::Legacy) => Mode::Legacy,
        Some(ModeName::Transitional) | None => Mode::Transitional,
        Some(ModeName::Modern) => Mode::Modern,
    };
    let legacy_in_memory = table.legacy_in_memory.unwrap_or_default();
    if legacy_in_memory && !mode.has_legacy() {
        return Err(PlaceError::NoLegacy);
    }
    let layout = match table.layout {
        Some(LayoutName::Qemu) | None => Layout::Qemu,
        Some(LayoutName::Compact) => Layout::Compact,
    };
    Ok(Place::Pci {
        slot: table.slot.as_deref().map(str::parse).transpose()?,
        shape: Shape {
            mode,
            layout,
            legacy_in_memory,
        },
    })
}

fn mmio(table: &Table) -> Result<Place, PlaceError> {
    let foreign = [
        ("mode", table.mode.is_some()),
        ("layout", table.layout.is_some()),
        ("legacy_in_memory", table.legacy_in_memory.is_some()),
    ];
    if let Some((key, _)) = foreign.into_iter().find(|(_, given)| *given) {
        let transport = "mmio";
        return Err(PlaceError::Foreign { transport, key });
    }
    Ok(Place::Mmio {
        slot: table.slot.as_deref().map(str::parse).transpose()?,
        version: version(table.version)?,
    })
}

impl TryFrom<Table> for Place {
    type Error = PlaceError;

    fn try_from(table: Table) -> Result<Self, PlaceError> {
        match table.transport {
            Transport::Pci => pci(&table),
            Transport::Mmio => mmio(&table),
        }
    }
}

impl From<Place> for Table {
    fn from(place: Place) -> Self {
        match place {
            Place::Pci { slot, shape } => Self {
                slot: slot.map(String::from),
                mode: Some(match shape.mode {
                    Mode::Legacy => ModeName::Legacy,
                    Mode::Transitional => ModeName::Transitional,
                    Mode::Modern => ModeName::Modern,
                }),
                layout: Some(match shape.layout {
                    Layout::Qemu => LayoutName::Qemu,
                    Layout::Compact => LayoutName::Compact,
                }),
                legacy_in_memory: Some(shape.legacy_in_memory),
                ..Self::default()
            },
            Place::Mmio { slot, version } => Self {
                transport: Transport::Mmio,
                slot: slot.map(|slot| slot.to_string()),
                version: Some(match version {
                    Version::One => 1,
                    Version::Two => 2,
                }),
                ..Self::default()
            },
        }
    }
}
