//! Disks that a guest has from xl's configuration: what there is to say of them here.

use std::num::NonZeroU8;

use serde::{Deserialize, Deserializer, de};
use virtio::transport::mmio::Version;

use super::{Disk, HostPath, MmioSlot, Model, Place, Serial, VirtioDevice, place};

/// What xl's `disk=` has no words for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct XlDisk {
    /// `None`: the lowest slot that is free.
    #[serde(default)]
    pub slot: Option<MmioSlot>,
    /// Of its registers.
    #[serde(default = "newest", deserialize_with = "version")]
    pub version: Version,
    /// Drivers of version 2 are offered packed rings.
    #[serde(default)]
    pub packed: bool,
    /// Past the host's cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// How many queues.
    #[serde(default = "super::one")]
    pub queues: NonZeroU8,
    /// What the guest sees as its serial number.
    #[serde(default)]
    pub serial: Serial,
}

impl Default for XlDisk {
    fn default() -> Self {
        Self {
            slot: None,
            version: newest(),
            packed: false,
            direct: false,
            queues: super::one(),
            serial: Serial::default(),
        }
    }
}

impl XlDisk {
    /// The disk whose image xl has named.
    pub fn device(&self, path: HostPath, read_only: bool) -> VirtioDevice {
        VirtioDevice {
            place: Place::Mmio {
                slot: self.slot,
                version: self.version,
            },
            packed: self.packed,
            model: Model::Blk(Disk {
                path,
                read_only,
                direct: self.direct,
                queues: self.queues,
                serial: self.serial.clone(),
            }),
        }
    }
}

fn newest() -> Version {
    Version::Two
}

fn version<'de, D: Deserializer<'de>>(from: D) -> Result<Version, D::Error> {
    let number = u8::deserialize(from)?;
    place::version(Some(number)).map_err(de::Error::custom)
}
