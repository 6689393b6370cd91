//! Virtio devices of a guest, as the file says them.
//!
//! ```toml
//! [[guest."web".virtio]]
//! type = "rng"
//! slot = "1f"               # default: the highest that is free
//! mode = "transitional"     # or "modern", "legacy"
//! layout = "qemu"           # or "compact"
//!
//! [[guest."web".virtio]]
//! type = "blk"
//! path = "/var/lib/images/web.raw"
//! read_only = false
//! direct = false            # past the host's cache
//! queues = 1
//! serial = "web-0"
//! ```

use std::num::NonZeroU8;
use std::path::PathBuf;
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
    /// A disk.
    Blk(Disk),
}

/// A disk's image, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// A file or a block device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// Past the host's cache (O_DIRECT).
    pub direct: bool,
    /// How many queues, at least one.
    pub queues: NonZeroU8,
    /// What the guest sees as its serial number: the first 20 bytes of it.
    pub serial: String,
}

/// Keys that do not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// One is missing.
    #[error("a {kind} device needs the key {key:?}")]
    Missing {
        /// The device's type.
        kind: &'static str,
        /// The key.
        key: &'static str,
    },
    /// One is another type's.
    #[error("a {kind} device has no key {key:?}")]
    Foreign {
        /// The device's type.
        kind: &'static str,
        /// The key.
        key: &'static str,
    },
}

impl Model {
    /// As it is written.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rng => "rng",
            Self::Blk(_) => "blk",
        }
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub struct VirtioDevice {
    /// What it is.
    pub model: Model,
    /// Where; `None`: the highest slot that is free.
    pub slot: Option<Slot>,
    /// How it looks to drivers.
    pub shape: Shape,
}

/// The device as it is read, and written.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<Type>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<Slot>,
    mode: ModeName,
    layout: LayoutName,
    legacy_in_memory: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    read_only: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queues: Option<NonZeroU8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Type {
    Rng,
    Blk,
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

impl Table {
    /// Refuses keys that are a disk's alone.
    fn refuse_disk_keys(&self, kind: &'static str) -> Result<(), TableError> {
        let given = [
            ("path", self.path.is_some()),
            ("read_only", self.read_only.is_some()),
            ("direct", self.direct.is_some()),
            ("queues", self.queues.is_some()),
            ("serial", self.serial.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(TableError::Foreign { kind, key }),
            None => Ok(()),
        }
    }

    fn disk(&mut self) -> Result<Disk, TableError> {
        let (kind, key) = ("blk", "path");
        Ok(Disk {
            path: self.path.take().ok_or(TableError::Missing { kind, key })?,
            read_only: self.read_only.unwrap_or_default(),
            direct: self.direct.unwrap_or_default(),
            queues: self.queues.unwrap_or(NonZeroU8::MIN),
            serial: self.serial.take().unwrap_or_default(),
        })
    }
}

impl TryFrom<Table> for VirtioDevice {
    type Error = TableError;

    fn try_from(mut table: Table) -> Result<Self, TableError> {
        let (kind, key) = ("virtio", "type");
        let model = match table.r#type {
            None => return Err(TableError::Missing { kind, key }),
            Some(Type::Rng) => {
                table.refuse_disk_keys("rng")?;
                Model::Rng
            }
            Some(Type::Blk) => Model::Blk(table.disk()?),
        };
        Ok(Self {
            model,
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
        })
    }
}

impl From<VirtioDevice> for Table {
    fn from(device: VirtioDevice) -> Self {
        let of_model = match device.model {
            Model::Rng => Self {
                r#type: Some(Type::Rng),
                ..Self::default()
            },
            Model::Blk(disk) => Self {
                r#type: Some(Type::Blk),
                path: Some(disk.path),
                read_only: Some(disk.read_only),
                direct: Some(disk.direct),
                queues: Some(disk.queues),
                serial: Some(disk.serial),
                ..Self::default()
            },
        };
        Self {
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
            ..of_model
        }
    }
}
