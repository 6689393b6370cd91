//! Disks.

use std::num::NonZeroU8;

use serde::{Deserialize, Serialize};

use super::HostPath;

/// A disk's image, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// A file or a block device.
    pub path: HostPath,
    /// The guest cannot write.
    #[serde(default)]
    pub read_only: bool,
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

/// A serial number: up to 20 bytes of ASCII (virtio 1.3, section 5.2.6: the answer to a request of type GET_ID).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(String);

impl Serial {
    const LENGTH: usize = 20;

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Serial {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        if text.len() > Self::LENGTH || !text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err("a disk's serial number has up to 20 characters of ASCII");
        }
        Ok(Self(text))
    }
}

impl From<Serial> for String {
    fn from(serial: Serial) -> Self {
        serial.0
    }
}
