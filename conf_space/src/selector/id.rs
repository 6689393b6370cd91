//! Kinds of devices, by their identification registers.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::DeviceNames;
use crate::address::hex;

/// A kind of device: `vendor:device` or `vendor:device:subvendor:subdevice`, four hexadecimal digits each, as `lspci -n` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceId {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID and subsystem ID; without them, whichever.
    pub subsystem: Option<(u16, u16)>,
}

impl DeviceId {
    /// Whether the device is of this kind.
    pub fn matches(&self, device: &DeviceNames) -> bool {
        (self.vendor, self.device) == (device.vendor, device.device)
            && self
                .subsystem
                .is_none_or(|subsystem| subsystem == device.subsystem)
    }
}

/// A text that names no kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "expected vendor:device or vendor:device:subvendor:subdevice, four hexadecimal digits each, for example 8086:10d3"
)]
pub struct ParseIdError;

impl FromStr for DeviceId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let part = |part: &str| hex(part, 4).filter(|_| part.len() == 4).ok_or(ParseIdError);
        let parts: Vec<u16> = text.split(':').map(part).collect::<Result<_, _>>()?;
        match *parts.as_slice() {
            [vendor, device] => Ok(Self {
                vendor,
                device,
                subsystem: None,
            }),
            [vendor, device, subvendor, subdevice] => Ok(Self {
                vendor,
                device,
                subsystem: Some((subvendor, subdevice)),
            }),
            _ => Err(ParseIdError),
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)?;
        if let Some((vendor, device)) = self.subsystem {
            write!(f, ":{vendor:04x}:{device:04x}")?;
        }
        Ok(())
    }
}
