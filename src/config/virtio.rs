//! Virtio devices of a guest, as the file says them.
//!
//! ```toml
//! [[guest."web".virtio]]
//! type = "rng"
//! slot = "1f"               # default: the highest that is free
//! mode = "transitional"     # or "modern", "legacy"
//! layout = "qemu"           # or "compact"
//! ```

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use virtio::pci::{Layout, Mode, Shape};

/// A slot of the guest's first bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Slot(u8);

/// A text is not a slot that can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Not a number.
    #[error("a slot is a hexadecimal number from 02 to 1f")]
    Form,
    /// The chipset is there.
    #[error(
        "slots 0 and 1 are the chipset's: choose one from 02 to 1f, 1f downwards to be clear of QEMU's devices"
    )]
    Chipset,
}

impl Slot {
    /// The highest.
    pub const LAST: Self = Self(0x1f);
    /// The lowest that is not the chipset's.
    pub const FIRST: Self = Self(2);

    /// A slot with this number.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn new(number: u8) -> Result<Self, SlotError> {
        match number {
            0 | 1 => Err(SlotError::Chipset),
            2..=0x1f => Ok(Self(number)),
            _ => Err(SlotError::Form),
        }
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl FromStr for Slot {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        let number = u8::from_str_radix(text, 16).map_err(|_| SlotError::Form)?;
        Self::new(number)
    }
}

impl TryFrom<String> for Slot {
    type Error = SlotError;

    fn try_from(text: String) -> Result<Self, SlotError> {
        text.parse()
    }
}

impl From<Slot> for String {
    fn from(slot: Slot) -> Self {
        format!("{:02x}", slot.number())
    }
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// A source of random numbers.
    Rng,
}

impl Model {
    /// As it is written.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rng => "rng",
        }
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Table", into = "Table")]
pub struct VirtioDevice {
    /// What it is.
    pub model: Model,
    /// Where; `None`: the highest slot that is free.
    pub slot: Option<Slot>,
    /// How it looks to drivers.
    pub shape: Shape,
}

/// The device as it is read, and written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    r#type: Type,
    slot: Option<Slot>,
    #[serde(default)]
    mode: ModeName,
    #[serde(default)]
    layout: LayoutName,
    #[serde(default)]
    legacy_in_memory: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Rng,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Legacy,
    #[default]
    Transitional,
    Modern,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LayoutName {
    #[default]
    Qemu,
    Compact,
}

impl From<Table> for VirtioDevice {
    fn from(table: Table) -> Self {
        Self {
            model: match table.r#type {
                Type::Rng => Model::Rng,
            },
            slot: table.slot,
            shape: Shape {
                mode: match table.mode {
                    ModeName::Legacy => Mode::Legacy,
                    ModeName::Transitional => Mode::Transitional,
                    ModeName::Modern => Mode::Modern,
                },
                layout: match table.layout {
                    LayoutName::Qemu => Layout::Qemu,
                    LayoutName::Compact => Layout::Compact,
                },
                legacy_in_memory: table.legacy_in_memory,
            },
        }
    }
}

impl From<VirtioDevice> for Table {
    fn from(device: VirtioDevice) -> Self {
        Self {
            r#type: match device.model {
                Model::Rng => Type::Rng,
            },
            slot: device.slot,
            mode: match device.shape.mode {
                Mode::Legacy => ModeName::Legacy,
                Mode::Transitional => ModeName::Transitional,
                Mode::Modern => ModeName::Modern,
            },
            layout: match device.shape.layout {
                Layout::Qemu => LayoutName::Qemu,
                Layout::Compact => LayoutName::Compact,
            },
            legacy_in_memory: device.shape.legacy_in_memory,
        }
    }
}
